"""What is seen of a run: metrics, goodput, records, sign of life."""
