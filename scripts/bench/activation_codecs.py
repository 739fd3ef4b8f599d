#!/usr/bin/env python
"""What an activation codec costs: in bytes, in time, and in what the model still knows.

    python scripts/bench/activation_codecs.py [--width 768] [--tokens 256] [--repeat 200] [--json]

Errors and perplexity are those of the starter model on its exam's texts, in three stages of two layers, the codec at
all four boundaries: into each stage, and back to the client. "outliers" is the same states with 3 channels times 60,
and the error on the other channels alone. fp32 is the baseline, in the same run. Times are medians over states of
`width`, on one thread, codecs in turn; encoding's and decoding's rates count the bytes of float32.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from p2pmodel import starter
from p2pmodel.domain.swarm import Span
from p2pmodel.engine.checkpoint import load_whole, read_checkpoint
from p2pmodel.engine.exams import Suite
from p2pmodel.engine.stage import load_stage
from p2pmodel.tensors.codecs import CODECS, DEFAULT_CODEC, Codec

STAGES = (Span(0, 2), Span(2, 4), Span(4, 6))
RECORDED_TEXTS = 12
OUTLIERS = (5, 77, 200)
FACTOR = 60.0
GAUGES = ("encode_gb_s", "decode_gb_s", "encode_us", "decode_us")


@dataclass(frozen=True)
class Figures:
    codec: str
    bytes_a_token: int
    bytes_a_number: float
    error: float
    error_outliers: float
    error_beside_outliers: float
    perplexity: float
    perplexity_ratio: float
    encode_gb_s: float
    decode_gb_s: float
    encode_us: float
    decode_us: float


def passed(codec: Codec, hidden: Tensor) -> Tensor:
    """[1, T, H] there and back, in float32."""
    return codec.decode(codec.encode(hidden), *hidden.shape[1:]).float()


class Chain:
    """The starter model in stages, in this process."""

    def __init__(self) -> None:
        checkpoint = read_checkpoint(starter.MODEL)
        self._whole = load_whole(starter.MODEL)
        self._norm, self._head = (self._whole.get_submodule(name) for name in ("model.norm", "lm_head"))
        self._stages = [load_stage(checkpoint, span) for span in STAGES]
        tokenizer = AutoTokenizer.from_pretrained(starter.MODEL)
        texts = [text for domain in Suite.load(starter.EXAM).domains for text in (*domain.test, *domain.tune)]
        self._texts = [torch.tensor([tokenizer(text).input_ids]) for text in texts]

    @torch.inference_mode()
    def perplexity(self, codec: Codec) -> float:
        nats, count = 0.0, 0
        for ids in self._texts:
            hidden = self._boundaries(ids, codec)[-1]
            logits = self._head(self._norm(hidden))
            nats += cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
        return math.exp(nats / count)

    @torch.inference_mode()
    def states(self) -> list[Tensor]:
        """By boundary [1, T, H]: of some texts, one after the other."""
        recorded = [self._boundaries(ids, CODECS["fp32"]) for ids in self._texts[:: len(self._texts) // RECORDED_TEXTS]]
        return [torch.cat(texts, dim=1) for texts in zip(*recorded, strict=True)]

    def _boundaries(self, ids: Tensor, codec: Codec) -> list[Tensor]:
        """The states as they arrive."""
        arrived = [passed(codec, self._whole.get_input_embeddings()(ids))]
        for stage in self._stages:
            arrived.append(passed(codec, stage.forward(arrived[-1], None, stage.span)))
        return arrived


def relative(codec: Codec, states: list[Tensor], channels: Tensor) -> float:
    """The error's norm over the states', on these channels: the mean over the boundaries."""
    ratios = []
    for hidden in states:
        error = (passed(codec, hidden) - hidden)[..., channels]
        ratios.append((error.norm() / hidden[..., channels].norm()).item())
    return statistics.fmean(ratios)


def timed(cases: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median seconds. Cases run in turns; the first tenth of the turns counts for nothing."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeat + repeat // 10):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            if turn >= repeat // 10:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.inference_mode()
def speeds(width: int, tokens: int, repeat: int) -> dict[str, tuple[float, float, float, float]]:
    """By codec, GAUGES."""
    generator = torch.Generator().manual_seed(0)
    many, one = (torch.randn(1, count, width, generator=generator) for count in (tokens, 1))
    found = {name: (0.0, 0.0, 0.0, 0.0) for name in CODECS}
    results = []
    for hidden, turns in ((many, repeat), (one, repeat * 10)):
        cases: dict[str, Callable[[], object]] = {}
        for name, codec in CODECS.items():
            body = codec.encode(hidden)
            cases[f"encode {name}"] = lambda codec=codec, hidden=hidden: codec.encode(hidden)  # type: ignore[misc]
            cases[f"decode {name}"] = (
                lambda codec=codec, body=body, hidden=hidden: codec.decode(  # type: ignore[misc]
                    body, *hidden.shape[1:]
                )
            )
        results.append(timed(cases, turns))
    size = tokens * width * 4 / 1e9
    for name in CODECS:
        encode, decode = f"encode {name}", f"decode {name}"
        rates = size / results[0][encode], size / results[0][decode]
        found[name] = (*rates, results[1][encode] * 1e6, results[1][decode] * 1e6)
    return found


def measure(width: int, tokens: int, repeat: int) -> list[Figures]:
    torch.set_num_threads(1)
    chain = Chain()
    states = chain.states()
    rough = [hidden.index_fill(2, torch.tensor(OUTLIERS), 0.0) for hidden in states]
    rough = [FACTOR * (hidden - calm) + calm for hidden, calm in zip(states, rough, strict=True)]
    everywhere = torch.arange(states[0].shape[2])
    beside = torch.tensor([channel for channel in everywhere.tolist() if channel not in OUTLIERS])
    speed = speeds(width, tokens, repeat)
    figures: list[Figures] = []
    for name, codec in CODECS.items():
        perplexity = chain.perplexity(codec)
        figures.append(
            Figures(
                name,
                codec.size(1, width),
                codec.size(1, width) / width,
                relative(codec, states, everywhere),
                relative(codec, rough, everywhere),
                relative(codec, rough, beside),
                perplexity,
                perplexity / (figures[0].perplexity if figures else perplexity),
                *speed[name],
            )
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    figures = measure(args.width, args.tokens, args.repeat)
    if args.json:
        print(json.dumps([asdict(f) for f in figures], indent=2))
        return
    print(f"bytes, times at width {args.width}; rates with {args.tokens} tokens, µs with one; default {DEFAULT_CODEC}")
    print(
        "| codec | bytes a token and hop | a number | error | outliers | beside them | perplexity | to fp32 |", end=""
    )
    print(" encode GB/s | decode GB/s | encode µs | decode µs |")
    print("|" + "---|" * 12)
    for f in figures:
        print(
            f"| {f.codec} | {f.bytes_a_token} | {f.bytes_a_number:.3f} | {f.error:.4f} | {f.error_outliers:.4f} | "
            f"{f.error_beside_outliers:.4f} | {f.perplexity:.4f} | {f.perplexity_ratio:.5f} | {f.encode_gb_s:.2f} | "
            f"{f.decode_gb_s:.2f} | {f.encode_us:.0f} | {f.decode_us:.0f} |"
        )


if __name__ == "__main__":
    main()
