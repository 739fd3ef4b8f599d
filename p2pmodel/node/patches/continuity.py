"""What a contributor takes from one round into the next: Adam's moments, its control variate, what rounding it left.

It is kept by the version that was trained on, so that training again on that version begins where the first time did,
and gives the same patch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pmodel.domain.errors import NotFound, StorageError
from p2pmodel.domain.ids import Digest, VersionId
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.notes import CONTRIBUTING
from p2pmodel.tensors import blob
from p2pmodel.tensors.kinds import get_kind
from p2pmodel.wire import canonical


@dataclass(frozen=True)
class Inheritance:
    """moments: an optimiser's blob; control: the mean gradient of the round before, as everybody read it; error: what
    its rounding left over."""

    digest: Digest
    moments: bytes
    control: dict[str, Tensor] | None
    error: dict[str, Tensor] | None


def inherited(lineage: Lineage, kind: str, parent: VersionId, layout: str) -> Inheritance | None:
    """From the latest training on an ancestor of `parent`; None when there is none, or it was of other parameters, or
    the home has lost it."""
    if not get_kind(kind).continued:
        return None
    for made in reversed(lineage.chain(parent)):
        text = lineage.home.refs.get(_name(lineage, kind, made.parent))
        if text is None:
            continue
        noted = json.loads(text)
        if noted["layout"] != layout:
            return None
        try:
            control, error = (_tensors(lineage, noted[name]) for name in ("control", "error"))
            moments = lineage.home.objects.load(Digest(noted["moments"]))
        except (NotFound, StorageError):
            return None
        return Inheritance(canonical.digest(text.encode()), moments, control, error)
    return None


def bequeath(
    lineage: Lineage,
    kind: str,
    parent: VersionId,
    layout: str,
    moments: bytes,
    control: Mapping[str, Tensor] | None,
    error: Mapping[str, Tensor] | None,
) -> None:
    """Notes it for the trainings on later versions than `parent`."""
    if not get_kind(kind).continued:
        return
    put = lineage.home.objects.put
    digests = {
        "moments": put(moments).digest,
        "control": None if control is None else put(blob.pack(dict(control))).digest,
        "error": None if error is None else put(blob.pack(error)).digest,
    }
    value = json.dumps({"layout": layout, **digests})
    lineage.home.refs.set(_name(lineage, kind, parent), value)


def layout_of(parameters: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> str:
    """The same for parameters that mean the same: their names, shapes, and the places that sparse ones have."""
    places = {name: tensor for name, tensor in adapter.items() if tensor.dtype == torch.int32}
    shapes = [[name, list(tensor.shape)] for name, tensor in sorted(parameters.items())]
    return canonical.digest(canonical.encode([shapes, blob.pack(places)]))[:32]  # no object has this digest


def _name(lineage: Lineage, kind: str, version: VersionId) -> str:
    return lineage.notes.ref(CONTRIBUTING, kind.replace("@", "-"), version)


def _tensors(lineage: Lineage, digest: str | None) -> dict[str, Tensor] | None:
    if digest is None:
        return None
    raw = lineage.home.objects.load(Digest(digest))
    return blob.unpack(raw, None, len(raw))
