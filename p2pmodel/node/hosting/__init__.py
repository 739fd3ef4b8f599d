"""Spans of layers that this machine serves."""
