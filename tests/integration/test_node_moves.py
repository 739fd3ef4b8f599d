"""A node that chose its layers itself goes where it is needed, and those that it serves do not notice."""

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from p2pmodel.cli.localswarm import LocalSwarm, NodeProcess
from p2pmodel.domain.errors import P2PModelError
from p2pmodel.domain.ids import ModelId, PeerId, VersionId
from p2pmodel.domain.swarm import LEASE_SECONDS, Hop, Route, SessionRequest, Span
from p2pmodel.engine.checkpoint import read_checkpoint
from p2pmodel.engine.stage import load_stage
from p2pmodel.node.asking.client import Sampling, SwarmClient
from p2pmodel.starter import MODEL
from p2pmodel.swarm.chain_client import ChainClient
from p2pmodel.swarm.host import PeerHost
from p2pmodel.tensors.codecs import get_codec

pytestmark = pytest.mark.timeout(300)
PROMPT = "def read_lines(path):\n    "
LOW, HIGH = Span(0, 3), Span(3, 6)
TOKENS = 8


def hosted(node: NodeProcess) -> Span:
    with node.control() as control:
        span = control.status().models[0].hosted
        return Span(span.start, span.end)


def identity(node: NodeProcess) -> tuple[PeerId, ModelId]:
    with node.control() as control:
        status = control.status()
        return PeerId(status.peer), ModelId(status.models[0].id)


def wait_for(what: Callable[[], bool], seconds: float) -> None:
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while True:
        try:
            if what():
                return
        except P2PModelError:
            pass  # a node that is busy loading answers later
        assert time.monotonic() < deadline
        pause.wait(0.5)


@asynccontextmanager
async def chain_client(address: str) -> AsyncIterator[ChainClient]:
    host = await PeerHost.start(None, bootstrap=[address], client_only=True)
    client = ChainClient(host)
    await asyncio.to_thread(client.start)
    yield client
    await asyncio.to_thread(client.stop)
    await host.stop()


async def test_a_node_takes_the_place_of_one_that_died_and_its_sessions_go_on(tmp_path: Path) -> None:
    with LocalSwarm(tmp_path) as swarm:
        low = swarm.start("low", "--layers", str(LOW), "--threads", "1")
        await asyncio.to_thread(swarm.wait_until_serving)
        high = swarm.start("high", "--layers", str(HIGH), "--threads", "1", "--peers", low.address)
        await asyncio.to_thread(swarm.wait_until_serving)
        auto = swarm.start("auto", "--capacity", "3", "--threads", "1", "--peers", low.address)
        await asyncio.to_thread(swarm.wait_until_serving)
        at_first = await asyncio.to_thread(hosted, auto)
        stays, dies, needed = (low, high, HIGH) if at_first == LOW else (high, low, LOW)
        peer, model = await asyncio.to_thread(identity, auto)

        stage, codec = load_stage(read_checkpoint(MODEL), at_first), get_codec("fp32")
        hidden = torch.randn(1, TOKENS, stage.width, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            expected = stage.forward(hidden, stage.new_cache(at_first, TOKENS), at_first)

        async with chain_client(auto.address) as chain:
            route = Route((Hop(peer, at_first),))
            session = await asyncio.to_thread(chain.open, route, request_to(model, at_first))
            await asyncio.to_thread(session.step, codec.encode(hidden[:, :-1]), 0, TOKENS - 1)
            addresses = (stays.address, auto.address)
            client = await asyncio.to_thread(SwarmClient.connect, tmp_path / "client", addresses, None, None)
            with client:
                before = await asyncio.to_thread(ask, client)
                dies.kill()
                await asyncio.to_thread(wait_for, lambda: hosted(auto) == needed, 2.5 * LEASE_SECONDS)
                after = await asyncio.to_thread(ask, client)
            _, body = await asyncio.to_thread(session.step, codec.encode(hidden[:, -1:]), TOKENS - 1, 1)
            await asyncio.to_thread(session.close)
            with pytest.raises(P2PModelError, match=f"serves layers {needed}, not {at_first}"):
                await asyncio.to_thread(chain.open, route, request_to(model, at_first))
        torch.testing.assert_close(codec.decode(body, 1, stage.width), expected[:, -1:], atol=1e-4, rtol=1e-4)
        assert after == before
        assert f"moving from layers {at_first} to layers {needed}: layers {needed} are served by nobody" in auto.lines


def request_to(model: ModelId, span: Span) -> SessionRequest:
    return SessionRequest(secrets.token_hex(16), model, VersionId(model), "fp32", span, TOKENS)


def ask(client: SwarmClient) -> str:
    return client.generate(PROMPT, Sampling(20), "head", "fp32", lambda _: None).text
