"""Pretraining of BLIP-2 vision-language bridges on Ray and DeepSpeed. The folders of this package are the repository's top-level ones."""
