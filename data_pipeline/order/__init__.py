"""The sample order: pure functions without I/O."""
