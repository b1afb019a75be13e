"""From tar shards to batches: each sample exactly once, at any world size, resumable from a single step."""
