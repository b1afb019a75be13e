"""How the system behaves at large scale: planned, counted and simulated."""
