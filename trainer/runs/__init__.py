"""A run's folder: one writer, its record, what stage 2 begins with, what is exported."""
