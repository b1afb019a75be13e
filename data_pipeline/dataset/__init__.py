"""What a data set is on disk: shards, their indexes, the manifest; built and checked once."""
