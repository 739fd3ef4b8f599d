"""Brings a trunk's rows to the peers that host their experts, and tries another one where one fails.

A forward's pairs of a row and an expert are shared out among the peers, a call for each; every call that is lost is
shared out again among those that are left. What comes back is added up in the order of the experts, whoever answered
first, so the sum does not depend on the network.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from p2pmodel.engine.remote_experts import ForwardContext
from p2pmodel.node.hosting.forwarding import Forward
from p2pmodel.node.hosting.helpers import Helpers


class Dispatcher(Helpers):
    """Implements `engine.remote_experts.RemoteExperts`."""

    def sums(
        self,
        layer: int,
        rows: Tensor,
        experts: Tensor,
        gates: Tensor,
        context: ForwardContext,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Tensor:
        """See `RemoteExperts`. Raises Rejected("overflow"), Unreachable naming the layer and the expert."""
        with self._under_way(Forward(self, layer, rows, experts, gates, context)) as forward:
            forward.start()
            meanwhile()
            return forward.sum()

    def gradients(
        self, layer: int, rows: Tensor, experts: Tensor, gates: Tensor, outer: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """See `RemoteExperts`. Raises as `sums` does."""
        with self._under_way(Forward(self, layer, rows, experts, gates, context, outer)) as forward:
            forward.start()
            return forward.gradients()

    @contextmanager
    def _under_way(self, forward: Forward) -> Iterator[Forward]:
        """Answers that a forward which breaks off has left behind are nobody's."""
        with self.under_way():
            try:
                yield forward
            finally:
                forward.drop()
