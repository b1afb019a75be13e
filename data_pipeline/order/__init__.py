"""Which sample comes when: pure functions, no I/O."""
