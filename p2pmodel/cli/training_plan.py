"""What `p2pmodel train` is asked for: options to an assignment, and what that would take. It loads torch."""

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from p2pmodel.cli.options import versioned
from p2pmodel.cli.output import emit, size
from p2pmodel.domain import modular
from p2pmodel.domain.errors import UsageError
from p2pmodel.engine.checkpoint import read_checkpoint
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import round_mean
from p2pmodel.node.patches.contributing import Assignment, Estimate
from p2pmodel.tensors.kinds import get_kind
from p2pmodel.tensors.patch_kind import Fit, KindOptions


def assignment_of(lineage: Lineage, base: Path, chosen: Mapping[str, Any]) -> Assignment:
    """chosen: by parameter of `p2pmodel train`; what is not there is the kind's, the model's or the trainer's default.
    Raises InvalidInput, UsageError."""
    names = {"dtype": "precision", "validation_blocks": "held_out_blocks"}
    values = {names.get(name, name): value for name, value in chosen.items()}
    values["fisher"] = "adam" if chosen.get("fisher") == "adam" else chosen.get("fisher_labels", "model")

    kind = versioned(chosen.get("kind") or lineage.manifest.kinds[0])
    if kind != modular.KIND and (chosen.get("expert") or chosen.get("router")):
        raise UsageError(f"--expert and --router are for modular experts, not for {kind}.", "Add --kind expert.")
    if kind == modular.KIND:
        values.setdefault("expert", modular.name_like(Path(chosen["data"][0]).stem))
    known = get_kind(kind)
    values.setdefault("learning_rate", known.learning_rate)
    values.setdefault("sequence", min(TrainingOptions.sequence, read_checkpoint(base).context))
    parent = lineage.find_version(chosen.get("version", "head"))
    values["round"], values["rounds"] = lineage.place_in_plan(parent)
    if values["rounds"] > 1:
        values.setdefault("schedule", "wsd")
    mean = round_mean(lineage, parent, kind) if chosen.get("control", True) else None
    values["control"] = chosen.get("control", mean is not None)

    def those_of(settings: type) -> dict[str, Any]:
        return {f.name: _plain(values[f.name]) for f in dataclasses.fields(settings) if f.name in values}

    return Assignment(
        lineage,
        base,
        parent,
        kind,
        tuple(chosen["data"]),
        tuple(chosen.get("validation_data", ())),
        TrainingOptions(**those_of(TrainingOptions)),
        KindOptions(**those_of(KindOptions)),
        licence=chosen.get("licence", ""),
        skip_broken=chosen.get("skip_broken", False),
        fresh=chosen.get("fresh", False),
        restart=chosen.get("restart", False),
        bits=chosen.get("bits", 4 if known.fit is Fit.SLOTS else 32),
        mean=mean,
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, StrEnum) else value


def show_estimate(found: Estimate, assignment: Assignment, json: bool) -> None:
    chosen = assignment.options
    minutes, seconds = divmod(round(found.seconds), 60)
    lines = [
        f"data      {found.examples} examples in {found.blocks} blocks, {found.held_out} more are held out; "
        f"{found.tokens} tokens to learn from",
        f"steps     {chosen.steps} of {chosen.batch * chosen.accumulate} blocks: {found.epochs:.1f} epochs",
        f"trained   {found.values} values of kind {assignment.kind}",
        f"patch     {size(found.bytes)}",
        f"time      about {minutes} min {seconds} s, at {found.tokens_per_second:,.0f} tokens/s",
    ]
    if found.skipped:
        lines.insert(1, f"broken    {found.skipped} lines are left out")
    if found.resumes and not assignment.restart:
        lines.append(f"begun     {found.resumes} steps are done already")
    emit(found, "\n".join(lines), json)
