"""Generates, scores and selects captions for a data set, shard by shard, without copying images."""
