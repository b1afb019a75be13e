"""The state of a run on its way to the store and back."""
