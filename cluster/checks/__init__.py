"""Checks before and after a run: preflight and doctor."""
