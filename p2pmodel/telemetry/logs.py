"""Logs on stderr: coloured on a terminal, one plain line each in a file or a pipe."""

import logging
import sys
from typing import TextIO

from p2pmodel.domain.errors import UsageError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
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


def configure(level: str = "WARNING", stream: TextIO | None = None) -> None:
    """Replaces whatever handlers the root logger has. `stream` is stderr when none is given.

    Raises UsageError for a level that is none of LEVELS.
    """
    name = level.upper()
    if name not in LEVELS:
        raise UsageError(f"There is no log level {level!r}.", f"Choose one of {', '.join(LEVELS)}.")
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_handler(stream or sys.stderr))
    root.setLevel(name)
    for party in _THIRD_PARTIES:
        logger = logging.getLogger(party)
        logger.setLevel(logging.NOTSET if name == "DEBUG" else logging.ERROR)
        logger.propagate = True
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
    logging.captureWarnings(name == "DEBUG")


def _handler(stream: TextIO) -> logging.Handler:
    if not stream.isatty():
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_OneLine(FORMAT))
        return handler
    from rich.console import Console
    from rich.logging import RichHandler

    return RichHandler(console=Console(file=stream), show_path=False, rich_tracebacks=False, log_time_format="[%X]")


class _OneLine(logging.Formatter):
    """One record, one line, whatever a peer has put into its text; only a defect's traceback takes more."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")
