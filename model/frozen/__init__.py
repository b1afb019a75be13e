"""Frozen image encoders and language models, each behind one interface."""
