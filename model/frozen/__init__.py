"""Frozen encoders and language models behind one interface."""
