"""From an operator's command to a run on a Ray cluster."""
