"""How good a model is: retrieval and captioning, their metrics and figures."""
