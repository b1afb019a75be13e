"""Pretraining of BLIP-2 vision-language models on Ray and DeepSpeed. Its packages are links to top-level folders."""
