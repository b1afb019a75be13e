"""A run's folder: its lease and record, the initial weights of stage 2, exports."""
