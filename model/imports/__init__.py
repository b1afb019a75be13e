"""Published weights of any format as named tensors that are read one at a time."""
