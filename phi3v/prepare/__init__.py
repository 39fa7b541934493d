"""Rows and images to shards: sources, conversations, samples, the dataset folder."""

from phi3v.prepare.dataset import Part, merge, prepare, prepare_part, verify
from phi3v.prepare.summary import summary

__all__ = ["Part", "merge", "prepare", "prepare_part", "summary", "verify"]
