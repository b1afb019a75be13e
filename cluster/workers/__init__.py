"""Code that runs inside training and helper processes."""
