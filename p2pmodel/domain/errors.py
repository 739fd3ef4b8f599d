"""What can go wrong, in one sentence each, with the exit status that the command line ends with.

`message` says what was wrong; `hint` what to do about it. docs/exit-codes.md has the table.
"""


class P2PModelError(Exception):
    """Base of all errors that are the user's, a peer's or the machine's, not a defect of the program."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(P2PModelError):
    """Arguments that do not fit together, or name what this machine does not have (`--gpu 0` without a GPU)."""

    exit_code = 2


class NotFound(P2PModelError):
    """An unknown model, version, patch, file or object."""

    exit_code = 3


class InvalidInput(P2PModelError):
    """A file or text of the user's that cannot be used: empty, binary, too long, unreadable."""

    exit_code = 4


class Unreachable(P2PModelError):
    """No peer answers, or a layer is served by nobody."""

    exit_code = 5


class Rejected(P2PModelError):
    """Bytes that fail a check: signature, digest, schema, limit, shape, parent, finiteness.

    `reason` is one of a few words, for metrics and verdicts; `message` has the detail.
    """

    exit_code = 6

    def __init__(self, reason: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.reason = reason


class Busy(P2PModelError):
    """A resource that somebody else holds: the home folder, a port, the streams of peers."""

    exit_code = 7


class StorageError(P2PModelError):
    """The disk is full, read-only, or holds something else than it should."""

    exit_code = 8


class NotRunning(P2PModelError):
    """The command needs a node on this machine, and none runs on this home."""

    exit_code = 9


class PeerFailed(P2PModelError):
    """A remote peer broke off, timed out, or answered nonsense; another one may do better."""

    exit_code = 10

    def __init__(self, message: str, peer: str = "", hint: str = "") -> None:
        super().__init__(message, hint)
        self.peer = peer


class Regressed(P2PModelError):
    """A suite found a patch or a version worse than its parent, beyond what it tolerates."""

    exit_code = 11
