"""Why a stage ends a session, and who is to blame, as far as one stage can see."""

import logging

from p2pmodel.domain.errors import P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.ids import PeerId
from p2pmodel.swarm.framing import Frame
from p2pmodel.swarm.opening import Failure
from p2pmodel.swarm.stage_session import StageSession

_AS_SENT = frozenset({"finite", "frame", "size", "schema", "canonical"})
"""Reasons of a Rejected that are about the bytes of a frame, which an honest stage would not have passed on."""

log = logging.getLogger(__name__)


def malformed(session: StageSession) -> P2PModelError:
    """Of what came from before: the client's own mistake, or that of a peer on the route."""
    if session.before_peer == session.client:
        return Rejected("frame", "A malformed frame arrived from the client.")
    return PeerFailed("It sent a malformed frame.", session.before_peer)


def judged(error: Exception, session: StageSession, sender: PeerId, reporter: PeerId) -> P2PModelError:
    """What a step or a gradient of `sender` came to: the client's mistake is its own only where it sent the frame
    itself; elsewhere another peer may do better."""
    if isinstance(error, Rejected) and error.reason in _AS_SENT and sender != session.client:
        log.info("peer %s sent what cannot be computed with: %s", sender, error.message)
        return PeerFailed(f"Peer …{sender[-8:]} sent what cannot be computed with: {error.message}", sender)
    return explained(error, reporter)


def explained(error: Exception, reporter: PeerId) -> P2PModelError:
    if isinstance(error, P2PModelError):
        return error
    log.error("a session's step failed", exc_info=error)
    return PeerFailed("This peer failed to compute the step.", reporter)


def told(frame: Frame, sender: PeerId, reporter: PeerId) -> Failure:
    """Why a neighbour gives up. What it says is passed on as it is; the client judges it."""
    try:
        return Failure.read(frame.meta)
    except Rejected:
        return Failure.of(PeerFailed("It failed, and did not say why.", sender), reporter)
