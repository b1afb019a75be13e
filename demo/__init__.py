"""`make demo`: the whole system on real pictures with real pretrained frozen parts, from packages alone."""
