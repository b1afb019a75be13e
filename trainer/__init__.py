"""Training: DeepSpeed engine, loop, checkpoints, runs, evaluation, estimates."""
