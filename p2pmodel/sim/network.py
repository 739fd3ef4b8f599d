"""How peers reach each other: delays, partitions, and the mesh in which announcements spread.

Peers lie at random in a square, and a message takes longer the farther it goes. An announcement goes from peer to peer
along a mesh of degree MESH_DEGREE, as GossipSub's does; all of its arrivals are computed at once, since nothing that
happens within the second or two that it takes decides where it goes.
"""

import random
from math import hypot

import numpy as np
from numpy.typing import NDArray

from p2pmodel.sim.scenario import Network

MESH_DEGREE = 10
"""As `gossip.mesh` sets it."""
MESH_SECONDS = 1.0
"""The mesh mends itself once a heartbeat."""
_NOBODY = -1

Figures = NDArray[np.float64]
Peers = NDArray[np.int64]


class Web:
    """up, side: by peer; whoever changes them calls `disturb`."""

    def __init__(self, chance: random.Random, nodes: int, network: Network) -> None:
        self._network, self._nodes = network, nodes
        self._draws = np.random.default_rng(chance.getrandbits(63))
        self._chance = chance
        self._places = self._draws.random((nodes, 2))
        self._xy = self._places.tolist()
        least, most = network.delay_seconds
        self._least, self._slope = least, (most - least) / 2**0.5
        self.up = np.zeros(nodes, dtype=bool)
        self.side = np.zeros(nodes, dtype=np.int64)
        self.sent = np.zeros(nodes, dtype=np.int64)
        self._mesh = np.full((nodes, MESH_DEGREE), _NOBODY, dtype=np.int64)
        self._delays = np.full((nodes, MESH_DEGREE), np.inf)
        self._mesh_from, self._stale = -MESH_SECONDS, True

    def disturb(self, *, at_once: bool = False) -> None:
        """at_once: connections are cut, which no mesh survives for a heartbeat."""
        self._stale = True
        if at_once:
            self._mesh_from = -MESH_SECONDS

    def reach(self, a: int, b: int) -> bool:
        return bool(self.up[b]) and self.side[a] == self.side[b]

    def fails(self) -> bool:
        return self._network.failure > 0 and self._chance.random() < self._network.failure

    def delay(self, a: int, b: int) -> float:
        """Seconds of one message."""
        (ax, ay), (bx, by) = self._xy[a], self._xy[b]
        far = self._least + self._slope * hypot(ax - bx, ay - by)
        return float(far * (1 + self._network.jitter * self._chance.random()))

    def spread(self, origin: int, now: float) -> tuple[list[float], list[int]]:
        """When an announcement comes to whom, in order, `origin` not among them."""
        if self._stale and now >= self._mesh_from + MESH_SECONDS:
            self._mend(now)
        mesh, network = self._mesh, self._network
        delays = self._delays * (1 + network.jitter * self._draws.random(mesh.shape))
        if network.loss:
            delays[self._draws.random(mesh.shape) < network.loss] = np.inf
        delays[~self.up] = np.inf
        arrivals = np.full(self._nodes, np.inf)
        arrivals[origin] = now
        while True:
            # What each peer hears from its neighbours: the mesh holds for each pair both ways.
            sooner = np.minimum(arrivals, (arrivals[mesh] + delays).min(axis=1))
            sooner[origin] = now
            if np.array_equal(sooner, arrivals):
                break
            arrivals = sooner
        reached = np.flatnonzero(np.isfinite(arrivals))
        self.sent[reached] += (mesh[reached] != _NOBODY).sum(axis=1) - 1
        self.sent[origin] += 1
        order = reached[np.argsort(arrivals[reached], kind="stable")]
        order = order[order != origin]
        return arrivals[order].tolist(), order.tolist()

    def _mend(self, now: float) -> None:
        self._mesh[:] = _NOBODY
        for side in np.unique(self.side[self.up]):
            self._weave(np.flatnonzero(self.up & (self.side == side)))
        nobody = self._mesh == _NOBODY
        apart = self._places[:, None, :] - self._places[np.where(nobody, 0, self._mesh)]
        self._delays = self._least + self._slope * np.sqrt((apart**2).sum(axis=2))
        self._delays[nobody] = np.inf
        self._mesh_from, self._stale = now, False

    def _weave(self, peers: Peers) -> None:
        """All with all where they are few; else rings in random orders, in which each has two neighbours."""
        if len(peers) <= MESH_DEGREE + 1:
            for peer in peers:
                others = peers[peers != peer]
                self._mesh[peer, : len(others)] = others
            return
        for column in range(0, MESH_DEGREE, 2):
            ring = self._draws.permutation(peers)
            self._mesh[ring, column] = np.roll(ring, 1)
            self._mesh[ring, column + 1] = np.roll(ring, -1)
