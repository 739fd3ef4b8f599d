"""Floor 1: bytes <-> nouns. What comes off the network passes here before anything else looks at it."""
