"""Users' texts: what is refused, in one sentence, and how the rest is cut into blocks."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.engine.data import TextFile, blocks, read_texts, split
from p2pmodel.wire import canonical

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer(eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte."""
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*ALPHABET, "<end>"])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner, **({"eos_token": "<end>"} if eos else {})
    )


TOKENIZER = byte_tokenizer()
END = 256


def text(content: str) -> TextFile:
    return TextFile("t.txt", canonical.digest(content.encode()), len(content.encode()), content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "nothing but blanks"),
        (b"abc\x00def", "not a UTF-8 text"),
        (b"\xff\xfe\x00a", "not a UTF-8 text"),
        ("ä".encode("latin-1"), "not a UTF-8 text"),
    ],
)
def test_files_that_are_no_texts_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "f.txt").write_bytes(content)
    with pytest.raises(InvalidInput, match=says) as refused:
        read_texts([tmp_path / "f.txt"])
    assert refused.value.message.startswith("f.txt ")
    assert refused.value.hint


def test_missing_files_folders_and_nothing_are_refused(tmp_path: Path) -> None:
    for paths, says in (([tmp_path / "no.txt"], "does not exist"), ([tmp_path], "is a folder"), ([], "No text files")):
        with pytest.raises(InvalidInput, match=says):
            read_texts(paths)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser can read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("text")
    (tmp_path / "f.txt").chmod(0)
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_texts([tmp_path / "f.txt"])


def test_a_text_is_read_with_its_digest(tmp_path: Path) -> None:
    raw = b"\xef\xbb\xbfwith a mark\n"
    (tmp_path / "f.txt").write_bytes(raw)
    assert read_texts([tmp_path / "f.txt"]) == [TextFile("f.txt", canonical.digest(raw), len(raw), "with a mark\n")]


@given(st.lists(st.text("abc é", min_size=20, max_size=60), min_size=2, max_size=4), st.integers(4, 40))
def test_blocks_predict_each_token_once(contents: list[str], sequence: int) -> None:
    stream = [END]
    for content in contents:
        stream += [*TOKENIZER(content)["input_ids"], END]
    cut = blocks([text(c) for c in contents], TOKENIZER, sequence)
    width = cut.shape[1] - 1
    assert cut.dtype == torch.int64
    assert width <= sequence
    assert len(cut) >= 2
    targets = cut[:, 1:].flatten().tolist()
    assert [int(cut[0, 0]), *targets] == stream[: len(targets) + 1]
    assert len(stream) - 1 - len(targets) < width


def test_little_text_makes_shorter_blocks() -> None:
    assert blocks([text("x" * 40)], TOKENIZER, 256).shape == (2, 21)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(InvalidInput, match="too few"):
        blocks([text("x" * 30)], TOKENIZER, 256)


def test_a_tokenizer_without_an_end_works() -> None:
    assert blocks([text("x" * 41)], byte_tokenizer(eos=False), 20).shape == (2, 21)


@given(st.integers(2, 60), st.integers(0, 5), st.floats(0, 1))
def test_the_split_is_disjoint_complete_and_the_seeds(count: int, seed: int, share: float) -> None:
    rows = torch.arange(count).repeat_interleave(3).view(count, 3)
    train, held_out = split(rows, seed, share)
    assert len(train) >= 1
    assert len(held_out) >= 1
    assert sorted([*train[:, 0].tolist(), *held_out[:, 0].tolist()]) == list(range(count))
    again = split(rows, seed, share)
    assert torch.equal(train, again[0])
    assert torch.equal(held_out, again[1])


def test_one_block_cannot_be_split() -> None:
    with pytest.raises(InvalidInput):
        split(torch.zeros(1, 5, dtype=torch.int64), 0)
