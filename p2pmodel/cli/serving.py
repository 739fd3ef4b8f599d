"""`p2pmodel serve`."""

from pathlib import Path
from typing import Annotated

import typer

from p2pmodel.cli import options


def serve(
    model: options.Model = None,
    peers: options.Peers = None,
    swarm_key: options.SwarmKey = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; beyond this machine only with keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File with a key a line; whoever asks needs one.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let everybody who reaches the address use it, without a key.")
    ] = False,
    answers: Annotated[int, typer.Option("--answers", help="How many answers are made at once.", min=1, max=1024)] = 64,
    waiting: Annotated[
        int, typer.Option("--waiting", help="How many may wait; further ones are told when to come again.", min=0)
    ] = 256,
    codec: Annotated[
        str | None, typer.Option("--codec", help="How activations travel.", show_default="as with infer")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", help="CPU threads for each answer's part here.", min=1)] = 1,
    base: options.Base = None,
    home: options.Home = None,
) -> None:
    """Serve the swarm's model to programs that speak OpenAI's API, with a chat page and the status page."""
    import uvloop

    from p2pmodel.node.serving.serving import ServeOptions
    from p2pmodel.node.serving.serving import serve as run
    from p2pmodel.tensors.codecs import DEFAULT_CODEC

    uvloop.run(
        run(
            ServeOptions(
                home=home,
                model=model,
                peers=tuple(peers or ()),
                swarm_key=swarm_key,
                base=base,
                host=host,
                port=port,
                api_key_file=api_key_file,
                insecure=insecure,
                answers=answers,
                waiting=waiting,
                codec=codec or DEFAULT_CODEC,
                threads=threads,
            ),
            say=typer.echo,
        )
    )
