"""Published weights of any format as named tensors, read one at a time."""
