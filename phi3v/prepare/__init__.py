"""Rows and images to shards: sources, conversations, samples, the dataset folder."""

from phi3v.prepare.dataset import prepare, verify

__all__ = ["prepare", "verify"]
