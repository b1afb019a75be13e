"""A data set on disk: shards, their indexes and the manifest; built and verified once."""
