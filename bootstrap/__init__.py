"""Captions written, scored and chosen for a data set, shard by shard, by reference: no image is copied."""
