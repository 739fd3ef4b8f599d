"""What experts on other peers cost a token, against the same layers with their experts in one process.

    python scripts/bench/expert_hosts.py [--hosts 1 2 4] [--turns 5] [--tokens 48] [--codec fp32]

The layers of a random Qwen3-MoE in fp32 compute one token after another in this process: with their experts, and as a
trunk whose experts are on 1 to 4 real nodes, each with its share of them, one thread each. The two take turns, and have
to agree. The least possible is that each row goes once to every peer that has one of its experts, and comes back once.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measuring import START_SECONDS, heading, row
from torch import Tensor
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from p2pmodel import starter
from p2pmodel.cli.localswarm import LocalSwarm
from p2pmodel.domain.experts import ExpertLease, ExpertOpening
from p2pmodel.domain.ids import ModelId
from p2pmodel.domain.swarm import Span
from p2pmodel.engine.checkpoint import Checkpoint, read_checkpoint
from p2pmodel.engine.remote_experts import ForwardContext
from p2pmodel.engine.stage import Stage, load_stage
from p2pmodel.node.hosting.dispatching import Dispatcher
from p2pmodel.swarm.directory import Directory
from p2pmodel.swarm.expert_link import ExpertLink
from p2pmodel.swarm.host import PeerHost

LAYERS, EXPERTS, CHOSEN, WIDTH = 6, 8, 2, 512
PROMPT_TOKENS = 8


@dataclass(frozen=True)
class Result:
    """Milliseconds are of one token through all layers, but for layer_ms: what a remote layer adds. rows, bytes: sent
    and received over all tokens, as a multiple of the least possible; gap: the largest relative difference."""

    hosts: int
    local_ms: float
    remote_ms: float
    ratio: float
    layer_ms: float
    rows: float
    bytes: float
    gap: float


class Counting:
    """Remote experts that note the least number of rows that the experts' places allow."""

    def __init__(self, dispatcher: Dispatcher, owners: list[int]) -> None:
        self._dispatcher, self._owners = dispatcher, torch.tensor(owners)
        self.rows = 0

    def sums(
        self,
        layer: int,
        rows: Tensor,
        experts: Tensor,
        gates: Tensor,
        context: ForwardContext,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Tensor:
        self.rows += sum(len(set(peers)) for peers in self._owners[experts].tolist())
        return self._dispatcher.sums(layer, rows, experts, gates, context, meanwhile)

    def gradients(
        self, layer: int, rows: Tensor, experts: Tensor, gates: Tensor, outer: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        return self._dispatcher.gradients(layer, rows, experts, gates, outer, context)


def random_model(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(starter.MODEL)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, moe_intermediate_size=768, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4, num_experts=EXPERTS, num_experts_per_tok=CHOSEN,
        decoder_sparse_step=1, mlp_only_layers=[], max_position_embeddings=512, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config.head_dim = 64
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def decode(stage: Stage, states: Tensor) -> tuple[list[float], Tensor]:
    """Seconds of each token after the prompt, and the outputs [T, H]."""
    cache = stage.new_cache(stage.span, states.shape[1])
    seconds, outputs = [], []
    with torch.inference_mode():
        stage.forward(states[:, :PROMPT_TOKENS], cache, stage.span)
        for at in range(PROMPT_TOKENS, states.shape[1]):
            began = time.perf_counter()
            outputs.append(stage.forward(states[:, at : at + 1], cache, stage.span)[0])
            seconds.append(time.perf_counter() - began)
    return seconds, torch.cat(outputs)


@asynccontextmanager
async def connected(folder: Path, model: Path, hosts: int, codec: str) -> AsyncIterator[tuple[Dispatcher, list[int]]]:
    """The dispatcher, and which host has each expert."""
    cuts = [EXPERTS * number // hosts for number in range(hosts + 1)]
    with LocalSwarm(folder) as swarm:
        first = swarm.start("first", "--model", str(model), "--layers", "none")
        await asyncio.to_thread(first.wait_until_serving, time.monotonic() + START_SECONDS)
        place = ("--model", str(model), "--base", str(model), "--threads", "1", "--peers", first.address)
        for number in range(hosts):
            swarm.start(f"host-{number}", *place, "--experts", f"{cuts[number]}-{cuts[number + 1] - 1}")
        await asyncio.to_thread(swarm.wait_until_serving, START_SECONDS)
        with first.control() as control:
            lineage = ModelId(control.status().models[0].id)
        host = await PeerHost.start(None, bootstrap=(first.address,))
        try:
            directory = Directory(host, lineage)
            leases: list[ExpertLease] = []
            while len(leases) < hosts:
                leases = await directory.expert_leases()
            addresses = {presence.peer: presence.addresses for presence in await directory.presences()}
            dispatcher = Dispatcher(lineage, codec, spread=False, failed=lambda peer: print(f"{peer} failed"))
            owners = [0] * EXPERTS
            for number, lease in enumerate(leases):
                await host.connect(lease.peer, addresses[lease.peer])
                opening = ExpertOpening(lineage, codec)
                dispatcher.add(await asyncio.to_thread(ExpertLink.open, host, lease.peer, opening), lease)
                for expert in lease.experts:
                    owners[expert] = number
            yield dispatcher, owners
            dispatcher.close()
        finally:
            await host.stop()


async def measure(checkpoint: Checkpoint, hosts: int, asked: argparse.Namespace) -> Result:
    span = Span(0, checkpoint.layers)
    whole, trunk = load_stage(checkpoint, span), load_stage(checkpoint, span, trunk=True)
    states = torch.randn(1, PROMPT_TOKENS + asked.tokens, WIDTH, generator=torch.Generator().manual_seed(0))
    here: list[float] = []
    there: list[float] = []
    gap = 0.0
    with tempfile.TemporaryDirectory() as folder:
        async with connected(Path(folder), checkpoint.path, hosts, asked.codec) as (dispatcher, owners):
            counting = trunk.board.remote = Counting(dispatcher, owners)
            for turn in range(asked.turns + 1):
                local, expected = await asyncio.to_thread(decode, whole, states)
                remote, found = await asyncio.to_thread(decode, trunk, states)
                gap = max(gap, float((found - expected).abs().max() / expected.abs().max()))
                if turn:  # the first one warms the page cache
                    here += local
                    there += remote
            stats, least = dispatcher.stats, counting.rows
            least_bytes = 2 * least * dispatcher.codec.size(1, WIDTH)
    ours, theirs = (1e3 * statistics.median(seconds) for seconds in (there, here))
    return Result(
        hosts=hosts,
        local_ms=theirs,
        remote_ms=ours,
        ratio=ours / theirs,
        layer_ms=(ours - theirs) / LAYERS,
        rows=stats.rows / least,
        bytes=(stats.bytes_out + stats.bytes_in) / least_bytes,
        gap=gap,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--codec", default="fp32")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = read_checkpoint(random_model(Path(folder)))
        results = [asyncio.run(measure(checkpoint, hosts, asked)) for hosts in asked.hosts]
    if asked.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
        return
    heading("hosts", "local ms", "remote ms", "ratio", "ms/layer", "rows × least", "bytes × least", "gap")
    for result in results:
        row(*asdict(result).values())


if __name__ == "__main__":
    main()
