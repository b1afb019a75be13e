"""From tar shards in object storage to batches: exactly once, at any world size, resumable from one integer."""
