"""Ranks, engine, checkpoints, metering, tracking, and the loop that uses them."""
