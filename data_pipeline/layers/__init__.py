"""Layers over a data set: one Parquet file per shard with data computed for its samples; images are not copied."""
