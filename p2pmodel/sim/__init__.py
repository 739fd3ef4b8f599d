"""Floor 2: swarms of any size in virtual time, which decide as real nodes do. What is simulated is only the world."""
