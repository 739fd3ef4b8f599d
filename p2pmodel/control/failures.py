"""Errors across the control API: what a node raises, the client raises again, as the same class."""

import json

import grpc

from p2pmodel.domain import errors
from p2pmodel.domain.errors import P2PModelError, PeerFailed, Rejected

METADATA_KEY = "p2pmodel-error-bin"
MAX_TEXT = 2000
"""Longest message or hint, in characters: gRPC limits all metadata of a call to 8 KiB."""

_STATUS = {
    errors.UsageError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unreachable: grpc.StatusCode.UNAVAILABLE,
    errors.Rejected: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Busy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StorageError: grpc.StatusCode.DATA_LOSS,
    errors.NotRunning: grpc.StatusCode.UNAVAILABLE,
    errors.PeerFailed: grpc.StatusCode.ABORTED,
}
_CLASSES: dict[str, type[P2PModelError]] = {kind.__name__: kind for kind in (P2PModelError, *_STATUS)}


def status_of(error: P2PModelError) -> grpc.StatusCode:
    return next((code for kind, code in _STATUS.items() if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)


def pack(error: P2PModelError) -> bytes:
    """The value of the metadata entry that carries the error."""
    fields = {"class": type(error).__name__, "message": error.message[:MAX_TEXT], "hint": error.hint[:MAX_TEXT]}
    if isinstance(error, Rejected):
        fields["reason"] = error.reason
    if isinstance(error, PeerFailed):
        fields["peer"] = error.peer
    return json.dumps(fields, ensure_ascii=False).encode()


def unpack(raw: bytes) -> P2PModelError:
    """The error as it was raised; a class that this version does not know becomes a plain P2PModelError."""
    fields = json.loads(raw)
    name, message, hint = fields["class"], fields["message"], fields["hint"]
    if name == "Rejected":
        return Rejected(fields["reason"], message, hint)
    if name == "PeerFailed":
        return PeerFailed(message, fields["peer"], hint)
    return _CLASSES.get(name, P2PModelError)(message, hint)
