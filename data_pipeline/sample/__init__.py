"""From a sample's bytes to pixels and text."""
