"""Floor 3: the only room that joins rooms."""
