"""Which size fits where, and the placed group."""
