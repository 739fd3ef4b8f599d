"""What a host of experts says of itself."""

from pathlib import Path

import pytest

from p2pmodel.domain.errors import UsageError
from p2pmodel.domain.swarm import Span
from p2pmodel.engine.checkpoint import read_checkpoint
from p2pmodel.logic.experts import hosts_of
from p2pmodel.node.hosting.expert_hosting import ExpertHosting
from p2pmodel.node.machine.device import SCHEMES, Device
from p2pmodel.node.node import NodeOptions, run
from tests.support.experts import save_experts
from tests.support.lineages import begin
from tests.support.swarm import swarm


async def test_a_lease_is_of_layers_that_have_experts(tmp_path: Path) -> None:
    """The family's first layer has none."""
    save_experts("deepseek_v3", tmp_path / "model")
    checkpoint, lineage = read_checkpoint(tmp_path / "model"), begin(tmp_path / "home")
    (tmp_path / "keys").mkdir()
    async with swarm(tmp_path / "keys", 1) as [(_, host)]:
        everything = Span(0, checkpoint.layers)
        hosting = await ExpertHosting.start(host, lineage, checkpoint, everything, (0, 1), Device())
        try:
            lease = hosting.lease(host.peer)
        finally:
            await hosting.stop()
    assert lease.span == Span(1, checkpoint.layers)
    assert hosts_of([lease], checkpoint.layers) == (1, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_experts_are_not_said_to_be_held_in_bits_that_they_are_not_held_in(scheme: str, tmp_path: Path) -> None:
    options = NodeOptions(home=tmp_path / "home", experts=(0, 1), dtype=scheme)
    with pytest.raises(UsageError, match=f"can't be held in {scheme}"):
        await run(options, lambda _: None)
    assert not (tmp_path / "home").exists()
