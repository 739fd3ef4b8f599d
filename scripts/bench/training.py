"""What training through the swarm costs, against the same training in one process in the same run.

    python scripts/bench/training.py --section swarm [--turns 3]

swarm: a step of (IA)³ training, forward and backward of 8 × 128 tokens, through 1 and 2 stages with one thread each,
against the whole model in this process with one thread and with as many as there are stages; the gradients have to be
the same. A random Llama of 88 million parameters in fp32. What is compared takes turns, so that what else the machine
does falls on all alike.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from measuring import Shape, cpu_seconds, heading, hosts, random_llama, row
from torch import Tensor

from p2pmodel.engine.checkpoint import load_whole
from p2pmodel.engine.evaluation import attached
from p2pmodel.engine.head import load_head, using_vectors
from p2pmodel.node.client import SwarmClient
from p2pmodel.tensors.kinds import get_kind

ROWS, TOKENS = 8, 128
TOLERANCE = 1e-5

Step = Callable[[], list[Tensor]]


def gradients(model: Any, using: Callable[[], Any], state: dict[str, Tensor], ids: Tensor) -> list[Tensor]:
    with using():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return list(torch.autograd.grad(loss, list(state.values())))


def with_threads(threads: int, step: Step) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return step()
    finally:
        torch.set_num_threads(before)


def swarm(checkpoint: Path, shape: Shape, asked: argparse.Namespace) -> None:
    print(f"\n## Training: a step of {ROWS} × {TOKENS} tokens; share is of the local tokens/s with as many threads\n")
    heading("stages", "codec", "local tokens/s", "threads", "swarm tokens/s", "share", "CPU × local", "MB/step")
    kind, ids = get_kind("ia3@1"), torch.randint(10, 1000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    whole = load_whole(checkpoint).requires_grad_(False)
    state = {n: t.clone().requires_grad_(True) for n, t in kind.initial(kind.find_slots(whole.base_model)).items()}
    with attached(whole, kind, state) as applier:
        local = partial(gradients, whole, partial(applier.use, state), state, ids)
        expected = local()
        for stages in asked.stages:
            with (
                tempfile.TemporaryDirectory() as folder,
                hosts(Path(folder), checkpoint, shape.layers, stages) as (_, first),
                SwarmClient.connect(Path(folder) / "client", (first.address,), str(checkpoint), checkpoint) as client,
            ):
                for codec in asked.codecs:
                    chain = client.chain(client.lineage.find_version("head"), codec)
                    model = load_head(client.checkpoint, chain).requires_grad_(False)
                    through = partial(gradients, model, partial(using_vectors, state), state, ids)
                    cases = {
                        "one": partial(with_threads, 1, local),
                        "same": partial(with_threads, stages, local),
                        "swarm": partial(with_threads, 1, through),
                    }
                    compare(cases, stages, codec, expected, chain, asked.turns)
                    chain.close()


def compare(cases: dict[str, Step], stages: int, codec: str, expected: list[Tensor], chain: Any, turns: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    traffic = 0
    for turn in range(turns + 1):
        for name, step in cases.items():
            session = chain.tape().session
            sent = session.bytes_sent + session.bytes_received if session else 0
            used, began = cpu_seconds([os.getpid()]), time.perf_counter()
            found = step()
            if turn:
                seconds[name].append(time.perf_counter() - began)
                cpu[name].append(cpu_seconds([os.getpid()]) - used)
            if name == "swarm":
                session = chain.tape().session
                traffic = session.bytes_sent + session.bytes_received - sent
                ours, theirs = torch.cat([g.flatten() for g in found]), torch.cat([g.flatten() for g in expected])
                error = float((ours - theirs).norm() / theirs.norm())
                assert codec != "fp32" or error < TOLERANCE, f"the gradients differ by {error:.1e}"
    rate = {name: ROWS * TOKENS / statistics.median(values) for name, values in seconds.items()}
    used_cpu = {name: statistics.median(values) for name, values in cpu.items()}
    for threads, name in ((1, "one"), (stages, "same")) if stages > 1 else ((1, "one"),):
        row(
            stages, codec, rate[name], threads, rate["swarm"], rate["swarm"] / rate[name],
            used_cpu["swarm"] / used_cpu[name], traffic / 1e6,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", choices=list(SECTIONS), default=None)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--codecs", nargs="+", default=["fp32", "int8"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    load = psutil.getloadavg()[0]
    print(f"{psutil.cpu_count()} cores, load {load:.1f} before, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_llama(Path(folder), Shape())
        for section in asked.section or list(SECTIONS):
            SECTIONS[section](checkpoint, Shape(), asked)


SECTIONS = {"swarm": swarm}

if __name__ == "__main__":
    main()
