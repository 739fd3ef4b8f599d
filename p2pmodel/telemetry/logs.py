"""Logs on stderr: coloured on a terminal, one plain line each in a file or a pipe, or a JSON object each."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

from p2pmodel.domain.errors import P2PModelError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
FORMATS = ("text", "json")
FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"

_THIRD_PARTIES = (
    "asyncio",
    "filelock",
    "grpc",
    "hivemind",
    "httpcore",
    "httpx",
    "libp2p",
    "multiaddr",
    "transformers",
    "urllib3",
)
"""They log at WARNING and below what is no concern of an operator; they speak at ERROR, or when the level is DEBUG."""


def configure(level: str = "WARNING", stream: TextIO | None = None, form: str = "text") -> None:
    """Replaces whatever handlers the root logger has. `stream` is stderr when none is given; form: one of FORMATS.

    As `json`, each record is one line: an object with `time` (UTC, ISO 8601, milliseconds), `level`, `logger` and
    `message`, and `traceback` where there is one.

    Raises UsageError for a level that is none of LEVELS, or a format that is none of FORMATS.
    """
    name = level.upper()
    if name not in LEVELS:
        raise UsageError(f"There is no log level {level!r}.", f"Choose one of {', '.join(LEVELS)}.")
    if form not in FORMATS:
        raise UsageError(f"There is no log format {form!r}.", f"Choose one of {', '.join(FORMATS)}.")
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_handler(stream or sys.stderr, form))
    root.setLevel(name)
    for party in _THIRD_PARTIES:
        logger = logging.getLogger(party)
        logger.setLevel(logging.NOTSET if name == "DEBUG" else logging.ERROR)
        logger.propagate = True
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
    logging.captureWarnings(name == "DEBUG" or form == "json")


def for_programs() -> bool:
    """Whether what is logged is JSON."""
    return any(isinstance(handler.formatter, _Json) for handler in logging.getLogger().handlers)


def report(error: P2PModelError) -> bool:
    """Logs what ended the program, where a reader of JSON expects nothing else on stderr; otherwise False."""
    if not for_programs():
        return False
    logging.getLogger("p2pmodel").error("%s", error)
    return True


@contextmanager
def above(console: "Console") -> Iterator[None]:
    """While something live is drawn on `console`, logs for a terminal go above it."""
    from rich.logging import RichHandler

    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, RichHandler)]
    before = [handler.console for handler in handlers]
    for handler in handlers:
        handler.console = console
    try:
        yield
    finally:
        for handler, own in zip(handlers, before, strict=True):
            handler.console = own


def _handler(stream: TextIO, form: str) -> logging.Handler:
    if form == "json" or not stream.isatty():
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_Json() if form == "json" else _OneLine(FORMAT))
        return handler
    from rich.console import Console
    from rich.logging import RichHandler

    return RichHandler(console=Console(file=stream), show_path=False, rich_tracebacks=False, log_time_format="[%X]")


class _OneLine(logging.Formatter):
    """One record, one line, whatever a peer has put into its text; only a defect's traceback takes more."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)
