"""The network: frozen vision encoder, trainable Q-Former, frozen language model, losses, generation, formats."""
