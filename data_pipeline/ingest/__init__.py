"""Creates shards from folders, JSONL, Parquet and annotation files."""
