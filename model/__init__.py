"""BLIP-2: the Q-Former, the frozen models that it connects, the losses of both stages, and file formats."""
