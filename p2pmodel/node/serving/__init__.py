"""The gateway: the swarm on behalf of HTTP clients."""
