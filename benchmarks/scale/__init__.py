"""How the parts behave at sizes that no machine here has: planned, counted and simulated."""
