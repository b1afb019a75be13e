"""Before and after a run: preflight and doctor."""
