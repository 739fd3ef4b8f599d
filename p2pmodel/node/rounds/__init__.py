"""Rounds: what maintainers decide, by themselves and by people."""
