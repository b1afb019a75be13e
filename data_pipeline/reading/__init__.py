"""Batches of one rank: the loader, readers and where they run, caches."""
