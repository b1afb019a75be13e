"""Other people's checkpoints and ours."""
