"""p2pmodel: a peer-to-peer network that hosts, serves, trains and merges a model between volunteers."""

__version__ = "0.1.0"
