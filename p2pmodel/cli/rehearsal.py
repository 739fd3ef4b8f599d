"""The main job on one machine: a bootstrap node, hosts that share the layers, contributors, maintainers, and a client.

Every node is a process of its own with its own home, key and sockets; they find each other through the DHT and gossip,
and this process only starts them, trains by the same commands that a person would use, and asks them how it went.
"""

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from p2pmodel import starter
from p2pmodel.cli.localswarm import LocalSwarm, NodeProcess
from p2pmodel.cli.options import PATCH_SUFFIX
from p2pmodel.domain.errors import P2PModelError
from p2pmodel.domain.model import Schedule
from p2pmodel.domain.swarm import Span
from p2pmodel.domain.version import VersionNumber
from p2pmodel.node.asking.client import Answer, Sampling, SwarmClient
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.node.lineages.intake import take_in
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.store import patchfile
from p2pmodel.store.home import Home

ADOPTION_SECONDS = 300.0
TRAINING = ("--steps", "8", "--batch", "2", "--sequence", "256", "--learning-rate", "0.01", "--fisher-examples", "8")
DOMAINS = ("asyncio", "email", "tkinter", "xml", "distutils")


@dataclass(frozen=True)
class Plan:
    hosts: int = 3
    contributors: int = 3
    maintainers: int = 1
    rounds: int = 2
    prompt: str = "def "
    max_new_tokens: int = 48
    keep: bool = False
    folder: Path | None = None
    swarm_key: Path | None = None


@dataclass(frozen=True)
class PatchReport:
    id: str
    domain: str
    contributor: str
    bytes: int
    loss_before: float
    loss_after: float
    state: str


@dataclass(frozen=True)
class VersionReport:
    """exam: nats per byte by domain, on held-out text that nobody trained on; mean: of the plain mean of the same
    patches, empty where that has no scores."""

    number: str
    id: str
    alpha: float
    exam: dict[str, float]
    mean: dict[str, float]
    patches: list[PatchReport]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Report:
    model: str
    base_exam: dict[str, float]
    versions: list[VersionReport]
    answers: list[Answer]
    spans: dict[str, str]
    traffic: dict[str, float]
    seconds: dict[str, float]
    folder: str
    address: str
    pids: dict[str, int] = field(default_factory=dict)


class Progress:
    """What is going on, on stderr: a spinner on a terminal, a line a step otherwise."""

    def __init__(self, quiet: bool) -> None:
        self._console, self._quiet = Console(stderr=True, highlight=False), quiet
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, text: str, name: str) -> Iterator[Callable[[str], None]]:
        began = time.monotonic()
        shown = self._console.status(text) if self._console.is_terminal and not self._quiet else nullcontext()
        with shown as status:
            yield lambda more: status.update(f"{text}: {more}") if status else None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
        self.say(f"{text} [{time.monotonic() - began:.1f} s]")

    def say(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, markup=False)

    def stream(self, piece: str) -> None:
        if not self._quiet:
            typer.echo(piece, nl=False)


def rehearse(plan: Plan, quiet: bool) -> Report:
    """Runs it all. Raises P2PModelError with what went wrong and where the logs are; they are kept then."""
    folder = plan.folder or Path(tempfile.mkdtemp(prefix="p2pmodel-"))
    progress = Progress(quiet)
    began = time.monotonic()
    with LocalSwarm(folder, keep=plan.keep) as swarm:
        report = _rehearse(plan, swarm, progress)
    if not plan.keep and plan.folder is None:
        shutil.rmtree(folder)
    report.seconds["all"] = time.monotonic() - began
    return report


def _rehearse(plan: Plan, swarm: LocalSwarm, progress: Progress) -> Report:
    homes = swarm.folder
    maintainers = [f"maintainer-{i + 1}" for i in range(plan.maintainers)]
    domains = DOMAINS[: plan.contributors]
    with progress.step(f"making the lineage, with {plan.maintainers} maintainer(s)", "lineage"):
        keys = tuple(Home.open(homes / name).key.peer for name in maintainers)
        lineage = found(
            Home.open(homes / "bootstrap"),
            starter.MODEL,
            Founding(
                starter.NAME,
                keys,
                plan.maintainers // 2 + 1,
                starter.EXAM,
                licence=starter.LICENCE,
                schedule=Schedule(min_patches=plan.contributors, open_seconds=900.0),
            ),
        )
    spans = split_layers(lineage.manifest.layers, plan.hosts)
    with progress.step(f"starting {1 + plan.hosts + plan.maintainers + plan.contributors} nodes", "start") as more:
        common: tuple[str, ...] = ("--model", lineage.model)
        if plan.swarm_key:
            common = (*common, "--swarm-key", str(plan.swarm_key.resolve()))
        bootstrap = swarm.start("bootstrap", *common, "--layers", "none", "--threads", "1")
        bootstrap.wait_until_serving(time.monotonic() + 120)
        common = (*common, "--peers", bootstrap.address)
        for index, span in enumerate(spans):
            swarm.start(f"host-{index + 1}", *common, "--layers", str(span), "--threads", "1")
        for name in maintainers:
            swarm.start(name, *common, "--layers", "none", "--maintain")
        for domain in domains:
            swarm.start(domain, *common, "--layers", "none", "--threads", "1")
        swarm.wait_until_serving(each=lambda node: more(f"{node.name} serves"))
    for index, span in enumerate(spans):
        progress.say(f"  host-{index + 1} holds layers {span} of {lineage.manifest.layers}")

    with SwarmClient.connect(homes / "client", (bootstrap.address,), lineage.model, None, plan.swarm_key) as client:
        answers = [_ask(client, plan, progress)]
        versions: list[VersionReport] = []
        number = VersionNumber(1, 0, 0)
        for _ in range(plan.rounds):
            number = number.next_patch()
            versions.append(_round(swarm, number, domains, lineage, progress))
            client.refresh()
            answers.append(_ask(client, plan, progress))
    lineage.refresh()
    return Report(
        model=lineage.model,
        base_exam={s.domain: s.base for s in lineage.versions[0].scores},
        versions=versions,
        answers=answers,
        spans={f"host-{i + 1}": str(s) for i, s in enumerate(spans)},
        traffic=_traffic(swarm),
        seconds=progress.seconds,
        folder=str(homes),
        address=bootstrap.address if plan.keep else "",
        pids={name: node.process.pid for name, node in swarm.nodes.items()} if plan.keep else {},
    )


def split_layers(layers: int, hosts: int) -> list[Span]:
    """As even as it goes."""
    cuts = [round(i * layers / hosts) for i in range(hosts + 1)]
    return [Span(a, b) for a, b in itertools.pairwise(cuts)]


def _ask(client: SwarmClient, plan: Plan, progress: Progress) -> Answer:
    progress.say(
        f"asking {client.lineage.manifest.name} {client.lineage.number(client.lineage.head)} through the swarm:"
    )
    progress.stream(plan.prompt)
    answer = client.generate(plan.prompt, Sampling(plan.max_new_tokens), "head", "fp16", progress.stream)
    progress.stream("\n")
    progress.say(
        f"  {answer.tokens} tokens of version {answer.number} in {answer.seconds:.1f} s, through {answer.route_text}"
    )
    return answer


def _round(
    swarm: LocalSwarm, number: VersionNumber, domains: Sequence[str], lineage: Lineage, progress: Progress
) -> VersionReport:
    seconds: dict[str, float] = {}
    began = time.monotonic()
    with progress.step(f"training {len(domains)} (IA)³ patches for {number} ({', '.join(domains)})", "train"):
        trained = _train(swarm.folder, domains, number)
    seconds["train"] = time.monotonic() - began
    for domain, patch in trained.items():
        progress.say(
            f"  {domain}: held-out loss {patch['loss_before']:.4f} → {patch['loss_after']:.4f} nats per token, "
            f"{patch['bytes']} bytes"
        )
    began = time.monotonic()
    with progress.step(f"publishing, examining, merging, adopting {number}", "round"):
        for domain, patch in trained.items():
            _publish(swarm.nodes[domain], Path(patch["file"]))
        swarm.wait_for_head(str(number), ADOPTION_SECONDS)
    seconds["round"] = time.monotonic() - began
    lineage.refresh()
    version = next(v for v in lineage.versions if v.candidate.number == number)
    left_out = {x.patch: x.reason for x in version.candidate.left_out}
    patches = [
        PatchReport(
            id=p["id"],
            domain=domain,
            contributor=lineage.patches[p["id"]].contributor,
            bytes=p["bytes"],
            loss_before=p["loss_before"],
            loss_after=p["loss_after"],
            state=f"left out: {left_out[p['id']]}" if p["id"] in left_out else "merged",
        )
        for domain, p in trained.items()
    ]
    return VersionReport(
        number=str(number),
        id=version.id,
        alpha=version.candidate.alpha,
        exam={s.domain: s.candidate for s in version.scores},
        mean={s.domain: s.mean for s in version.scores if s.mean is not None},
        patches=patches,
        seconds=seconds,
    )


def _train(homes: Path, domains: Sequence[str], number: VersionNumber) -> dict[str, dict[str, Any]]:
    commands = {
        domain: [
            sys.executable,
            "-m",
            "p2pmodel",
            "train",
            "--data",
            str(starter.DOMAINS / f"{domain}.txt"),
            "--home",
            str(homes / domain),
            "--output",
            str(homes / domain / f"for-{number}{PATCH_SUFFIX}"),
            "--licence",
            "PSF-2.0",
            "--seed",
            str(number.patch),
            "--model",
            starter.NAME,
            "--threads",
            "1",
            "--json",
            *TRAINING,
        ]
        for domain in domains
    }
    running = {
        domain: subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for domain, c in commands.items()
    }
    try:
        return {domain: _result(process, commands[domain]) for domain, process in running.items()}
    finally:
        for process in running.values():
            if process.poll() is None:
                process.kill()


def _publish(node: NodeProcess, file: Path) -> None:
    """As `p2pmodel patch publish` does, without loading torch once more."""
    record = take_in(Lineage(Home.open(node.home), patchfile.read(file).patch.model), file.read_bytes())
    with node.control() as client:
        client.publish(record.digest)


def _result(process: subprocess.Popen[str], command: Sequence[str]) -> dict[str, Any]:
    out, err = process.communicate()
    if process.returncode:
        last = err.strip().splitlines()[-1] if err.strip() else "it wrote nothing"
        raise P2PModelError(f"`{' '.join(command[1:5])}` ended with status {process.returncode}: {last}")
    result: dict[str, Any] = json.loads(out)
    return result


def _traffic(swarm: LocalSwarm) -> dict[str, float]:
    total: dict[str, float] = {}
    for node in swarm.nodes.values():
        with node.control() as client:
            traffic = client.status().traffic
        for name, value in traffic.items():
            total[name] = total.get(name, 0) + value
    return total
