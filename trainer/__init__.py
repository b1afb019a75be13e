"""How a run is trained: stages in order, the loop, what a stage computes."""
