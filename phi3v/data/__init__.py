"""Prepared samples: the dataset folder, reading it, packing it, and feeding it to ranks."""

from phi3v.data.reader import Dataset

__all__ = ["Dataset"]
