"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), from a folder of the user's
own, on a model at a state. The harness is an extra; nothing else imports it.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.engine.evaluation import attached
from p2pmodel.tensors.patch_kind import Runs

BATCH = 8
SEED = 1234
"""Of the examples that a task shows before a question: the harness's own."""


@dataclass(frozen=True)
class TaskScore:
    """`score` as the harness gives it, by task, metric and filter."""

    task: str
    metric: str
    cases: int
    score: float
    higher_is_better: bool


class Harness:
    """The tasks that a folder's YAML files define. Their data are named relative to the folder."""

    def __init__(self, folder: Path, names: Sequence[str] = (), limit: int | None = None) -> None:
        """names: of tasks or groups, all in the folder when there are none; limit: cases of each. A task's Python
        functions are run, so the folder has to be trusted. Raises InvalidInput."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise InvalidInput(
                "lm-evaluation-harness is not installed.", "Install it: pip install 'p2pmodel[harness]'"
            ) from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._folder, self._limit = folder.resolve(), limit
        self._manager = TaskManager(include_path=str(self._folder), include_defaults=False)
        known = sorted(self._manager.all_tasks)
        if not known:
            raise InvalidInput(
                f"{folder} defines no tasks of lm-evaluation-harness.", "It needs a YAML file with a task."
            )
        if unknown := sorted(set(names) - set(known)):
            raise InvalidInput(f"{folder} defines no task {unknown[0][:64]!r}.", f"It has {', '.join(known)[:400]}.")
        self.names = tuple(dict.fromkeys(names)) or tuple(known)

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: Runs, state: Mapping[str, Tensor]
    ) -> list[TaskScore]:
        """Sorted by task and metric. Raises InvalidInput for a task that the harness cannot run."""
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        with self._there(), attached(model, kind, state) as applier, applier.use(state):
            try:
                tasks = self._manager.load(list(self.names))
                for task in tasks["tasks"].values():
                    task.set_fewshot_seed(SEED)
                whole = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
                found: dict[str, Any] = evaluate(whole, tasks, limit=self._limit, bootstrap_iters=0)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
                raise InvalidInput(f"lm-evaluation-harness cannot run these tasks: {error}.") from None
        return sorted(_scores(found), key=lambda score: (score.task, score.metric))

    @contextmanager
    def _there(self) -> Iterator[None]:
        """In the folder, and without the harness's progress bars, unless somebody wants them."""
        quiet = "TQDM_DISABLE" not in os.environ
        os.environ.setdefault("TQDM_DISABLE", "1")
        try:
            with contextlib.chdir(self._folder):
                yield
        finally:
            if quiet:
                del os.environ["TQDM_DISABLE"]


def _scores(found: Mapping[str, Any]) -> Iterator[TaskScore]:
    for task, entries in found["results"].items():
        directions, counts = found["higher_is_better"].get(task, {}), found["n-samples"].get(task, {})
        for key, value in entries.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                name = metric if filtered == "none" else f"{metric}/{filtered}"
                better = directions.get(metric)
                yield TaskScore(task, name, int(counts.get("effective", 0)), float(value), better is not False)
