"""Versions as people handle them: compared, tested, checked out, branched off."""
