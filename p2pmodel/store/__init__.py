"""Floor 2: the disk. Content-addressed objects, refs as the only mutable truth, and an index that can be made again.

Every change is one rename or one SQLite transaction, so a process killed at any moment, or a full disk, leaves a home
that opens. Several processes may use one home at the same time; only the node takes the home's lock.
"""
