"""Spans of layers, and experts of a mixture, that this machine serves."""
