"""What a model answers on held-out rows: generation, metrics, blind control, report."""
