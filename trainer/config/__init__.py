"""What a recipe may contain, how it is read, and what may change on resume."""
