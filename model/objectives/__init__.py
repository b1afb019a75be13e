"""The losses of both stages over the global batch."""
