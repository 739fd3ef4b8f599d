"""What a session has sent: enough to send it again to other peers."""

import torch
from torch import Tensor

from p2pmodel.engine.steps import Note


class History:
    """Shapes: B rows, n tokens so far, H wide. Positions and masks are kept only once a step has had some."""

    def __init__(self) -> None:
        self._hidden: list[Tensor] = []
        self._mask: Tensor | None = None
        self._positions: Tensor | None = None
        self._order: Tensor | None = None
        self.tokens = 0

    def add(self, hidden: Tensor, position: int, note: Note) -> None:
        """A step [B, T, H] at `position`, which may lie before the end: what followed is forgotten."""
        if position < self.tokens:
            self._cut(position)
        rows, tokens = hidden.shape[:2]
        if note.order is not None:
            self._hidden = [self._whole()[note.order]] if self._hidden else []
            self._mask = None if self._mask is None else self._mask[note.order]
            self._positions = None if self._positions is None else self._positions[note.order]
        if note.mask is not None or self._mask is not None:
            before = torch.ones(rows, self.tokens, dtype=torch.bool) if self._mask is None else self._mask
            now = torch.ones(rows, tokens, dtype=torch.bool) if note.mask is None else note.mask
            self._mask = torch.cat([before, now], dim=1)
        if note.positions is not None or self._positions is not None:
            before = _following(0, rows, self.tokens) if self._positions is None else self._positions
            now = _following(self.tokens, rows, tokens) if note.positions is None else note.positions
            self._positions = torch.cat([before, now], dim=1)
        self._hidden.append(hidden)
        self.tokens += tokens

    def replay(self, wanted: int) -> tuple[Tensor, Note]:
        """All of it as one step at position 0, with the outputs of the last `wanted` tokens."""
        return self._whole(), Note(self._mask, self._positions, None, wanted)

    def _whole(self) -> Tensor:
        if len(self._hidden) > 1:
            self._hidden = [torch.cat(self._hidden, dim=1)]
        return self._hidden[0]

    def _cut(self, position: int) -> None:
        self._hidden = [self._whole()[:, :position]] if position else []
        self._mask = None if self._mask is None else self._mask[:, :position]
        self._positions = None if self._positions is None else self._positions[:, :position]
        self.tokens = position


def _following(start: int, rows: int, tokens: int) -> Tensor:
    return torch.arange(start, start + tokens).expand(rows, tokens)
