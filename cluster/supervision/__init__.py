"""Supervision by the driver: placement, attempts, classification of failures, restarts."""
