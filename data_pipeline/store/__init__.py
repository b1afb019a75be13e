"""Objects at s3:// and file:// behind one small interface."""
