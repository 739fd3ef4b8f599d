"""`p2pmodel train`."""

from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from p2pmodel.cli import options
from p2pmodel.cli.output import demand_place
from p2pmodel.domain.errors import UsageError

PLACES = ("through_swarm", "peers", "swarm_key", "codec")
DATA, PATCH, STEPS, MERGING, RUN = "Data", "Patch", "Training", "For merging", "Running"


class Schedule(StrEnum):
    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    WSD = "wsd"


class Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"


class Fisher(StrEnum):
    EXAMPLES = "examples"
    ADAM = "adam"


class Labels(StrEnum):
    MODEL = "model"
    DATA = "data"


def _option(panel: str, *names: str, help: str, default: str | bool = False, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=default, **more)


def train(
    data: Annotated[
        list[Path] | None,
        _option(DATA, "--data", help="Text, JSON lines (.jsonl) or Parquet (.parquet) to learn from; may be repeated."),
    ] = None,
    validation: Annotated[
        float | None, _option(DATA, "--validation", help="Share of the data that is held out.", default="0.1")
    ] = None,
    validation_data: Annotated[
        list[Path] | None, _option(DATA, "--validation-data", help="Held out instead of a share; may be repeated.")
    ] = None,
    validation_blocks: Annotated[
        int | None,
        _option(DATA, "--validation-blocks", help="How many of what is held out are used.", default="4", min=1),
    ] = None,
    skip_broken: Annotated[
        bool | None, _option(DATA, "--skip-broken/--no-skip-broken", help="Leave out lines that cannot be used.")
    ] = None,
    packing: Annotated[
        bool | None,
        _option(DATA, "--packing/--no-packing", help="Let short examples with answers share a block.", default="yes"),
    ] = None,
    sequence: Annotated[
        int | None, _option(DATA, "--sequence", help="Tokens in an example.", default="512", min=8)
    ] = None,
    licence: Annotated[str | None, _option(DATA, "--licence", help="SPDX licence of the data.")] = None,
    kind: Annotated[
        str | None,
        _option(
            PATCH, "--kind", help="ia3, expert, fish, dense, lora, or an installed one.", default="the model's first"
        ),
    ] = None,
    density: Annotated[
        float | None, _option(PATCH, "--density", help="fish: share of the weights that it changes.", default="0.005")
    ] = None,
    mask_examples: Annotated[
        int | None, _option(PATCH, "--mask-examples", help="fish: examples to choose them by.", default="64", min=1)
    ] = None,
    rank: Annotated[
        int | None, _option(PATCH, "--rank", help="lora: rank of the update; expert: of a new one.", default="8", min=1)
    ] = None,
    expert: Annotated[
        str | None,
        _option(PATCH, "--expert", help="expert: its name; one that the version has is updated.", default="<data>"),
    ] = None,
    router: Annotated[
        bool | None,
        _option(PATCH, "--router/--no-router", help="expert: train the rows of all experts, and no adapter."),
    ] = None,
    alpha: Annotated[
        float | None, _option(PATCH, "--alpha", help="lora: the update is scaled by alpha / rank.", default="16")
    ] = None,
    bits: Annotated[
        int | None, _option(PATCH, "--bits", help="Of a value in the patch: 4 or 32.", default="4 for ia3 and dense")
    ] = None,
    version: Annotated[
        str | None,
        _option(PATCH, "--version", help="What it is against: number (1.0.2), id, base or head.", default="head"),
    ] = None,
    output: Annotated[
        Path | None,
        _option(PATCH, "--output", help="The patch file.", default="<data>-<version>.p2patch", dir_okay=False),
    ] = None,
    steps: Annotated[int | None, _option(STEPS, "--steps", help="How many.", default="60", min=1)] = None,
    batch: Annotated[
        int | None, _option(STEPS, "--batch", help="Examples computed at a time.", default="4", min=1)
    ] = None,
    accumulate: Annotated[
        int | None, _option(STEPS, "--accumulate", help="Batches in a step.", default="1", min=1)
    ] = None,
    learning_rate: Annotated[
        float | None, _option(STEPS, "--learning-rate", help="At its peak.", default="by kind", min=0.0)
    ] = None,
    schedule: Annotated[
        Schedule | None, _option(STEPS, "--schedule", help="Of the learning rate.", default="linear")
    ] = None,
    warm_up: Annotated[
        float | None, _option(STEPS, "--warm-up", help="Share of steps to rise in.", default="0.1", min=0.0, max=1.0)
    ] = None,
    weight_decay: Annotated[
        float | None, _option(STEPS, "--weight-decay", help="Pull towards the parent's values.", default="0", min=0.0)
    ] = None,
    clip: Annotated[
        float | None, _option(STEPS, "--clip", help="Largest norm of a gradient; 0 for any.", default="0", min=0.0)
    ] = None,
    dtype: Annotated[
        Precision | None, _option(STEPS, "--dtype", help="What the model computes in.", default="fp32")
    ] = None,
    early_stopping: Annotated[
        int | None, _option(STEPS, "--early-stopping", help="End after so many checkpoints without improvement.", min=0)
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        _option(STEPS, "--checkpoint-every", help="Steps between looks at what is held out.", default="20", min=1),
    ] = None,
    seed: Annotated[int | None, _option(STEPS, "--seed", help="Of all that is drawn.", default="0", min=0)] = None,
    fisher: Annotated[
        Fisher | None,
        _option(MERGING, "--fisher", help="From a pass over examples, or from Adam's moments.", default="examples"),
    ] = None,
    fisher_labels: Annotated[
        Labels | None, _option(MERGING, "--fisher-labels", help="Drawn from the model, or the data's.", default="model")
    ] = None,
    fisher_examples: Annotated[
        int | None,
        _option(MERGING, "--fisher-examples", help="Examples that the Fisher is the mean of.", default="32", min=1),
    ] = None,
    control: Annotated[
        bool | None,
        _option(
            MERGING,
            "--control/--no-control",
            help="Give the mean gradient along, in 4 bits, and use the others'.",
            default="when the version has a mean of them",
        ),
    ] = None,
    fresh: Annotated[
        bool | None,
        _option(MERGING, "--fresh/--no-fresh", help="Begin without the optimiser's state of earlier rounds."),
    ] = None,
    recipe: Annotated[
        Path | None,
        _option(RUN, "--recipe", help="Options from a TOML file; flags win over it.", exists=True, dir_okay=False),
    ] = None,
    dry_run: Annotated[
        bool, _option(RUN, "--dry-run", help="Say how large and how long it is; train nothing.")
    ] = False,
    restart: Annotated[bool, _option(RUN, "--restart", help="Begin anew what was broken off.")] = False,
    through_swarm: Annotated[
        bool,
        _option(RUN, "--through-swarm", help="Run the layers on the swarm's peers; this machine holds none of them."),
    ] = False,
    peers: options.Peers = None,
    swarm_key: options.SwarmKey = None,
    codec: Annotated[
        str | None,
        _option(RUN, "--codec", help="How activations and gradients travel: fp32, bf16, int8, …", default="bf16"),
    ] = None,
    plot: Annotated[
        Path | None, _option(RUN, "--plot", help="Draw the losses (.png, .svg, .pdf).", dir_okay=False)
    ] = None,
    threads: Annotated[
        int | None, _option(RUN, "--threads", help="To compute with.", default="all cores", min=1)
    ] = None,
    model: options.Model = None,
    base: options.Base = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Train a patch on your own data, on this machine or through the swarm; your data stays here.

    Broken off, the same command goes on where it was. Rows of .jsonl and .parquet files have the columns text, or
    prompt and completion, or messages; what is learned of the latter are the answers.
    """
    given = {name: value for name, value in locals().items() if name not in PLACES and value is not None}
    from p2pmodel.cli.recipes import read_recipe
    from p2pmodel.cli.training_display import TrainingDisplay, demand_plots, show_patch
    from p2pmodel.cli.training_display import plot as draw
    from p2pmodel.cli.training_plan import assignment_of, show_estimate
    from p2pmodel.node.lineages.bases import find_base
    from p2pmodel.node.lineages.discovery import local_lineage
    from p2pmodel.node.machine.threads import use_threads
    from p2pmodel.node.patches.contributing import ALONE, Workplace, estimate, train_patch
    from p2pmodel.store.home import Home

    chosen = (read_recipe(recipe) if recipe else {}) | given
    if not chosen.get("data"):
        raise UsageError("There is nothing to learn from.", "Name a file with --data, or in the recipe.")
    if (picture := chosen.get("plot")) is not None:
        demand_plots(picture)
    use_threads(chosen.get("threads"))
    folder = Home.open(home)
    with ExitStack() as stack:
        if through_swarm:
            from p2pmodel.node.asking.client import SwarmClient
            from p2pmodel.node.patches.apprentice import DEFAULT_CODEC, ThroughSwarm

            client = stack.enter_context(
                SwarmClient.connect(home, tuple(peers or ()), chosen.get("model"), chosen.get("base"), swarm_key)
            )
            lineage, place = client.lineage, client.checkpoint.path
            workplace: Workplace = ThroughSwarm(client, codec or DEFAULT_CODEC)
        elif peers or codec:
            raise UsageError("--peers and --codec are for training through the swarm.", "Add --through-swarm.")
        else:
            lineage, workplace = local_lineage(folder, chosen.get("model")), ALONE
            place = find_base(folder, lineage, chosen.get("base"))
        assignment = assignment_of(lineage, place, chosen)
        if dry_run:
            return show_estimate(estimate(assignment, workplace), assignment, json)
        number = lineage.number(assignment.parent)
        path = chosen.get("output") or Path(f"{assignment.files[0].stem}-{number}{options.PATCH_SUFFIX}")
        demand_place(path)
        with TrainingDisplay(assignment.options.steps) as display:
            new = train_patch(assignment, path, display, workplace)
    if picture is not None:
        draw(picture, new.trained, assignment.options.checkpoint_every)
    show_patch(new, path, lineage, str(number), json)
