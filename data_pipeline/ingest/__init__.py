"""From folders, JSONL, Parquet and COCO to shards."""
