"""Inputs that need no download: generated scenes, tiny frozen models, and the recipe that trains on them."""
