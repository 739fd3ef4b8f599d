"""Where a training keeps how far it has come: in the home, so that the same command goes on after a kill.

Every blob is an object; one ref names the last progress, and is moved only when all that it needs is on the disk.
"""

import contextlib

from p2pmodel.domain.errors import NotFound, Rejected, StorageError
from p2pmodel.domain.ids import Digest
from p2pmodel.engine.training.resuming import MAX_PROGRESS_BYTES, Progress
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.notes import TRAINING

MAX_KEPT_BYTES = 64 << 20
"""Of one checkpoint: larger ones are not kept for those who audit, but only until the training does without them."""


class Savepoints:
    """A `Keeper` of one training; `key` is the digest of all that its result depends on."""

    def __init__(self, lineage: Lineage, key: Digest) -> None:
        self._lineage, self._objects, self._refs = lineage, lineage.home.objects, lineage.home.refs
        self._name = lineage.notes.ref(TRAINING, key)

    def keep(self, raw: bytes) -> Digest:
        return self._objects.put(raw).digest

    def load(self, digest: Digest) -> bytes:
        return self._objects.load(digest)

    def found(self) -> Progress | None:
        """None as well when a part of it is damaged or gone: then the training begins anew."""
        try:
            noted = self._noted()
            if noted is not None and all(self._objects.verify(digest) for digest in _needed(noted[1])):
                return noted[1]
        except (NotFound, Rejected, StorageError):
            pass
        return None

    def note(self, progress: Progress) -> None:
        before = None
        with contextlib.suppress(NotFound, Rejected, StorageError):
            before = self._noted()
        record = self._objects.put(progress.encode()).digest
        self._refs.set(self._name, record)
        if before is not None and before[0] != record:
            self._objects.remove(before[0])
            self._remove(_needed(before[1]) - _needed(progress) - {*progress.states})
        for digests in (progress.checkpoints, progress.states):
            self._remove({digest for digest in digests if self._is_large(digest)} - _needed(progress))

    def forget(self, keep: Digest | None = None) -> None:
        """The training is over, or is to begin anew. What an audit wants to see stays, and `keep`."""
        with contextlib.suppress(NotFound, Rejected, StorageError):
            if (noted := self._noted()) is not None:
                self._refs.delete(self._name)
                self._objects.remove(noted[0])
                needed, states = _needed(noted[1]), {*noted[1].states}
                self._remove({d for d in needed if d not in states or self._is_large(d)} - {keep})
        self._refs.delete(self._name)

    def _noted(self) -> tuple[Digest, Progress] | None:
        text = self._refs.get(self._name)
        if text is None:
            return None
        return Digest(text), Progress.decode(self._objects.load(Digest(text), MAX_PROGRESS_BYTES))

    def _is_large(self, digest: Digest) -> bool:
        return (self._objects.size(digest) or 0) > MAX_KEPT_BYTES

    def _remove(self, digests: set[Digest]) -> None:
        """But not what a record refers to, such as the adapter of the same training's patch when it is published."""
        here = {digest for digest in digests if self._objects.has(digest)}
        if here:
            self._lineage.refresh()
            here -= {ref.digest for ref in self._lineage.blobs()}
        for digest in here:
            self._objects.remove(digest)


def _needed(progress: Progress) -> set[Digest]:
    """To go on from it."""
    needed = {progress.state, progress.states[progress.best]}
    return needed if progress.gradients is None else needed | {progress.gradients}
