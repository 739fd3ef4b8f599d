"""The local control API: what the commands on this machine ask the node on this machine, as gRPC on a Unix socket."""
