"""Frozen weights: finding, caching and sharding them, and verifying that they never change."""
