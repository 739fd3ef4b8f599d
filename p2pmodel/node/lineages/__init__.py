"""Lineages in a home: their records, the values of their versions, and where they come from."""
