"""What the swarm's own routers choose for texts: for a machine that does not hold the model."""

from collections.abc import Sequence
from pathlib import Path

import torch

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.modular import NONE
from p2pmodel.engine.data import read_texts
from p2pmodel.node.asking.client import Sampling, SwarmClient
from p2pmodel.node.lineages.expert_shares import Shares
from p2pmodel.tensors.codecs import DEFAULT_CODEC
from p2pmodel.tensors.smear import LEAD

EXCERPTS = 16
EXCERPT_TOKENS = LEAD + 8
"""Text that is cut between tokens may have fewer of them when it is read again."""


def shares_through(client: SwarmClient, version: str, files: Sequence[Path]) -> Shares:
    """By sessions of a token each, on at most EXCERPTS excerpts of a file. Raises InvalidInput for a text that is too
    short, and for a version without experts; NotFound, Unreachable."""
    lineage = client.lineage
    wanted = lineage.find_version(version)
    names = (*(expert.name for expert in lineage.experts(wanted)), NONE)
    if len(names) == 1:
        raise InvalidInput(
            f"{lineage.manifest.name} {lineage.number(wanted)} has no experts.",
            "Train one: p2pmodel train --kind expert",
        )
    return Shares(names, tuple((file.name, _of_file(client, wanted, file)) for file in files))


def _of_file(client: SwarmClient, version: str, file: Path) -> tuple[float, ...]:
    text = "\n".join(text.text for text in read_texts([file]))
    ids = client.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = max(EXCERPT_TOKENS, len(ids) // EXCERPTS)
    excerpts = [ids[at : at + EXCERPT_TOKENS] for at in range(0, len(ids) - LEAD + 1, step)][:EXCERPTS]
    found = []
    for excerpt in excerpts:
        prompt = str(client.tokenizer.decode(excerpt))
        answer = client.generate(prompt, Sampling(1), version, DEFAULT_CODEC, lambda _: None)
        if answer.experts:
            found.append([share for _, share in answer.experts])
    if not found:
        raise InvalidInput(f"{file} is too short: the routers look at {LEAD} tokens.")
    return tuple(torch.tensor(found).mean(0).tolist())
