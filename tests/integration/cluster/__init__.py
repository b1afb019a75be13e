"""Integration tests of the cluster package."""
