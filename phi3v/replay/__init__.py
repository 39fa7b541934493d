"""What a run did at a step: its samples, and the same step once more."""
