"""Checkpoints: what is on the disk, how it gets there, how it is read by any number of ranks."""
