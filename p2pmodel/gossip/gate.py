"""Which gossip messages are let in, by what they are and how many their senders send.

A message passes twice: `admit` before its GossipSub signature costs a verification, `accept` after. Limits by origin
come after the signature, because a forged origin must not use up another peer's allowance; by forwarder, before it.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

from p2pmodel.domain.announcement import MAX_ANNOUNCEMENT_BYTES
from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import ModelId
from p2pmodel.gossip.limits import PUBLISH_BURST, PUBLISH_RATE, SourceLimits
from p2pmodel.wire import records

REPLAY_SECONDS = 20
"""A peer that comes is handed the messages of the last so many seconds at once; an origin's burst may be that long."""

FORWARD_RATE = 50.0
FORWARD_BURST = 1000
"""Of one forwarder, over all origins: about what a child can verify."""

_TOPIC_PREFIX = "p2pmodel/1/"
_ED25519_ID = b"\x00\x24\x08\x01\x12\x20"
_ED25519_ID_BYTES = 38


def topic_name(model: ModelId) -> str:
    return _TOPIC_PREFIX + model


def refusal(model: str, data: bytes) -> str:
    """Why `data` is no announcement for `model`, in one word; empty when it is one."""
    if len(data) > MAX_ANNOUNCEMENT_BYTES:
        return "size"
    try:
        announcement = records.open_announcement(data)
    except Rejected as rejected:
        return rejected.reason
    return "" if announcement.model == model else "model"


class Gate:
    """Counts what it refuses in `refused`, by reason."""

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self._origins = SourceLimits(PUBLISH_RATE, PUBLISH_BURST + PUBLISH_RATE * REPLAY_SECONDS, capacity=4096)
        self._forwarders = SourceLimits(FORWARD_RATE, FORWARD_BURST, capacity=512)

    def admit(self, forwarder: Hashable, origin: bytes, topics: Sequence[str], size: int, now: float) -> bool:
        """Before the signature. origin: the bytes of the PeerId that the message names as its author."""
        if size > MAX_ANNOUNCEMENT_BYTES:
            return self._refuse("size")
        if len(topics) != 1:
            return self._refuse("topics")
        if len(origin) != _ED25519_ID_BYTES or not origin.startswith(_ED25519_ID):
            return self._refuse("origin")
        return self._forwarders.allow(forwarder, now) or self._refuse("forwarder-rate")

    def accept(self, origin: bytes, model: str, data: bytes, now: float) -> bool:
        """After the signature."""
        if not self._origins.allow((origin, model), now):
            return self._refuse("rate")
        reason = refusal(model, data)
        return self._refuse(reason) if reason else True

    def _refuse(self, reason: str) -> bool:
        self.refused[reason] += 1
        return False
