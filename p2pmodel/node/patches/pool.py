"""The modular experts of a version, for people: where they come from, and what texts they are chosen for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput, NotFound
from p2pmodel.domain.ids import PatchId, PeerId, VersionId
from p2pmodel.domain.modular import KIND, NONE, Expert, is_pool, place_of, slots_of_expert
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.data import read_texts
from p2pmodel.engine.evaluation import attached
from p2pmodel.node.lineages.bases import find_base
from p2pmodel.node.lineages.expert_shares import Shares
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import read_change, version_state
from p2pmodel.tensors.kinds import Kinds
from p2pmodel.tensors.smear import LEAD, is_expert
from p2pmodel.tensors.smear_hooks import Applier

EXCERPTS = 64


@dataclass(frozen=True)
class Contribution:
    """A merged patch that holds something of an expert."""

    version: str
    patch: PatchId
    contributor: PeerId
    parts: tuple[str, ...]
    data: tuple[str, ...]


@dataclass(frozen=True)
class ExpertView:
    """since: the number of the version that brought it; values: in all layers; contributions: oldest first, of patches
    that are on this machine."""

    name: str
    rank: int
    since: str
    layers: int
    values: int
    contributions: tuple[Contribution, ...]


def experts_of(lineage: Lineage, version: VersionId) -> tuple[ExpertView, ...]:
    """Sorted by name."""
    pools = [slot for slot in lineage.manifest.slots if is_pool(slot)]
    chain = list(_chain(lineage, version))
    return tuple(
        ExpertView(
            expert.name,
            expert.rank,
            _since(lineage, chain, expert),
            len(pools),
            sum(prod(slot.shape) for slot in slots_of_expert(pools, expert)),
            tuple(_contributions(lineage, chain, expert.name)),
        )
        for expert in lineage.experts(version)
    )


def find_expert(lineage: Lineage, version: VersionId, name: str) -> ExpertView:
    """Raises NotFound."""
    views = experts_of(lineage, version)
    for view in views:
        if view.name == name:
            return view
    known = ", ".join(view.name for view in views) or "none"
    raise NotFound(
        f"{lineage.manifest.name} {lineage.number(version)} has no expert {name[:64]!r}.", f"It has: {known}."
    )


def _chain(lineage: Lineage, version: VersionId) -> Iterator[VersionId]:
    """The newest first, without the base."""
    while version != lineage.model:
        yield version
        version = lineage.version(version).candidate.parent


def _since(lineage: Lineage, chain: Sequence[VersionId], expert: Expert) -> str:
    """The oldest of the latest versions that have it without a gap."""
    found = chain[0]
    for version in chain:
        if expert not in lineage.experts(version):
            break
        found = version
    return str(lineage.number(found))


def _contributions(lineage: Lineage, chain: Sequence[VersionId], name: str) -> Iterator[Contribution]:
    for version in reversed(chain):
        for patch in lineage.version(version).candidate.patches:
            header = lineage.patches.get(patch)
            if header is None or header.kind != KIND or not lineage.home.objects.has(header.adapter.digest):
                continue
            change = read_change(lineage, header.kind, lineage.home.objects.load(header.adapter.digest))
            places = [place for slot in change.values if (place := place_of(slot)) is not None]
            parts = sorted({place.part for place in places if place.expert == name})
            if parts:
                data = tuple(file.name for file in header.provenance.data)
                yield Contribution(str(lineage.number(version)), patch, header.contributor, tuple(parts), data)


def shares_on(lineage: Lineage, version: VersionId, base: Path | None, files: Sequence[Path]) -> Shares:
    """What the routers choose for excerpts of texts. Raises InvalidInput for a text that is too short, and for a
    version without experts; NotFound."""
    names = tuple(expert.name for expert in lineage.experts(version))
    if not names:
        raise InvalidInput(
            f"{lineage.manifest.name} {lineage.number(version)} has no experts.",
            "Train one: p2pmodel train --kind expert",
        )
    folder = find_base(lineage.home, lineage, base)
    model, tokenizer = load_whole(folder), load_tokenizer(folder)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    state = version_state(lineage, version)
    own = {name: tensor for name, tensor in state.items() if is_expert(name)}
    rest = {name: tensor for name, tensor in state.items() if name not in own}
    routers = Applier(model.base_model, list(own))
    rows = []
    for file in files:
        text = "\n".join(text.text for text in read_texts([file]))
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < LEAD:
            raise InvalidInput(f"{file} is too short: the routers look at {LEAD} tokens.")
        step = max(LEAD, (len(ids) - LEAD) // EXCERPTS)
        cuts = [ids[at : at + LEAD] for at in range(0, len(ids) - LEAD + 1, step)][:EXCERPTS]
        excerpts = torch.tensor([[start or 0, *cut] for cut in cuts])
        with attached(model, Kinds(lineage.manifest.kinds), rest) as others, others.use(rest), routers.use(own):
            rows.append((file.name, tuple(_mean_shares(model, routers, excerpts).tolist())))
    return Shares((*names, NONE), tuple(rows))


@torch.inference_mode()
def _mean_shares(model: PreTrainedModel, routers: Applier, excerpts: Tensor) -> Tensor:
    """[E + 1]."""
    model(input_ids=excerpts.to(model.device), use_cache=False)
    assert routers.latest is not None
    return torch.stack(list(routers.latest.shares.values())).mean((0, 1)).cpu()
