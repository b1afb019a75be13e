"""The `isthmus` command: one file per group of verbs."""
