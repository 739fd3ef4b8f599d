"""Versions as people handle them: compared, tested, checked out, gone back to."""
