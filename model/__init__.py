"""BLIP-2: the Q-Former, the frozen models it joins, the losses of both stages, and the formats they are stored in."""
