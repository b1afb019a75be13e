"""Models that generate captions, and models that score how well a text matches an image."""
