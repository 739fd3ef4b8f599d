"""What is shown of a node and of its swarm."""
