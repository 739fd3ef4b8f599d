"""How a node that chose for itself what it serves goes over to something else, while it serves."""
