"""Everything that depends on Ray's internals."""
