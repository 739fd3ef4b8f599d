"""What a trunk and an expert host say to each other when a stream opens, and why one ends."""

from p2pmodel.domain.errors import PeerFailed, Rejected
from p2pmodel.domain.experts import ExpertOpening
from p2pmodel.domain.ids import PeerId
from p2pmodel.swarm.framing import Frame
from p2pmodel.swarm.opening import Failure, plain
from p2pmodel.wire import canonical, frames
from p2pmodel.wire.frames import Kind

EXPERTS = "p2pmodel/experts/1"
HANDSHAKE_SECONDS = 5.0
IDLE_SECONDS = 600.0
"""After which a host ends a stream that says nothing."""


def opening_frame(opening: ExpertOpening) -> bytes:
    return frames.pack(Kind.OPEN, canonical.encode(opening))


def read_opening(frame: Frame) -> ExpertOpening:
    """Raises Rejected("frame" | "size" | "schema" | "canonical")."""
    if frame.kind is not Kind.OPEN:
        raise Rejected("frame", "A trunk's first frame on a stream does not open it.")
    return canonical.decode(frame.meta, ExpertOpening, frames.MAX_META_BYTES)


def told(frame: Frame, peer: PeerId) -> PeerFailed:
    """Of an ERROR frame from an expert host."""
    try:
        message = plain(Failure.read(frame.meta).message)
    except Rejected:
        message = "it failed, and did not say why."
    return PeerFailed(f"Expert host …{peer[-8:]}: {message}", peer)
