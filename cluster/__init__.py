"""Operators: command line, jobs, driver, workers, preflight, manifests."""
