"""`make demo`: the whole system on real images with real pretrained models, all from package registries."""
