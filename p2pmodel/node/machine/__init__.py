"""What a node runs on: its device, its threads, and whether they are well."""
