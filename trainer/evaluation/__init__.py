"""Evaluation by retrieval and captioning: metrics, figures, published protocols."""
