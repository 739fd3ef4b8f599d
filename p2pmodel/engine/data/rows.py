"""Files of rows, one example each: JSON lines, JSON arrays and Parquet, with the columns that the field has settled on.

- `messages`: a chat, a list of {"role": …, "content": …}; its `assistant` turns are what is learned;
- `prompt` and `completion`: the completion is learned, and follows the prompt as it is, without a blank between;
- `text`: all of it is learned.

A row with several of these is taken for the first of this list; other columns do not matter.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.engine.data.texts import MAX_TEXT_BYTES, file_size, unreadable

COLUMNS = ("messages", "prompt", "completion", "text")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = (".jsonl", ".ndjson", ".json", *PARQUET_SUFFIXES)
MAX_FILE_BYTES = 16 << 30
MAX_ROW_BYTES = 4 << 20
MAX_TURNS = 1024
ANSWERING = "assistant"
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Completion:
    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """turns: (role, content); the last one is of the assistant."""

    turns: tuple[tuple[str, str], ...]


Example = Text | Completion | Chat


class Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


def parse(row: Any) -> Example:
    """Raises ValueError that says what is wrong, as the end of a sentence that begins with the line."""
    if not isinstance(row, dict):
        raise ValueError("is no object with named columns")
    if row.get("messages") is not None:
        return _chat(row["messages"])
    if row.get("prompt") is not None or row.get("completion") is not None:
        prompt, completion = (_string(row, name) for name in ("prompt", "completion"))
        if not completion.strip():
            raise ValueError("has an empty completion")
        return Completion(prompt, completion)
    if row.get("text") is not None:
        text = _string(row, "text")
        if not text.strip():
            raise ValueError("has an empty text")
        return Text(text)
    raise ValueError("has none of messages, prompt and completion, text")


def read_rows(path: Path, hashed: Hash) -> Iterator[tuple[int, Example | str]]:
    """(number, see `noun_of`, counted from 1, the example or what is wrong with it), by the file's suffix.

    All of the file's bytes have gone through `hashed` when the iterator ends. Raises InvalidInput.
    """
    if file_size(path) > MAX_FILE_BYTES:
        raise InvalidInput(f"{path.name} is larger than {MAX_FILE_BYTES >> 30} GiB.", "Train on a part of it.")
    if path.suffix.lower() in PARQUET_SUFFIXES:
        rows = _parquet(path, hashed)
    else:
        rows = _json_array(path, hashed) if _is_array(path) else _json_lines(path, hashed)
    for number, row in rows:
        if isinstance(row, str):
            yield number, row
            continue
        try:
            yield number, parse(row)
        except ValueError as error:
            yield number, str(error)


def noun_of(path: Path) -> str:
    """What the numbers of `read_rows` count: `line`, or `row` where rows are no lines. Raises InvalidInput."""
    return "row" if path.suffix.lower() in PARQUET_SUFFIXES or _is_array(path) else "line"


def _is_array(path: Path) -> bool:
    """Whether a `.json` file is one array of rows; others are JSON lines."""
    if path.suffix.lower() != ".json":
        return False
    try:
        with path.open("rb") as file:
            return file.read(4096).removeprefix(_MARK).lstrip().startswith(b"[")
    except OSError as error:
        raise unreadable(path, error) from None


def _json_array(path: Path, hashed: Hash) -> Iterator[tuple[int, Any]]:
    if file_size(path) > MAX_TEXT_BYTES:
        raise InvalidInput(
            f"{path.name} is one JSON array of more than {MAX_TEXT_BYTES >> 20} MiB.", "Write it as JSON lines."
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    hashed.update(raw)
    try:
        rows = msgspec.json.decode(raw.removeprefix(_MARK), type=list[msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise InvalidInput(f"{path.name} is not valid JSON.", "Mend it, or write it as JSON lines.") from None
    for number, row in enumerate(rows, 1):
        text = bytes(row)
        yield number, _decoded(text) if len(text) <= MAX_ROW_BYTES else f"is longer than {MAX_ROW_BYTES >> 20} MiB"


def _json_lines(path: Path, hashed: Hash) -> Iterator[tuple[int, Any]]:
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_ROW_BYTES + 1):
                number += 1
                hashed.update(raw)
                if len(raw) > MAX_ROW_BYTES:
                    while raw and not raw.endswith(b"\n"):
                        raw = file.readline(MAX_ROW_BYTES)
                        hashed.update(raw)
                    yield number, f"is longer than {MAX_ROW_BYTES >> 20} MiB"
                    continue
                raw = raw.removeprefix(_MARK) if number == 1 else raw
                if raw.strip():
                    yield number, _decoded(raw)
    except OSError as error:
        raise unreadable(path, error) from None


def _decoded(raw: bytes) -> Any:
    try:
        row = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return "is not valid JSON"
    return ["no object"] if isinstance(row, str) else row


def _parquet(path: Path, hashed: Hash) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InvalidInput(
            f"{path.name} is a Parquet file, and pyarrow, which reads them, is not installed.",
            "Install it: pip install 'p2pmodel[parquet]'",
        ) from None
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                hashed.update(chunk)
        with parquet.ParquetFile(path, memory_map=False) as table:
            columns = [name for name in COLUMNS if name in table.schema_arrow.names]
            if not columns:
                raise InvalidInput(f"{path.name} has none of the columns {', '.join(COLUMNS)}.", "Rename its columns.")
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        reason = str(error).split("\n")[0][:200].rstrip(".")
        raise InvalidInput(f"{path.name} is no Parquet file that can be read: {reason}.", "Write it again.") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _chat(messages: Any) -> Chat:
    if not isinstance(messages, list) or not messages or len(messages) > MAX_TURNS:
        raise ValueError(f"has messages that are no list of 1 to {MAX_TURNS}")
    turns: list[tuple[str, str]] = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError("has a message without role and content")
        if message.get("content") is None and message.get("tool_calls"):
            raise ValueError("has a message that calls tools, which cannot be learned")
        turns.append((_string(message, "role"), _string(message | _joined(message), "content")))
    while turns and turns[-1][0] != ANSWERING:
        turns.pop()  # nothing is learned from what has no answer
    if not turns or not any(content.strip() for role, content in turns if role == ANSWERING):
        raise ValueError(f"has no message of the role {ANSWERING}")
    return Chat(tuple(turns))


def _joined(message: dict[Any, Any]) -> dict[str, str]:
    """Its content as one text, where it is a list of parts that are all text."""
    parts = message.get("content")
    if not isinstance(parts, list) or not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        return {}
    return {"content": "".join(_string(part, "text") for part in parts)}


def _string(row: dict[Any, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"has no {name}" if value is None else f"has a {name} that is no text")
    if "\0" in value:
        raise ValueError(f"has a {name} with NUL characters")
    return value


def new_hash() -> Hash:
    return hashlib.sha256()
