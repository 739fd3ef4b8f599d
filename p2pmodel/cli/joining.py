"""`p2pmodel join`."""

from pathlib import Path
from typing import Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.domain.errors import UsageError
from p2pmodel.domain.experts import MAX_EXPERTS, check_experts
from p2pmodel.domain.swarm import Span


def join(
    gpu: Annotated[int | None, typer.Option("--gpu", help="Number of the GPU to compute on.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Compute on the CPU (the default).")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="How weights are held: fp32, bf16, fp16, or int8, nf4 on a GPU.",
            show_default="fp32 on the CPU, bf16 or fp16 on a GPU",
        ),
    ] = None,
    cache_memory: Annotated[
        str | None,
        typer.Option(
            "--cache-memory",
            metavar="SIZE",
            help="Memory for the caches of sessions, such as 2GiB.",
            show_default="a share of what is free",
        ),
    ] = None,
    model: options.Model = None,
    peers: options.Peers = None,
    swarm_key: options.SwarmKey = None,
    layers: Annotated[str, typer.Option("--layers", metavar="A:B", help="Span to host, `auto`, or `none`.")] = "auto",
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts",
            metavar="A-B",
            help="Host only these experts of the layers (as 4-7 or 0,2,5-7), or `auto`: those that need it most; or "
            "`none`: all but their experts.",
        ),
    ] = None,
    missing_experts: Annotated[
        str,
        typer.Option(
            "--missing-experts",
            help="With `--experts none`: what becomes of an expert that nobody hosts: `fail`, or `spread` its weight.",
        ),
    ] = "fail",
    expert_codec: Annotated[
        str | None,
        typer.Option(
            "--expert-codec",
            help="With `--experts none`: codec of the rows that go to experts.",
            show_default="the dtype's own",
        ),
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(
            "--capacity",
            help="With `auto`: how many layers fit, or with `--experts auto`: how many experts of each layer.",
            min=1,
            show_default="half of them",
        ),
    ] = None,
    base: options.Base = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            "--port", help="TCP port for peers (gossip takes the next one); 0 takes free ones.", min=0, max=65534
        ),
    ] = 0,
    http: Annotated[
        str | None,
        typer.Option(
            "--http",
            metavar="[HOST:]PORT",
            help="Serve the status page and Prometheus metrics, on 127.0.0.1 by default.",
        ),
    ] = None,
    control_listen: Annotated[
        str | None,
        typer.Option(
            "--control-listen", metavar="HOST:PORT", help="Serve the control API over TCP too; needs --control-tls."
        ),
    ] = None,
    control_tls: Annotated[
        Path | None,
        typer.Option(
            "--control-tls",
            metavar="DIR",
            help="Certificates for it: of the node, and of the authority of its clients.",
        ),
    ] = None,
    maintain: Annotated[
        bool, typer.Option("--maintain", help="Take part in rounds as a maintainer: needs the whole checkpoint.")
    ] = False,
    ask: Annotated[
        bool, typer.Option("--ask", help="With --maintain: sign nothing that `p2pmodel round approve` did not allow.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", help="CPU threads to compute with.", min=1, show_default="all cores")
    ] = None,
    home: options.Home = None,
) -> None:
    """Host a part of a model. With no model named it is the starter model; with no peers, a swarm begins here.

    On a terminal a panel shows what the node does; elsewhere there is a line for each thing that happens.
    """
    if gpu is not None and cpu:
        raise UsageError("--gpu and --cpu exclude each other.", "Choose one.")
    if ask and not maintain:
        raise UsageError("--ask is for maintainers.", "Add --maintain.")
    if missing_experts not in ("fail", "spread"):
        raise UsageError(f"--missing-experts {missing_experts!r} is not known.", "Use `fail` or `spread`.")
    chosen = None if experts is None else parse_experts(experts)
    if chosen is not None and layers == "none":
        raise UsageError("--experts needs layers.", "Leave --layers none out, or name a span.")
    hosted, cached = parse_layers(layers), None if cache_memory is None else options.parse_size(cache_memory)
    import uvloop

    from p2pmodel.cli.panel import LivePanel
    from p2pmodel.node.node import NodeOptions, run

    chosen_options = NodeOptions(
        home=home,
        model=model,
        peers=tuple(peers or ()),
        swarm_key=swarm_key,
        layers=hosted,
        capacity=capacity,
        experts=chosen,
        spread_missing=missing_experts == "spread",
        expert_codec=expert_codec,
        base=base,
        gpu=gpu,
        dtype=dtype,
        cache_memory=cached,
        host=host,
        port=port,
        http=None if http is None else options.parse_address(http),
        control_listen=None if control_listen is None else options.parse_address(control_listen),
        control_tls=control_tls,
        maintain=maintain,
        ask=ask,
        threads=threads,
    )
    if not LivePanel.has_place():
        uvloop.run(run(chosen_options, say=lambda line: typer.echo(line)))
        return
    with LivePanel() as panel:
        uvloop.run(run(chosen_options, say=panel.say, show=panel.show))


def parse_layers(text: str) -> Span | str:
    """`auto`, `none` or a span. Raises UsageError."""
    if text in ("auto", "none"):
        return text
    try:
        start, end = (int(part) for part in text.split(":"))
        return Span(start, end)
    except ValueError:
        raise UsageError(
            f"--layers {text!r} is not a span.", "Write it as 0:4 (layers 0 to 3), or `auto`, or `none`."
        ) from None


def parse_experts(text: str) -> tuple[int, ...] | str:
    """`auto`, or sorted numbers of `4-7` or `0,2,5-7`; empty for `none`. Raises UsageError."""
    if text == "auto":
        return text
    if text == "none":
        return ()
    try:
        runs = [[int(number) for number in part.split("-")] for part in text.split(",")]
        if any(len(run) > 2 or run[-1] - run[0] >= MAX_EXPERTS for run in runs):
            raise ValueError
        numbers = tuple(sorted({expert for run in runs for expert in range(run[0], run[-1] + 1)}))
        check_experts(numbers)
    except ValueError:
        raise UsageError(
            f"--experts {text[:64]!r} names no experts.",
            "Write 4-7, or 0,2,5-7, or `auto`, or `none` for layers without experts.",
        ) from None
    return numbers
