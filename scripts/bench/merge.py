#!/usr/bin/env python
"""What a merge costs against reading the same bytes, and what Fishers of one byte a value change in it.

    python scripts/bench/merge.py [--patches 4 64 1000] [--layers 6 --hidden 128 --inner 512] [--repeat 5]
                                  [--strategy fisher]

Patches of (IA)³ vectors lie in files, an adapter and a Fisher each. "read" is numpy.fromfile of all of them; "merge" is
reading, checking (as what comes off the network is) and merging them. Both are the best of some runs,
taken in turn, with the files in the page cache. "error" is the relative error of the merged update against that of the
same Fishers in float32, which spread over six orders of magnitude.
"""

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from p2pmodel.domain.ids import Digest
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import blob, compact
from p2pmodel.tensors.changes import end_to_end
from p2pmodel.tensors.kinds import get_kind
from p2pmodel.tensors.merging import BUILT_IN, Contribution, get_strategy

LIMIT = 1 << 30


def slots_of(layers: int, hidden: int, inner: int) -> list[Slot]:
    """`hidden`: width of keys and values."""
    places = (
        ("in:layers.{}.mlp.down_proj", inner),
        ("out:layers.{}.self_attn.k_proj", hidden),
        ("out:layers.{}.self_attn.v_proj", hidden),
    )
    slots = [
        Slot(f"ia3:{place.format(layer)}", (width,), "float32") for layer in range(layers) for place, width in places
    ]
    return sorted(slots, key=lambda slot: slot.name)


def write(folder: Path, slots: list[Slot], patches: int) -> list[tuple[Digest, Path, Path]]:
    """(id, adapter, Fisher), sorted by id."""
    generator = torch.Generator().manual_seed(0)
    written = []
    for number in range(patches):
        adapter = {s.name: 1 + 0.1 * torch.randn(s.shape, generator=generator) for s in slots}
        fisher = fisher_of(slots, generator)
        files = folder / f"{number}.adapter", folder / f"{number}.fisher"
        for file, tensors in zip(files, (adapter, compact.encode(fisher)), strict=True):
            file.write_bytes(blob.pack(tensors))
        written.append((Digest(hashlib.sha256(str(number).encode()).hexdigest()), *files))
    return sorted(written)


def fisher_of(slots: list[Slot], generator: torch.Generator) -> dict[str, Tensor]:
    """Log-normal, as Fishers are: 99.7 % of the values within six orders of magnitude."""
    return {s.name: torch.exp(torch.randn(s.shape, generator=generator) * 2.3 - 23) for s in slots}


def error(slots: list[Slot], patches: int) -> float:
    """Of the merged update, relative, by Fishers that were encoded against the same in float32."""
    generator = torch.Generator().manual_seed(0)
    parent = {slot.name: torch.ones(slot.shape) for slot in slots}
    exact: list[Contribution] = []
    rounded: list[Contribution] = []
    for number in range(patches):
        name = Digest(hashlib.sha256(str(number).encode()).hexdigest())
        adapter = {s.name: 1 + 0.1 * torch.randn(s.shape, generator=generator) for s in slots}
        fisher = fisher_of(slots, generator)
        back = compact.Decoded(blob.pack(compact.encode(fisher)), end_to_end(fisher)[1], LIMIT)
        exact.append(Contribution(name, adapter, fisher, 1.0))
        rounded.append(Contribution(name, adapter, back, 1.0))
    merged = []
    for given in (exact, rounded):
        given.sort(key=lambda contribution: contribution.patch)
        update = get_strategy("fisher@1").combine(parent, given, {})
        merged.append(torch.cat([update[name].view(-1) for name in sorted(update)]))
    return float((merged[1] - merged[0]).norm() / merged[0].norm())


def measure(
    layers: int, hidden: int, inner: int, patches: int, repeat: int, strategy_name: str
) -> tuple[int, float, float, float]:
    """Bytes, and the best seconds of reading, of merging from files, and of merging from memory."""
    slots = slots_of(layers, hidden, inner)
    parent: dict[str, Tensor] = {slot.name: torch.ones(slot.shape) for slot in slots}
    strategy, kind = get_strategy(f"{strategy_name}@1"), get_kind("ia3@1")
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), slots, patches)

        def patches_of(raw: Callable[[Path], blob.Raw]) -> list[Contribution]:
            found = []
            for name, adapter, fisher in files:
                change = kind.read(raw(adapter), slots, LIMIT)
                masses = kind.read_fisher(change, raw(fisher), LIMIT)
                found.append(Contribution(name, change.values, masses, 1.0, change.relative))
            return found

        held = patches_of(Path.read_bytes)
        runs: list[Callable[[], object]] = [
            lambda: [np.fromfile(file, np.uint8) for _, *pair in files for file in pair],
            lambda: strategy.combine(parent, patches_of(blob.mapped), {}),
            lambda: strategy.combine(parent, held, {}),
        ]
        best = [float("inf")] * len(runs)
        for _ in range(repeat):
            for index, run in enumerate(runs):
                began = time.perf_counter()
                run()
                best[index] = min(best[index], time.perf_counter() - began)
        size = sum(file.stat().st_size for _, *pair in files for file in pair)
    return size, best[0], best[1], best[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, nargs="+", default=[4, 64, 1000])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--strategy", default="fisher", choices=[name.removesuffix("@1") for name in BUILT_IN])
    args = parser.parse_args()
    slots = slots_of(args.layers, args.hidden, args.inner)
    columns = ("patches", "MB", "read, ms", "merge from files, ms", "read / merge", "merge from memory, ms")
    print(f"| {' | '.join(columns)} | read / merge | error |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for patches in args.patches:
        size, read, merged, held = measure(args.layers, args.hidden, args.inner, patches, args.repeat, args.strategy)
        print(
            f"| {patches} | {size / 1e6:.1f} | {read * 1e3:.2f} | {merged * 1e3:.2f} | {read / merged:.2f} "
            f"| {held * 1e3:.2f} | {read / held:.2f} | {error(slots, patches):.3%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
