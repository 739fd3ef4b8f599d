"""Scores of a model's states on a suite, whole or case by case."""

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from p2pmodel.engine.exams.bench import Bench
from p2pmodel.engine.exams.rows import Split
from p2pmodel.engine.exams.sections import Measured
from p2pmodel.engine.exams.suite import Suite
from p2pmodel.tensors.patch_kind import Runs


class Examiner:
    """Scores states of one model. What it says depends on its arguments alone, on one kind of CPU."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: Runs, suite: Suite) -> None:
        self._kind, self.suite = kind, suite
        self._bench = Bench(model, tokenizer)
        self._referred: set[Split] = set()

    def score(self, state: Mapping[str, Tensor], split: Split) -> dict[str, float]:
        """By section, lower is better: nats per byte of a domain, the share of failed cases of every other. Raises
        Rejected("finite") when the model's losses are not numbers."""
        return {name: measured.score for name, measured in self.measure(state, split).items()}

    def measure(
        self, state: Mapping[str, Tensor], split: Split, cases: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, Measured]:
        """Case by case, by section. cases: which of them, by number; None for all. Raises Rejected("finite")."""
        self._refer(split)
        measured = {}
        with self._bench.at(self._kind, state):
            for section in self.suite.sections:
                wanted = range(section.count(split)) if cases is None else cases.get(section.name, ())
                if wanted:
                    measured[section.name] = section.measure(self._bench, split, wanted)
        return measured

    def _refer(self, split: Split) -> None:
        if split not in self._referred:
            self._bench.refer([text for section in self.suite.sections for text in section.references(split)])
            self._referred.add(split)
