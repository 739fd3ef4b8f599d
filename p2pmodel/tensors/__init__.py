"""Floor 1: tensor mathematics. Nothing here knows of files, sockets or clocks."""
