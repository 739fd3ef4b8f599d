"""What the benchmarks of inference share: a random model, local swarms, and the figures of runs that take turns."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from p2pmodel import starter
from p2pmodel.cli.localswarm import LocalSwarm, NodeProcess
from p2pmodel.cli.rehearsal import split_layers

HEADS, KV_HEADS = 12, 4
START_SECONDS = 240.0


@dataclass(frozen=True)
class Shape:
    """Of the random Llama; the default has 88 million parameters."""

    hidden: int = 768
    layers: int = 12
    vocabulary: int = 8000


def random_llama(folder: Path, shape: Shape) -> Path:
    """A random fp32 checkpoint, with the starter's tokenizer; it never ends an answer by itself."""
    tokenizer = AutoTokenizer.from_pretrained(starter.MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompt_ids(tokens: int = 8) -> Tensor:
    """[1, tokens]."""
    return torch.randint(10, 1000, (1, tokens), generator=torch.Generator().manual_seed(1))


class Stopwatch(BaseStreamer):
    """Times between the tokens of one answer, without the first, which has waited for the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        return None

    @property
    def seconds(self) -> list[float]:
        came = self.times[2:]  # the prompt, and the first token, are put too
        return [b - a for a, b in zip(self.times[1:], came, strict=False)]


def greedy(model: Any, ids: Tensor, tokens: int, **options: Any) -> tuple[Tensor, Stopwatch]:
    """The new tokens [tokens], and their times."""
    watch = Stopwatch()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        streamer=watch,
        **options,
    )
    return out[0, ids.shape[1] :], watch


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system, of the processes and of their children, threads that live included, to the nanosecond."""
    total = 0
    for process in [member for pid in pids for member in family(pid)]:
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


@dataclass
class Series:
    """Token times in seconds of runs that alternated with those of others; CPU seconds and tokens of all of them."""

    seconds: list[float] = field(default_factory=list)
    cpu: float = 0.0
    tokens: int = 0

    def add(self, seconds: Sequence[float], cpu: float, tokens: int) -> None:
        self.seconds += seconds
        self.cpu += cpu
        self.tokens += tokens

    @property
    def p50(self) -> float:
        """Milliseconds a token."""
        return 1e3 * statistics.median(self.seconds)

    @property
    def p10(self) -> float:
        return 1e3 * statistics.quantiles(self.seconds, n=10)[0]

    @property
    def cpu_ms(self) -> float:
        return 1e3 * self.cpu / self.tokens


def take_turns(cases: Mapping[str, Callable[[], tuple[Sequence[float], float, int]]], turns: int) -> dict[str, Series]:
    """Every case gives token times, CPU seconds and tokens of one run. The first turn warms up and is not counted."""
    series = {name: Series() for name in cases}
    for turn in range(turns + 1):
        for name, run in cases.items():
            (series[name] if turn else Series()).add(*run())
    return series


@contextmanager
def hosts(folder: Path, checkpoint: Path, layers: int, stages: int) -> Iterator[tuple[LocalSwarm, NodeProcess]]:
    """A swarm whose `stages` nodes share the layers, one thread each; and the first of them."""
    with LocalSwarm(folder) as swarm:
        first: NodeProcess | None = None
        for index, span in enumerate(split_layers(layers, stages)):
            peers = ("--peers", first.address) if first else ()
            model = ("--model", str(checkpoint), "--base", str(checkpoint))
            node = swarm.start(f"host-{index}", *model, "--layers", str(span), "--threads", "1", *peers)
            node.wait_until_serving(time.monotonic() + START_SECONDS)
            first = first or node
        assert first is not None
        yield swarm, first


def heading(*names: str) -> None:
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names), flush=True)


def row(*cells: object) -> None:
    texts = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
    print("| " + " | ".join(texts) + " |", flush=True)
