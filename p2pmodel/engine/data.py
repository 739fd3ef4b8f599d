"""Training data: a user's text files, packed into blocks of tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import Digest

MAX_TEXT_BYTES = 256 << 20
MIN_TOKENS = 32


@dataclass(frozen=True)
class TextFile:
    """`name` is the base name, `digest` and `size` are of the file's bytes."""

    name: str
    digest: Digest
    size: int
    text: str


def read_texts(paths: Sequence[Path]) -> list[TextFile]:
    """Raises InvalidInput that names the first file that cannot be used, and why."""
    if not paths:
        raise InvalidInput("No text files were given.", "Name at least one UTF-8 text file.")
    return [_read_text(Path(path)) for path in paths]


def blocks(texts: Sequence[TextFile], tokenizer: PreTrainedTokenizerBase, sequence: int) -> Tensor:
    """[N, sequence + 1] int64: the texts end to end, with the end-of-text token around each if there is one.

    The last token of a block is the first of the next, so that each is predicted once; what does not fill a block is
    left out. Little text makes for shorter blocks, so that there are always two. Raises InvalidInput below 32 tokens.
    """
    between = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    ids = list(between)
    for text in texts:
        ids += [*_encode(tokenizer, text.text), *between]
    if len(ids) < MIN_TOKENS + 1:
        raise InvalidInput(
            f"The texts hold {len(ids) - len(between)} tokens, too few to train on.",
            f"Give at least {MIN_TOKENS} tokens, better some ten thousand.",
        )
    sequence = min(sequence, (len(ids) - 1) // 2)
    return torch.tensor(ids, dtype=torch.int64).unfold(0, sequence + 1, sequence).contiguous()


def split(blocks: Tensor, seed: int, share: float = 0.1) -> tuple[Tensor, Tensor]:
    """(train, held out), disjoint, drawn by the seed, at least one block each. Raises InvalidInput for one block."""
    if len(blocks) < 2:
        raise InvalidInput("The texts are too short to hold a part of them out.", "Give more text.")
    held_out = min(len(blocks) - 1, max(1, round(len(blocks) * share)))
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return blocks[order[held_out:]], blocks[order[:held_out]]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _read_text(path: Path) -> TextFile:
    name = path.name or str(path)
    try:
        if path.is_dir():
            raise InvalidInput(f"{name} is a folder, not a text file.", "Name the files in it.")
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise InvalidInput(f"{name} is larger than {MAX_TEXT_BYTES >> 20} MiB.", "Train on a part of it.")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InvalidInput(f"{name} does not exist.", "Check the path.") from None
    except OSError as error:
        raise InvalidInput(f"{name} cannot be read: {error.strerror or error}.", "Check its permissions.") from None
    if not raw:
        raise InvalidInput(f"{name} is empty.", "Name a file with text in it.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InvalidInput(f"{name} is not a UTF-8 text file.", "Convert it to UTF-8 text first.")
    if not text.strip():
        raise InvalidInput(f"{name} holds nothing but blanks.", "Name a file with text in it.")
    return TextFile(name, Digest(hashlib.sha256(raw).hexdigest()), len(raw), text)
