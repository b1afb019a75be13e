"""All that depends on Ray's internals."""
