"""Finds duplicate images within and across data sets by their hashes and marks them in a layer."""
