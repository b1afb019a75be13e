"""Reads and writes BLIP-2 models in the formats of Hugging Face and LAVIS and in our own."""
