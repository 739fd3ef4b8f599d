"""What a home notes of a lineage that no record says: tags, decisions, weights. Any process of the home may do so."""

import dataclasses
import json
import re
from collections.abc import Sequence

from p2pmodel.domain.errors import Busy, InvalidInput, NotFound
from p2pmodel.domain.ids import LEAST_DIGITS, Digest, ModelId, PatchId, VersionId
from p2pmodel.domain.version import DomainScore
from p2pmodel.store.refs import Refs

CONTRIBUTING, TRAINING = "contributing", "training"
"""Begin the names of what a contributor takes from one round into the next, and of how far a training has come."""
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LIKE_A_VERSION = re.compile(rf"v?[0-9]+(\.[0-9]+)*|[0-9a-f]{{{LEAST_DIGITS},}}")


class Notes:
    def __init__(self, refs: Refs, model: ModelId, name: str) -> None:
        """name: of the model."""
        self._refs, self._model, self._name = refs, model, name

    def ref(self, *parts: str) -> str:
        """The name of the ref that holds a note."""
        return "/".join(("models", self._model, *parts))

    @property
    def tags(self) -> dict[str, VersionId]:
        """This home's own names for versions, sorted."""
        prefix = self.ref("tags", "")
        names = [name.removeprefix(prefix) for name in self._refs.names(prefix)]
        return {name: VersionId(Digest(self._refs.get(prefix + name) or "")) for name in names}

    def tag(self, name: str, version: VersionId, *, move: bool = False) -> None:
        """Raises InvalidInput for what is no name for a tag, Busy when the tag is there and is not to be moved."""
        if not _TAG.fullmatch(name) or name in ("head", "base") or _LIKE_A_VERSION.fullmatch(name):
            raise InvalidInput(
                f"{name[:64]!r} is no name for a tag.",
                "Use at most 64 letters, digits, '.', '_' and '-', and nothing that reads like a number or an id.",
            )
        if not move and self.tags.get(name) not in (None, version):
            raise Busy(f"The tag {name} is there already.", "Move it with --force, or delete it first.")
        self._refs.set(self.ref("tags", name), version)

    def untag(self, name: str) -> None:
        """Raises NotFound."""
        if name not in self.tags:
            raise NotFound(f"{self._name} has no tag {name[:64]!r} here.", "See: p2pmodel tag")
        self._refs.delete(self.ref("tags", name))

    def decide(self, version: VersionId, accept: bool, reason: str = "") -> None:
        """What the person behind this home's maintainer says of a candidate; its node signs it."""
        self._refs.set(self.ref("decisions", version), json.dumps({"accept": accept, "reason": reason}))

    def decision(self, version: VersionId) -> tuple[bool, str] | None:
        """(accept, reason) as `decide` has it; None as long as nothing was said."""
        text = self._refs.get(self.ref("decisions", version))
        noted = json.loads(text) if text else None
        return noted and (bool(noted["accept"]), str(noted["reason"]))

    def note_scores(self, version: VersionId, scores: Sequence[DomainScore]) -> None:
        """What the exam said of a candidate that waits for the word of the person behind this home's maintainer."""
        self._refs.set(self.ref("examined", version), json.dumps([dataclasses.astuple(score) for score in scores]))

    def scores(self, version: VersionId) -> tuple[DomainScore, ...]:
        """As `note_scores` has it; none as long as nothing was noted."""
        text = self._refs.get(self.ref("examined", version))
        return tuple(DomainScore(*score) for score in json.loads(text)) if text else ()

    def weigh(self, patch: PatchId, weight: float) -> None:
        """λ of a patch in candidates that this home's maintainer proposes."""
        self._refs.set(self.ref("weights", patch), repr(float(weight)))

    def weight_of(self, patch: PatchId) -> float:
        """What `weigh` has said; else 1."""
        return float(self._refs.get(self.ref("weights", patch)) or 1.0)

    def agree_to_rollback(self, head: VersionId, version: VersionId) -> None:
        """This home's maintainer will accept a candidate on the head that restores the version."""
        self._refs.set(self.ref("rollback"), f"{head} {version}")

    def agrees_to_rollback(self, head: VersionId, version: VersionId) -> bool:
        return self._refs.get(self.ref("rollback")) == f"{head} {version}"
