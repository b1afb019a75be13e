"""The process group, and DeepSpeed, which holds and updates the trainable part."""
