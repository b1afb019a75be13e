"""Training: the stages in order, the loop, and what one step computes."""
