"""Layers over a data set: one Parquet file per shard with what was computed for its samples; no image is copied."""
