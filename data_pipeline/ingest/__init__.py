"""From folders, JSONL, Parquet and annotation files to shards."""
