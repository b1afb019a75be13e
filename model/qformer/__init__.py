"""The trainable bridge."""
