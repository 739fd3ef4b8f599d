"""What the routers of a version's modular experts choose for texts: computed here, or asked of the swarm's own."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.modular import NONE
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.data import read_texts
from p2pmodel.engine.evaluation import attached
from p2pmodel.node.lineages.bases import find_base
from p2pmodel.node.lineages.expert_shares import Shares
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.tensors.codecs import DEFAULT_CODEC
from p2pmodel.tensors.kinds import Kinds
from p2pmodel.tensors.smear import LEAD, is_expert
from p2pmodel.tensors.smear_hooks import Applier

if TYPE_CHECKING:
    from p2pmodel.node.asking.client import SwarmClient

EXCERPTS, ASKED_EXCERPTS = 64, 16
"""At most so many of a text, computed here and asked of the swarm."""
ASKED_TOKENS = LEAD + 8
"""Text that is cut between tokens may have fewer of them when it is read again."""


def shares_on(lineage: Lineage, version: VersionId, base: Path | None, files: Sequence[Path]) -> Shares:
    """Computed here. Raises InvalidInput for a text that is too short, and for a version without experts; NotFound."""
    names = _names(lineage, version)
    folder = find_base(lineage.home, lineage, base)
    model, tokenizer = load_whole(folder), load_tokenizer(folder)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    state = version_state(lineage, version)
    own = {name: tensor for name, tensor in state.items() if is_expert(name)}
    rest = {name: tensor for name, tensor in state.items() if name not in own}
    routers = Applier(model.base_model, list(own))

    def of(file: Path) -> Tensor:
        ids = _ids(tokenizer, file)
        step = max(LEAD, (len(ids) - LEAD) // EXCERPTS)
        cuts = [ids[at : at + LEAD] for at in range(0, len(ids) - LEAD + 1, step)][:EXCERPTS]
        excerpts = torch.tensor([[start or 0, *cut] for cut in cuts])
        with attached(model, Kinds(lineage.manifest.kinds), rest) as others, others.use(rest), routers.use(own):
            return _mean_shares(model, routers, excerpts)

    return _shares(names, files, of)


def shares_through(client: "SwarmClient", version: VersionId, files: Sequence[Path]) -> Shares:
    """By sessions of a token each. Raises the same, and Unreachable."""
    from p2pmodel.node.asking.client import Sampling  # loads hivemind, which shares that are computed here do without

    def of(file: Path) -> Tensor:
        ids = _ids(client.tokenizer, file)
        step = max(ASKED_TOKENS, len(ids) // ASKED_EXCERPTS)
        found = []
        for at in range(0, len(ids) - LEAD + 1, step)[:ASKED_EXCERPTS]:
            prompt = str(client.tokenizer.decode(ids[at : at + ASKED_TOKENS]))
            answer = client.generate(prompt, Sampling(1), version, DEFAULT_CODEC, lambda _: None)
            if answer.experts:
                found.append([share for _, share in answer.experts])
        if not found:
            raise _too_short(file)
        return torch.tensor(found).mean(0)

    return _shares(_names(client.lineage, version), files, of)


def _names(lineage: Lineage, version: VersionId) -> tuple[str, ...]:
    names = tuple(expert.name for expert in lineage.experts(version))
    if not names:
        raise InvalidInput(
            f"{lineage.manifest.name} {lineage.number(version)} has no experts.",
            "Train one: p2pmodel train --kind expert",
        )
    return (*names, NONE)


def _shares(names: tuple[str, ...], files: Sequence[Path], of: Callable[[Path], Tensor]) -> Shares:
    """of: of a text, [E + 1]."""
    return Shares(names, tuple((file.name, tuple(of(file).tolist())) for file in files))


def _ids(tokenizer: PreTrainedTokenizerBase, file: Path) -> list[int]:
    text = "\n".join(text.text for text in read_texts([file]))
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < LEAD:
        raise _too_short(file)
    return ids


def _too_short(file: Path) -> InvalidInput:
    return InvalidInput(f"{file} is too short: the routers look at {LEAD} tokens.")


@torch.inference_mode()
def _mean_shares(model: PreTrainedModel, routers: Applier, excerpts: Tensor) -> Tensor:
    """[E + 1]."""
    model(input_ids=excerpts.to(model.device), use_cache=False)
    assert routers.latest is not None
    return torch.stack(list(routers.latest.shares.values())).mean((0, 1)).cpu()
