"""Floor 3: the only room that joins rooms. Here is the running node; the packages are what it does, and commands do."""
