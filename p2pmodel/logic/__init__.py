"""Floor 1: what a node decides. Time and randomness are arguments; nothing here waits, reads, sends or keeps state."""
