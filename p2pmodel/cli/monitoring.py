"""`p2pmodel monitor`."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from p2pmodel.cli import options

app = typer.Typer(no_args_is_help=True, help="Watch nodes and gateways with Prometheus and Grafana.")


@app.command()
def up(
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="HOST:PORT",
            help="The --http address of a node, or that of a gateway; may be repeated.",
            show_default="127.0.0.1:9100",
        ),
    ] = None,
    swarm: Annotated[str, typer.Option("--swarm", help="What to call their swarm.")] = "local",
    port: Annotated[int, typer.Option("--port", help="Of Prometheus.", min=1, max=65535)] = 9090,
    alertmanager_port: Annotated[int, typer.Option("--alertmanager-port", min=1, max=65535)] = 9093,
    grafana_port: Annotated[int, typer.Option("--grafana-port", min=1, max=65535)] = 3000,
    webhook: Annotated[str | None, typer.Option("--webhook", metavar="URL", help="Where alerts are posted.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="For their data.", show_default="`monitoring` in the home folder")
    ] = None,
    home: options.Home = None,
) -> None:
    """Run Prometheus with p2pmodel's rules here, and, where they are installed, Alertmanager and Grafana."""
    from p2pmodel.store.home import Home
    from p2pmodel.telemetry.stack import Stack, StackOptions

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, leave)
    stack = Stack(
        StackOptions(
            folder=folder or Home.open(home).path / "monitoring",
            targets=tuple(target or ("127.0.0.1:9100",)),
            swarm=swarm,
            port=port,
            alertmanager_port=alertmanager_port,
            grafana_port=grafana_port,
            webhook=webhook,
        )
    )
    try:
        with stack:
            typer.echo(f"Prometheus at {stack.url}; targets are in {stack.targets_file}")
            typer.echo(
                f"Alertmanager at {stack.alertmanager_url}" if stack.alertmanager_url else "no Alertmanager here"
            )
            typer.echo(f"Grafana at {stack.grafana_url}" if stack.grafana_url else "no Grafana here")
            stack.wait()
    except KeyboardInterrupt:
        typer.echo("leaving")
