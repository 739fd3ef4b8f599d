"""Blocks of tokens to train on, made of texts and of answers.

Texts are laid end to end and cut. Examples with an answer stay whole; as many as fit share a block, one after another,
and attend to those before them in the block, as texts do; with packing off each has a block of its own. What is over is
padding at the end, where causal attention does not look; neither padding nor prompts have labels.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pmodel.engine.data.encoding import Answer

IGNORED = -100
"""The label of what is not learned; torch's cross_entropy leaves it out."""


@dataclass(frozen=True)
class Blocks:
    """ids: [N, S + 1] int64; labels: [N, S] int64, what follows each token but the last, or IGNORED."""

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> "Blocks":
        return Blocks(self.ids[rows], self.labels[rows])

    @property
    def tokens(self) -> int:
        """That are learned."""
        return int((self.labels != IGNORED).sum())

    @classmethod
    def of_ids(cls, ids: Tensor) -> "Blocks":
        """All of which is learned: [N, S + 1] int64."""
        return cls(ids, ids[:, 1:])

    @classmethod
    def join(cls, parts: Sequence["Blocks"]) -> "Blocks":
        """Narrow blocks are padded to the width of the widest."""
        width = max(part.ids.shape[1] for part in parts)
        ids = [torch.nn.functional.pad(part.ids, (0, width - part.ids.shape[1])) for part in parts]
        labels = [torch.nn.functional.pad(p.labels, (0, width - p.ids.shape[1]), value=IGNORED) for p in parts]
        return cls(torch.cat(ids), torch.cat(labels))


def text_blocks(ids: Sequence[int], sequence: int) -> Blocks:
    """The last token of a block is the first of the next, so that each is predicted once; what does not fill a block is
    left out."""
    return Blocks.of_ids(torch.tensor(ids, dtype=torch.int64).unfold(0, sequence + 1, sequence).contiguous())


def answer_blocks(answers: Sequence[Answer], sequence: int, packing: bool) -> Blocks:
    """Answers longer than a block are cut, see `Answer.window`."""
    windows = [answer.window(sequence + 1) for answer in answers]
    rows = _packed(windows, sequence + 1) if packing else [[window] for window in windows]
    width = max(2, *(sum(len(window.ids) for window in row) for row in rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    learned = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        at = 0
        for window in row:
            end = at + len(window.ids)
            ids[index, at:end] = torch.tensor(window.ids, dtype=torch.int64)
            learned[index, at:end] = torch.tensor(list(window.learned), dtype=torch.bool)
            at = end
    return Blocks(ids, torch.where(learned[:, 1:], ids[:, 1:], IGNORED))


def _packed(windows: Sequence[Answer], width: int) -> list[list[Answer]]:
    """Best fit, the longest first; among equals the earlier one."""
    rows: list[list[Answer]] = []
    room: list[tuple[int, int]] = []
    for window in sorted(windows, key=lambda window: -len(window.ids)):
        at = bisect_left(room, (len(window.ids), 0))
        left, index = room.pop(at) if at < len(room) else (width, len(rows))
        if index == len(rows):
            rows.append([])
        rows[index].append(window)
        insort(room, (left - len(window.ids), index))
    return rows
