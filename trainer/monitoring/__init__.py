"""Monitoring of a run: metrics, goodput, records, the watchdog."""
