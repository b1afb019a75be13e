"""Batches of one rank: loader, readers, where readers run, their caches."""
