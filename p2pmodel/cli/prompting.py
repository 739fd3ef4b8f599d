"""`p2pmodel infer` and `p2pmodel eval`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.output import emit, table
from p2pmodel.domain.errors import UsageError

if TYPE_CHECKING:
    from p2pmodel.node.asking.client import Answer


def infer(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    model: options.Model = None,
    peers: options.Peers = None,
    swarm_key: options.SwarmKey = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 takes the likeliest token each time.", min=0.0)
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    version: options.Version = "head",
    patch: Annotated[
        str | None,
        typer.Option(
            "--patch",
            help="Answer with a patch that nobody has merged: its file, or the id of a known one. It travels with this "
            "answer's session alone.",
        ),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            "--codec",
            help="How activations travel: fp32, bf16, fp16, int8, or h4 (4 bits).",
            show_default="the smallest that costs no quality",
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            help="A small model that guesses ahead, for peers far away: its folder, or auto for the starter's own. "
            "The answer stays the same.",
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say how much of each modular expert the answer was made with.")
    ] = False,
    base: options.Base = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Continue a text with the swarm's model; the answer is streamed as it is made."""
    if patch is not None and version != "head":
        raise UsageError("--patch and --version exclude each other.", "A patch names its own parent version.")
    from p2pmodel.node.asking.client import Sampling, SwarmClient
    from p2pmodel.tensors.codecs import DEFAULT_CODEC

    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, draft)

    pieces = [text]  # the prompt is shown with the answer's first piece

    def show(piece: str) -> None:
        pieces.append(piece)
        if not json:
            typer.echo("".join(pieces), nl=False)
        pieces.clear()

    with SwarmClient.connect(home, tuple(peers or ()), model, base, swarm_key) as client:
        answer = client.generate(text, sampling, version, codec or DEFAULT_CODEC, show, patch)
    summary = (
        f"{answer.tokens} tokens of {answer.model} {answer.number if patch is None else f'with {patch}'} "
        f"in {answer.seconds:.1f} s "
        f"({answer.tokens / answer.seconds:.1f} a second), through {answer.route_text}"
        + (f", {answer.failovers} failovers" if answer.failovers else "")
        + (f", without experts that nobody hosts ({answer.spread_gates} gates spread)" if answer.spread_gates else "")
    )
    if json:
        emit(answer, "", True)
    else:
        typer.echo()
        typer.echo(summary, err=True)
        if explain:
            typer.echo(_explained(answer), err=True)


def _explained(answer: "Answer") -> str:
    if not answer.experts:
        return "no modular expert had a part in it: the version has none, or the text is too short to choose by"
    ranked = sorted(answer.experts, key=lambda pair: -pair[1])
    return table(
        "", ["expert", "share", ""], [[name, f"{share:.1%}", "█" * round(20 * share)] for name, share in ranked]
    )


def evaluate(
    data: Annotated[list[Path], typer.Option("--data", help="Text to measure the loss on; may be repeated.")],
    model: options.Model = None,
    version: options.Version = "head",
    patch: Annotated[str | None, typer.Option("--patch", help="A patch file, or the id of a known patch.")] = None,
    base: options.Base = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Measure a version's or a patch's loss on a text of your own: nats per token and per byte."""
    if patch is not None and version != "head":
        raise UsageError("--patch and --version exclude each other.", "A patch names its own parent version.")
    from p2pmodel.node.patches.evaluating import evaluate_files

    result = evaluate_files(home, model, base, version, patch, data)
    emit(
        result,
        f"{result.nats_per_token:.4f} nats per token, {result.nats_per_byte:.4f} per byte "
        f"({result.tokens} tokens, {result.bytes} bytes; {result.what})",
        json,
    )
