"""Peers that ask: inference and training over the swarm, for people, programs and HTTP clients."""
