#!/usr/bin/env python
"""Tries every type of causal language model that transformers has in two and three stages, and writes docs/models.md.

    scripts/sweep_families.py                  all types, the table to docs/models.md
    scripts/sweep_families.py llama mamba2     these alone, as lines on stdout

Each type runs in a process of its own, with a time limit: one that crashes or hangs costs its own line alone.
"""

import argparse
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
TABLE = REPO / "docs" / "models.md"
INTRODUCTION = """# Models

Written by `scripts/sweep_families.py`: do not edit.

All {all} types of causal language model of transformers {transformers}, each as a small random checkpoint in two
and in three stages on the CPU (torch {torch}): {complete} work in everything, {partly} in part, {refused} are
refused when they are loaded, with the reason that the table gives, and of {untried} no small checkpoint could be
made.

*Yes* means the same bits as the whole model in fp32: the logits of a prompt; of single tokens and of several at
once after it, from caches; the hidden states of a batch that is padded on the left, with its caches; and 48 tokens
of `generate()`. *Less than fp32* are the dtypes in which spans compute finite hidden states on the CPU.

Refused are models whose layers need more than the hidden states of the layers before them, which is what p2pmodel
sends from machine to machine. Every span is tried when it is loaded, so that a model that is not in this table, or
has changed since, is refused as well, rather than wrong.

| Type | Class | Prefill | Cached decode | Padded rows | 48 greedy | Less than fp32 | Remark |
|---|---|---|---|---|---|---|---|
"""
CHECKS = ("prefill", "cached", "rows", "greedy")
SECONDS = 240


@dataclass
class Result:
    """refused: why `p2pmodel join` would not load it; failed: what differs, by check; untried: why nothing was done."""

    kind: str
    model_class: str
    refused: str = ""
    untried: str = ""
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    half: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; all when none is named")
    types = parser.parse_args().types
    sys.path.insert(0, str(REPO))
    from tests.support.families import ALL_TYPES

    prepare()
    results = []
    for kind in types or ALL_TYPES:
        results.append(in_process(kind))
        print(line(results[-1]), flush=True)
    if not types:
        TABLE.write_text(document(results))


def prepare() -> None:
    """What every trial needs, loaded once: the trials' processes are forked from this one, which runs no tensors."""
    import torch
    from transformers.utils import logging

    from tests.support import stage_checks

    assert stage_checks
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)


def in_process(kind: str) -> Result:
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: there.send(try_type(kind)))
    process.start()
    there.close()
    try:
        if not here.poll(SECONDS):
            return Result(kind, "", untried=f"it took more than {SECONDS} seconds")
        result: Result = here.recv()
        return result
    except EOFError:
        process.join()
        return Result(kind, "", untried=f"the trial's process ended with status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def try_type(kind: str) -> Result:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from p2pmodel.domain.errors import InvalidInput
    from p2pmodel.engine.checkpoint import read_checkpoint
    from tests.support.families import save_small, small_config

    result = Result(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        try:
            save_small(kind, path)
        except Exception as error:  # whatever the code of a family raises
            result.untried = f"no small one could be made: {said(error)}"
        if result.untried:
            try:
                small_config(kind).save_pretrained(path)
                read_checkpoint(path)
            except InvalidInput as error:
                if "no weights" not in error.message:
                    result.refused, result.untried = plain(error.message, path), ""
            except Exception as error:
                result.untried += f"; {said(error)}"
            return result
        try:
            run_checks(path, result)
        except InvalidInput as error:
            result.refused = plain(error.message, path)
    return result


def run_checks(path: Path, result: Result) -> None:
    import torch

    from p2pmodel.engine.checkpoint import load_whole, read_checkpoint
    from p2pmodel.engine.head import load_head
    from p2pmodel.engine.stage import load_stage
    from tests.support import stage_checks as checks

    checkpoint = read_checkpoint(path)
    chains = [checks.load_chain(checkpoint, count) for count in (2, 3)]
    heads = [load_head(checkpoint, chain) for chain in chains]
    # Kernels are chosen by whether a gradient may be asked for, and round differently.
    whole = load_whole(path).requires_grad_(False)
    trials: dict[str, Any] = {
        "prefill": lambda: [checks.check_prefill(whole, head) for head in heads],
        "cached": lambda: [checks.check_cached(whole, h, c) for h, c in zip(heads, chains, strict=True)],
        "rows": lambda: [checks.check_rows(whole, chain.stages) for chain in chains],
        "greedy": lambda: checks.check_greedy(whole, heads),
    }
    for name, trial in trials.items():
        try:
            trial()
            result.passed.append(name)
        except Exception as error:
            result.failed[name] = said(error)
    for dtype in (torch.bfloat16, torch.float16):
        try:
            stages = [load_stage(checkpoint, stage.span, dtype) for stage in chains[0].stages]
            checks.check_half(stages)
            result.half.append(str(dtype).removeprefix("torch."))
        except Exception as error:
            result.failed[str(dtype).removeprefix("torch.")] = said(error)


def said(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text[:160]}"


def plain(message: str, path: Path) -> str:
    return message.replace(str(path / "config.json"), "config.json").replace(str(path), "the folder")


def line(result: Result) -> str:
    return f"{result.kind:28} {' | '.join(marks(result))} | {remark(result)}"


def marks(result: Result) -> list[str]:
    if result.refused or result.untried:
        return ["–"] * (len(CHECKS) + 1)
    halves = [{"bfloat16": "bf16", "float16": "fp16"}[name] for name in result.half]
    return [*("yes" if check in result.passed else "**no**" for check in CHECKS), ", ".join(halves) or "no"]


def remark(result: Result) -> str:
    if result.refused:
        return f"refused: {result.refused}"
    if result.untried:
        return f"not tried: {result.untried}"
    return "; ".join(f"{check}: {what}" for check, what in result.failed.items())


def document(results: Sequence[Result]) -> str:
    complete = [r for r in results if set(CHECKS) <= set(r.passed)]
    refused, untried = [r for r in results if r.refused], [r for r in results if r.untried]
    text = INTRODUCTION.format(
        all=len(results),
        transformers=version("transformers"),
        torch=version("torch"),
        complete=len(complete),
        partly=len(results) - len(complete) - len(refused) - len(untried),
        refused=len(refused),
        untried=len(untried),
    )
    rows = [
        f"| {r.kind} | {r.model_class} | {' | '.join(marks(r))} | {remark(r).replace('|', ' ')} |"
        for r in sorted(results, key=lambda r: r.kind)
    ]
    return text + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
