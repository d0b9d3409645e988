"""Measurements of the studio: beside its peers, by itself, and of the queue. Not part of what is installed."""
