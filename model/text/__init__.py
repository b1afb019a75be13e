"""Tokenisation of captions."""
