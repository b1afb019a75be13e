"""The Q-Former, the trainable bridge between image encoder and language model."""
