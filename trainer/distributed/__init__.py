"""The process group and the few collectives that are not the model's."""
