"""What a training shows: a bar on a terminal, a line a checkpoint elsewhere; at the end its losses."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from p2pmodel.cli.output import demand_place, emit, size
from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import short

if TYPE_CHECKING:
    from p2pmodel.engine.training.loop import Step, Trained
    from p2pmodel.node.lineages.lineage import Lineage
    from p2pmodel.node.patches.contributing import NewPatch

_BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40


class TrainingDisplay:
    """A `with` block around a training; call it with every step."""

    def __init__(self, steps: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self._console, disable=not sys.stderr.isatty())
        self._task = self._progress.add_task("training", total=steps, loss="-", speed="")
        self._steps, self._tokens, self._resumed = steps, 0, 0
        self._began = time.monotonic()

    def __enter__(self) -> "TrainingDisplay":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if kind is KeyboardInterrupt:
            self._console.print("broken off; the same command goes on from the last checkpoint", soft_wrap=True)

    def __call__(self, step: "Step") -> None:
        if step.resumed:
            self._resumed, self._began = step.number, time.monotonic()
            return
        if self._resumed == step.number - 1 and self._resumed and not self._tokens:
            self._progress.reset(self._task, total=self._steps, completed=self._resumed)
            self._console.print(
                f"an earlier run was broken off; going on after step {self._resumed} of {self._steps} "
                "(--restart begins anew)",
                soft_wrap=True,
            )
        self._tokens += step.tokens
        speed = f"{self._tokens / max(1e-9, time.monotonic() - self._began):,.0f} tokens/s"
        self._progress.update(self._task, completed=step.number, loss=f"{step.loss:.3f}", speed=speed)
        if step.held_out is not None and self._progress.disable:
            self._console.print(
                f"step {step.number} of {self._steps}: loss {step.loss:.4f}, held out {step.held_out:.4f}, {speed}"
            )


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """At most `width` bars from the lowest to the highest value; where there are more values, means of some."""
    if not values:
        return ""
    width = min(width, len(values))
    parts = [values[at * len(values) // width : (at + 1) * len(values) // width] for at in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, spread = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int((mean - low) / spread * len(_BARS)))] for mean in means)


def show_patch(new: "NewPatch", path: Path, lineage: "Lineage", number: str, json: bool) -> None:
    """At the end of a training."""
    patch, trained = new.patch, new.trained
    lines = [
        f"losses {sparkline(trained.losses)} {trained.losses[0]:.3f} to {trained.losses[-1]:.3f}, in training",
        f"held-out loss {patch.loss_before:.4f} before, {patch.loss_after:.4f} after (nats per token)",
    ]
    if trained.best == 0:
        lines.append("the patch changes nothing: no checkpoint was better than the parent on what is held out")
    if new.skipped:
        lines.append(f"{new.skipped} broken lines were left out")
    lines += [
        f"patch {short(new.id)} on {lineage.manifest.name} {number}: {size(new.size)} "
        f"(adapter {size(patch.adapter.size)}, Fisher {size(patch.fisher.size)})",
        f"written to {path}; give it to the swarm with: p2pmodel patch publish {path}",
    ]
    emit(
        {
            "file": str(path),
            "id": new.id,
            "parent": number,
            "loss_before": patch.loss_before,
            "loss_after": patch.loss_after,
            "bytes": new.size,
            "adapter_bytes": patch.adapter.size,
            "fisher_bytes": patch.fisher.size,
            "samples": patch.samples,
            "tokens": trained.tokens,
            "skipped": new.skipped,
            "steps": len(trained.losses),
            "held_out": list(trained.held_out),
        },
        "\n".join(lines),
        json,
    )


def demand_plots(path: Path) -> None:
    """Raises InvalidInput where nothing is installed that draws, the file's suffix is none that can be drawn, or there
    is no place for it."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InvalidInput(f"A plot cannot be written to {path.name}.", "Name a file that ends in .png, .svg or .pdf.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InvalidInput(
            "Plots need matplotlib, which is not installed.", "Install it: pip install 'p2pmodel[plots]'"
        ) from None
    demand_place(path)


def plot(path: Path, trained: "Trained", checkpoint_every: int) -> None:
    """The loss of every step, and on what is held out at every checkpoint. Raises InvalidInput."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = len(trained.losses)
    at = [min(index * checkpoint_every, steps) for index in range(len(trained.held_out))]
    axes.plot(range(1, steps + 1), trained.losses, linewidth=1, label="training")
    axes.plot(at, trained.held_out, marker="o", label="held out")
    axes.axvline(at[trained.best], color="grey", linestyle=":", label="what the patch is")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InvalidInput(f"The plot cannot be written to {path}: {error.strerror or error}.") from None
