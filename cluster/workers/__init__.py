"""What runs inside a training or helper process."""
