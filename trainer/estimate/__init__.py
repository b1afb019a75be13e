"""Predicts memory, time and cost before anything is started."""
