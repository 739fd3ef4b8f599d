"""What a node tells its operator: metrics for Prometheus, and logs on stderr."""
