"""`p2pmodel expert`: the modular experts that a version has."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.lineages import lineage_of
from p2pmodel.cli.output import emit, printable, size, table
from p2pmodel.domain.errors import InvalidInput, UsageError
from p2pmodel.domain.ids import short
from p2pmodel.domain.modular import KIND

if TYPE_CHECKING:
    from p2pmodel.node.lineages.expert_shares import Shares

app = typer.Typer(no_args_is_help=True, help="Modular experts: what a version has, what for, and taking them out.")


@app.command("list")
def list_experts(
    version: options.Version = "head",
    model: options.Model = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """The experts of a version, and the version that brought each."""
    from p2pmodel.node.versions.modular_experts import experts_of

    lineage = lineage_of(home, model)
    views = experts_of(lineage, lineage.find_version(version))
    rows = [
        [v.name, str(v.rank), v.since, f"{v.values:,}", str(len({c.contributor for c in v.contributions}))]
        for v in views
    ]
    text = f"{lineage.manifest.name} has no experts at this version"
    if rows:
        text = table("", ["expert", "rank", "since", "values", "contributors"], rows)
    elif KIND in lineage.manifest.kinds:
        text += "; train one with: p2pmodel train --kind expert"
    else:
        text += ", and takes none: its patches are of kind " + ", ".join(lineage.manifest.kinds)
    emit(views, text, json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Of the expert.")],
    version: options.Version = "head",
    model: options.Model = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """One expert: its size, who trained it, on what, and when."""
    from p2pmodel.node.versions.modular_experts import describe

    lineage = lineage_of(home, model)
    chosen = lineage.find_version(version)
    view = describe(lineage, chosen, lineage.find_expert(chosen, name))
    lines = [
        f"expert       {view.name}",
        f"since        {lineage.manifest.name} {view.since}",
        f"size         rank {view.rank} in {view.layers} layers: {view.values:,} values, {size(4 * view.values)}",
    ]
    for part in view.contributions:
        lines.append(f"patch        {short(part.patch)} in {part.version}, by {part.contributor}")
        lines.append(f"               {', '.join(part.parts)}; trained on {', '.join(map(printable, part.data))}")
    emit(view, "\n".join(lines), json)


@app.command()
def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Of the experts.")],
    model: options.Model = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Propose a version without some experts; maintainers adopt it who approve it."""
    from p2pmodel.control.client import ControlClient
    from p2pmodel.node.rounds.asides import propose_removal

    lineage = lineage_of(home, model)
    with ControlClient.connect(lineage.home.control_socket) as client:
        record, proposed = propose_removal(lineage, names)
        client.publish(record)
    emit(
        {"id": proposed, "removes": names},
        f"version {short(proposed)}, without {', '.join(names)}, is proposed and approved by this home; "
        "follow it with: p2pmodel round show",
        json,
    )


@app.command()
def stats(
    data: Annotated[list[Path], typer.Option("--data", help="Text of one domain; may be repeated.")],
    heatmap: Annotated[
        Path | None, typer.Option("--heatmap", help="Draw experts by domain (.png, .svg, .pdf).", dir_okay=False)
    ] = None,
    on_page: Annotated[
        bool, typer.Option("--on-page", help="Show it on the status page of this home's node, with the files' names.")
    ] = False,
    through_swarm: Annotated[
        bool, typer.Option("--through-swarm", help="Ask the swarm's peers; this machine holds none of the layers.")
    ] = False,
    peers: options.Peers = None,
    swarm_key: options.SwarmKey = None,
    version: options.Version = "head",
    model: options.Model = None,
    base: options.Base = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """What the routers choose for texts of yours: each expert's share, by file."""
    if peers and not through_swarm:
        raise UsageError("--peers is for what is asked of the swarm.", "Add --through-swarm.")
    from p2pmodel.cli.training_display import demand_plots
    from p2pmodel.node.lineages.expert_shares import note_shares
    from p2pmodel.node.versions.router_choices import shares_on, shares_through

    if heatmap is not None:
        demand_plots(heatmap)
    if through_swarm:
        from p2pmodel.node.asking.client import SwarmClient

        with SwarmClient.connect(home, tuple(peers or ()), model, base, swarm_key) as client:
            lineage, wanted = client.lineage, client.lineage.find_version(version)
            found = shares_through(client, wanted, data)
    else:
        lineage = lineage_of(home, model)
        wanted = lineage.find_version(version)
        found = shares_on(lineage, wanted, base, data)
    if heatmap is not None:
        draw(found, heatmap)
    if on_page:
        note_shares(lineage, str(lineage.number(wanted)), found)
    rows = [[name, *(f"{share:.1%}" for share in shares)] for name, shares in found.rows]
    emit(found, table("", ["text", *found.names], rows), json)


def draw(found: "Shares", path: Path) -> None:
    """Raises InvalidInput when the file cannot be written."""
    from matplotlib.figure import Figure

    rows, columns = len(found.rows), len(found.names)
    figure = Figure(figsize=(2 + 0.7 * columns, 1.5 + 0.5 * rows), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow([list(shares) for _, shares in found.rows], vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(columns), found.names, rotation=45, ha="right")
    axes.set_yticks(range(rows), [name for name, _ in found.rows])
    for row, (_, shares) in enumerate(found.rows):
        for column, share in enumerate(shares):
            colour = "black" if share > 0.6 else "white"
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="share")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InvalidInput(f"The plot cannot be written to {path}: {error.strerror or error}.") from None
