"""Frozen weights: found, cached on the node, sharded by ZeRO-3, proven unchanged."""
