"""Errors that a user of the model package can fix."""


class ModelError(ValueError):
    """A model part, its weights or its inputs do not fit; the message names both sides and the next action."""
