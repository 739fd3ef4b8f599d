"""What inference through the swarm costs, against the same model in plain transformers in the same run.

    python scripts/bench/inference.py --section hops|sessions|start|wan [--section …] [--turns 5] [--tokens 48]

hops: a token through 1, 2 and 3 stages, against generate() in this process. sessions: several at once on one stage,
against one alone. start: a node until it serves, against importing what it is made of; its processes and memory. wan:
3 stages over an emulated wide-area network, against what its delays alone allow (needs root).

Stages are real nodes with one thread each; all but `wan` use a random Llama of 88 million parameters in fp32. What is
compared takes turns, so that what else the machine does falls on all alike. Greedy, and the tokens have to be the same.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import psutil
import torch
import wan
from measuring import Shape, cpu_seconds, greedy, heading, hosts, prompt_ids, random_llama, row, take_turns
from startup import measure as measure_starts
from startup import run_python
from torch import Tensor

from p2pmodel import starter
from p2pmodel.cli.localswarm import LocalSwarm
from p2pmodel.cli.rehearsal import split_layers
from p2pmodel.engine.checkpoint import load_whole
from p2pmodel.engine.head import load_head
from p2pmodel.engine.steps import NOTHING
from p2pmodel.node.asking.client import Answer, Sampling, SwarmClient
from p2pmodel.node.asking.inference import RoutedChain

SESSIONS = (1, 2, 8)
PROMPT_TOKENS = 8
CODECS = ("fp32", "fp16", "int8", "h4")
WAN_STAGES = 3
WAN_DELAY, WAN_RATE = 0.05, 20e6
WAN_PROMPT = "def read_lines(path):\n    "
FAMILY = "import torch, hivemind, transformers.models.llama.modeling_llama"

Run = Callable[[], tuple[Sequence[float], float, int]]


def remote(client: SwarmClient, codec: str = "fp32") -> Any:
    """The family's CausalLM over the swarm."""
    return load_head(client.checkpoint, client.chain(client.lineage.find_version("head"), codec))


def timed(model: Any, ids: Tensor, expected: Tensor, cpu: Callable[[], float]) -> tuple[Sequence[float], float, int]:
    used = cpu()
    tokens, watch = greedy(model, ids, len(expected))
    assert torch.equal(tokens, expected), "the swarm and the local model disagree"
    return watch.seconds, cpu() - used, len(tokens)


def hops(checkpoint: Path, shape: Shape, asked: argparse.Namespace) -> None:
    print("\n## Hops: milliseconds a token; overhead is what a token costs more than locally, per hop\n")
    heading(
        "stages", "local p50", "p10", "swarm p50", "p10", "share of local speed",
        "overhead/hop p50", "p10", "local CPU", "all CPU", "overhead/hop CPU",
    )  # fmt: skip
    local, ids = load_whole(checkpoint).train(False), prompt_ids()
    expected, _ = greedy(local, ids, asked.tokens)
    for stages in asked.stages:
        with (
            tempfile.TemporaryDirectory() as folder,
            hosts(Path(folder), checkpoint, shape.layers, stages) as (_, first),
            SwarmClient.connect(Path(folder) / "client", (first.address,), str(checkpoint), checkpoint) as client,
        ):
            everybody = partial(cpu_seconds, [os.getpid()])
            cases: dict[str, Run] = {
                "local": partial(timed, local, ids, expected, time.process_time),
                "swarm": partial(timed, remote(client), ids, expected, everybody),
            }
            found = take_turns(cases, asked.turns)
        here, there = found["local"], found["swarm"]
        row(
            stages, here.p50, here.p10, there.p50, there.p10, here.p50 / there.p50,
            (there.p50 - here.p50) / stages, (there.p10 - here.p10) / stages,
            here.cpu_ms, there.cpu_ms, (there.cpu_ms - here.cpu_ms) / stages,
        )  # fmt: skip


def stream(chain: RoutedChain, states: Tensor) -> Tensor:
    """[1, T, H] through one session, a token at a time after a prompt: what the stage answered."""
    session = chain.open(states.shape[1], 1, False)
    try:
        session.forward(states[:, :PROMPT_TOKENS], 0, NOTHING)
        parts = range(PROMPT_TOKENS, states.shape[1])
        return torch.cat([session.forward(states[:, at : at + 1], at, NOTHING) for at in parts], dim=1)
    finally:
        session.close()


def sessions(checkpoint: Path, shape: Shape, asked: argparse.Namespace) -> None:
    print("\n## Sessions at once on one stage, of clients without heads; CPU milliseconds a token are the node's\n")
    heading("sessions", "tokens/s", "× one", "CPU ms/token", "× one", "CPU × one session's")
    states = torch.randn(1, PROMPT_TOKENS + asked.tokens, shape.hidden, generator=torch.Generator().manual_seed(0))
    with (
        tempfile.TemporaryDirectory() as folder,
        hosts(Path(folder), checkpoint, shape.layers, 1) as (_, first),
        SwarmClient.connect(Path(folder) / "client", (first.address,), str(checkpoint), checkpoint) as client,
        ThreadPoolExecutor(max(SESSIONS)) as pool,
    ):
        chains = [client.chain(client.lineage.find_version("head"), "fp32") for _ in range(max(SESSIONS))]
        expected = stream(chains[0], states)
        rates: dict[int, list[float]] = {count: [] for count in SESSIONS}
        costs: dict[int, list[float]] = {count: [] for count in SESSIONS}
        for turn in range(asked.turns + 1):
            for count in SESSIONS:
                began, used = time.perf_counter(), cpu_seconds([first.process.pid])
                answers = list(pool.map(lambda chain: stream(chain, states), chains[:count]))
                took, spent = time.perf_counter() - began, cpu_seconds([first.process.pid]) - used
                assert all(torch.allclose(answer, expected, atol=1e-3) for answer in answers), "a batch is wrong"
                if turn:
                    rates[count].append(count * asked.tokens / took)
                    costs[count].append(1e3 * spent / (count * asked.tokens))
        one_rate, one_cost = statistics.median(rates[1]), statistics.median(costs[1])
        for count in SESSIONS:
            rate, cost = statistics.median(rates[count]), statistics.median(costs[count])
            row(count, rate, rate / one_rate, cost, cost / one_cost, count * cost / one_cost)


def start(checkpoint: Path, shape: Shape, asked: argparse.Namespace) -> None:
    print("\n## Start of a node that hosts everything, and what it takes\n")
    found = measure_starts(
        {FAMILY: lambda: run_python("-c", FAMILY), "node, until it serves": partial(start_once, checkpoint, shape)},
        max(1, asked.turns // 2),
    )
    heading("", "wall s", "CPU s", "× wall", "× CPU")
    wall, cpu = found[FAMILY]
    for name, (its_wall, its_cpu) in found.items():
        row(name, its_wall, its_cpu, its_wall / wall, its_cpu / cpu)
    with tempfile.TemporaryDirectory() as folder, hosts(Path(folder), checkpoint, shape.layers, 1) as (_, first):
        print()
        heading("process", "PSS MB", "of it anonymous MB", "threads")
        members = measuring.family(first.process.pid)
        total = 0.0
        for member in members:
            pss, anonymous = memory(member.pid)
            total += pss
            row(Path(member.name()).name, pss, anonymous, member.num_threads())
        weights = hosted_megabytes(checkpoint)
        print(f"\n{len(members)} processes, {total:.0f} MB PSS, {total - weights:.0f} over {weights:.0f} of weights")


def start_once(checkpoint: Path, shape: Shape) -> tuple[float, float]:
    """Wall and CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with hosts(Path(folder), checkpoint, shape.layers, 1) as (_, first):
            return time.perf_counter() - began, cpu_seconds([first.process.pid])


def memory(pid: int) -> tuple[float, float]:
    """PSS in megabytes, and how much of it is anonymous."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines[1:])
    return tuple(int(fields[name].split()[0]) * 1024 / 1e6 for name in ("Pss", "Pss_Anon"))  # type: ignore[return-value]


def hosted_megabytes(checkpoint: Path) -> float:
    """Of the layers: embeddings and head stay with the clients."""
    model = load_whole(checkpoint)
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if ".layers." in name) / 1e6


def wide_area(asked: argparse.Namespace) -> None:
    links = WAN_STAGES + 1
    print(
        f"\n## Wide area: starter model, {WAN_STAGES} stages, {1e3 * WAN_DELAY:.0f} ms each way, "
        f"{WAN_RATE / 1e6:.0f} Mbit/s; the bound is {links} links a token\n"
    )
    if reason := wan.missing():
        print(f"skipped: {reason}")
        return
    heading("way", "tokens/s", "share of the bound", "bytes/token of the client")
    bound = 1 / (links * WAN_DELAY)
    row("bound", bound, 1.0, 0)
    with (
        tempfile.TemporaryDirectory() as folder,
        wan.Network(WAN_STAGES + 1, WAN_DELAY, WAN_RATE) as network,
        LocalSwarm(Path(folder)) as swarm,
    ):
        first = None
        for index, span in enumerate(split_layers(load_whole(starter.MODEL).config.num_hidden_layers, WAN_STAGES)):
            peers = ("--peers", first.address) if first else ()
            place = ("--layers", str(span), "--threads", "1", "--host", network.address(index))
            with network.inside(index):
                node = swarm.start(f"host-{index}", *place, *peers)
            node.wait_until_serving(time.monotonic() + measuring.START_SECONDS)
            first = first or node
        assert first is not None
        with (
            network.inside(WAN_STAGES),
            SwarmClient.connect(Path(folder) / "client", (first.address,), None, None) as client,
        ):
            ways: dict[str, tuple[str, str | None]] = {codec: (codec, None) for codec in CODECS}
            if (starter.DRAFT / "config.json").is_file():
                ways["fp32, speculation"] = ("fp32", str(starter.DRAFT))
            for name, (codec, draft) in ways.items():
                sampling = Sampling(asked.tokens, draft=draft)
                answers = [
                    client.generate(WAN_PROMPT, sampling, "head", codec, lambda _: None) for _ in range(asked.turns)
                ]
                rate = statistics.median(answer.tokens / answer.seconds for answer in answers)
                row(name, rate, rate / bound, client_bytes(answers[-1]))


def client_bytes(answer: Answer) -> float:
    return (answer.bytes_sent + answer.bytes_received) / answer.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("hops", "sessions", "start", "wan")
    parser.add_argument("--section", choices=names, action="append", help="may be repeated; all without it")
    parser.add_argument("--turns", type=int, default=5, help="that count, of each case")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    shape = Shape(asked.hidden, asked.layers)
    sections = asked.section or names
    load = psutil.getloadavg()[0]
    print(f"{psutil.cpu_count()} cores, load {load:.1f} before, torch {torch.__version__}, one thread a process")
    local = [section for section in (hops, sessions, start) if section.__name__ in sections]
    if local:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = random_llama(Path(folder), shape)
            for section in local:
                section(checkpoint, shape, asked)
    if "wan" in sections:
        wide_area(asked)


if __name__ == "__main__":
    main()
