"""Captioning models that write candidates, and models that score how well a text fits an image."""
