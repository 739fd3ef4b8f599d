"""Announcements over GossipSub. py-libp2p and hivemind cannot be imported into one process, so libp2p lives in a child.

`link` is the node's side (asyncio, no libp2p); `child`, `mesh` and `dialler` run in the child process (trio, libp2p);
`frames`, `gate` and `limits` are plain.
"""
