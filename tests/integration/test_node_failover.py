"""A node that dies in the middle of an answer costs a moment, not the answer."""

from pathlib import Path

import pytest

from p2pmodel.cli.localswarm import LocalSwarm
from p2pmodel.node.client import Sampling, SwarmClient

pytestmark = pytest.mark.timeout(240)
PROMPT = "def read_lines(path):\n    "
KILL_AT = 5


def test_the_answer_survives_the_death_of_a_host(tmp_path: Path) -> None:
    with LocalSwarm(tmp_path) as swarm:
        first = swarm.start("first", "--layers", "0:3", "--threads", "1")
        swarm.wait_until_serving()
        for name in ("one", "two"):
            swarm.start(name, "--layers", "3:6", "--threads", "1", "--peers", first.address)
        swarm.wait_until_serving()
        nodes = {}
        for node in swarm.nodes.values():
            with node.control() as control:
                nodes[control.status().peer] = node
        with SwarmClient.connect(tmp_path / "client", (first.address,), None, None) as client:
            undisturbed = client.generate(PROMPT, Sampling(40), "head", "fp32", lambda _: None)
            pieces: list[str] = []
            killed: list[str] = []

            def kill_the_last_hop(piece: str) -> None:
                pieces.append(piece)
                if len(pieces) == KILL_AT:
                    assert client.route is not None
                    killed.append(client.route.hops[-1].peer)
                    nodes[killed[0]].kill()

            answer = client.generate(PROMPT, Sampling(40), "head", "fp32", kill_the_last_hop)
        assert len(pieces) > KILL_AT
        assert answer.failovers == 1
        assert answer.route.hops[-1].peer not in killed
        assert answer.text == undisturbed.text == "".join(pieces)
