"""DeepSpeed holds and updates the trainable part."""
