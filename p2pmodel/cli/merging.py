"""`p2pmodel merge`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.output import demand_place, emit, size, table
from p2pmodel.domain.errors import UsageError
from p2pmodel.domain.ids import short
from p2pmodel.domain.model import MergeSpec

if TYPE_CHECKING:
    from p2pmodel.node.patches.blending import Blend

SHOWN = 20


def merge(
    patches: Annotated[list[str], typer.Argument(metavar="PATCH…", help="Patch files, or ids of known patches.")],
    output: Annotated[Path, typer.Option("--output", help="The merged patch's file.", dir_okay=False)],
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            metavar="NAME[:KEY=VALUE,…]",
            help="fisher, mean, task-arithmetic, ties, coordinate-median, or installed ones: ties:density=0.3",
            show_default="the model's own",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="Scale of the merged update.", show_default="the best on the exam's tuning part"),
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option("--lambda", metavar="PATCH=λ", help="Weight of a patch; 1 for the others.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say which patches moved which slots how far.")] = False,
    base: options.Base = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Merge patches into one, on this machine: to look at, to evaluate, to export, or to publish."""
    given = parse_weights(weights or ())
    spec = None if strategy is None else parse_strategy(strategy)
    demand_place(output)
    from p2pmodel.node.patches.blending import blend
    from p2pmodel.store.home import Home

    result = blend(Home.open(home), patches, output, spec, given, alpha, base, explain)
    emit({"file": str(output), **vars(result)}, _text(result, output), json)


def parse_weights(texts: list[str] | tuple[str, ...]) -> dict[str, float]:
    """λ by patch, of `PATCH=λ`. Raises UsageError."""
    found = {}
    for text in texts:
        patch, _, number = text.rpartition("=")
        try:
            found[patch] = float(number)
        except ValueError:
            patch = ""
        if not patch or not 0 <= found[patch] < float("inf"):
            raise UsageError(f"{text[:64]!r} is no weight of a patch.", "Write it as PATCH=0.5.")
    return found


def parse_strategy(text: str) -> MergeSpec:
    """A strategy that is known here, with parameters that it takes. Raises UsageError, NotFound, Rejected."""
    from p2pmodel.tensors.merging import check

    name, _, rest = text.partition(":")
    parameters = {}
    for pair in rest.split(",") if rest else ():
        key, _, number = pair.partition("=")
        try:
            parameters[key.strip()] = float(number)
        except ValueError:
            raise UsageError(
                f"{pair[:64]!r} is no parameter of a strategy.", "Write it as ties:density=0.3,norm_clip=2."
            ) from None
    try:
        spec = MergeSpec(options.versioned(name), tuple(sorted(parameters.items())))
    except ValueError as error:
        raise UsageError(f"{text[:64]!r} is no strategy: {error}.") from None
    check(spec)
    return spec


def _text(result: "Blend", output: Path) -> str:
    lines = [f"α {result.alpha:g}" + ("" if result.tuned is None else ", found on the exam's tuning part")]
    if result.tuned is not None:
        lines.append(f"mean loss there {result.tuned[0]:.4f} before, {result.tuned[1]:.4f} after (nats per byte)")
    if result.influences:
        total = {patch: 0.0 for patch in result.weights}
        for one in result.influences:
            total[one.patch] += one.distance**2
        rows = [[short(p), f"{result.weights[p]:g}", f"{square**0.5:.4g}"] for p, square in total.items()]
        lines += ["", table("Without it the merge would lie elsewhere by", ["patch", "λ", "distance"], rows)]
        rows = [[x.slot, short(x.patch), f"{x.distance:.4g}"] for x in result.influences[:SHOWN]]
        lines += ["", table("Slots that were moved the farthest", ["slot", "by patch", "distance"], rows), ""]
    lines += [
        f"patch {short(result.id)} of kind {result.kind} on {result.parent}, merged of {len(result.weights)}: "
        f"{size(result.bytes)}",
        f"written to {output}; look at it with: p2pmodel patch show {output}",
    ]
    return "\n".join(lines)
