"""What the documents say to type, and what they say comes out."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = ("reference/commands.md", "reference/recipes.md", "metrics.md", "models.md", "control-api.md")

ELLIPSIS = "…"
SHELLS = ("sh", "bash", "console", "")
_FENCE = re.compile(r"^( *)```([a-z]*)([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`(p2pmodel [^`]+)`(?!`)")
_OPERATORS = re.compile(r"[|;&()<>]+")


@dataclass(frozen=True)
class Block:
    """A fenced block. title: of `title="…"` behind the language; line: of its first line in the file."""

    language: str
    title: str
    text: str
    line: int


@dataclass(frozen=True)
class Line:
    """A command as it is typed, with its number in the file. whole: of a block; a mention in a text may leave out what
    the command needs."""

    number: int
    text: str
    whole: bool


def pages() -> list[str]:
    """Names, below the root, of all documents that people write."""
    written = [path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).as_posix() not in GENERATED]
    return sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *written])


def blocks(text: str) -> list[Block]:
    found = []
    for match in _FENCE.finditer(text):
        title = re.search(r'title="([^"]*)"', match[3])
        body = re.sub(rf"^{match[1]}", "", match[4], flags=re.MULTILINE)
        found.append(Block(match[2], title[1] if title else "", body, text.count("\n", 0, match.start(4)) + 1))
    return found


def typed(text: str) -> Iterator[Line]:
    """Every command line of a document that may call p2pmodel."""
    for block in blocks(text):
        if block.language not in SHELLS:
            continue
        first, joined = block.line, ""
        for number, line in enumerate(block.text.splitlines(), block.line):
            first = first if joined else number
            prompt = line.startswith(("$ ", "> "))
            if prompt or joined or block.language in ("sh", "bash") or line.startswith("p2pmodel "):
                joined += line[2:] if prompt else line
                if joined.endswith("\\"):
                    joined = joined[:-1]
                else:
                    yield Line(first, joined, True)
                    joined = ""
    plain = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for mention in _INLINE.finditer(plain):
        yield Line(plain.count("\n", 0, mention.start()) + 1, mention[1].replace("\n", " "), False)


def calls(line: str) -> Iterator[list[str]]:
    """The arguments of every call of p2pmodel in a line of a shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    simple: list[list[str]] = [[]]
    for word in lexer:
        if _OPERATORS.fullmatch(word):
            simple.append([])
        else:
            simple[-1].append(word)
    for words in simple:
        while words and (re.match(r"[A-Z_]+=", words[0]) or words[0] in ("sudo", "exec", "time")):
            behind = 3 if words[:2] == ["sudo", "-u"] else 1
            words = words[behind:]
        if words and PurePath(words[0]).name == "p2pmodel":
            yield words[1:]


def complaint(command: Any, arguments: list[str], whole: bool = True) -> str:
    """What is wrong with a call, by the tree of commands alone; empty when nothing is. Nothing is run, no file is
    looked for. command: the group of all commands, as click has it."""
    path, given, positional = "p2pmodel", set[str](), list[str]()
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        options = _options(command)
        if word.startswith("-") and word not in ("-", "--"):
            name, equals, value = word.partition("=")
            if name not in options:
                return f"{path} has no option {name}"
            option = options[name]
            given.add(option.name)
            if not option.is_flag:
                if not equals and not waiting:
                    return f"{name} of {path} needs a value" if whole else ""
                if wrong := _wrong_value(option, value if equals else waiting.pop(0)):
                    return f"{name} of {path}: {wrong}"
        elif hasattr(command, "commands"):
            if word == ELLIPSIS or (not whole and not word.isidentifier()):
                return ""
            if word not in command.commands:
                return f"{path} has no command {word}"
            command, path = command.commands[word], f"{path} {word}"
            given, positional = set(), []
        elif word != ELLIPSIS:
            positional.append(word)
    if not whole or hasattr(command, "commands"):
        return ""
    places = [p for p in command.params if p.param_type_name == "argument"]
    if len(positional) > len(places) and all(p.nargs == 1 for p in places):
        return f"{path} takes {len(places)} arguments, not {len(positional)}"
    if ELLIPSIS in arguments or "help" in given:
        return ""
    missing = [
        p.opts[0] for p in command.params if p.param_type_name == "option" and p.required and p.name not in given
    ]
    missing += [p.name for p in places[len(positional) :] if p.required]
    return f"{path} also needs {', '.join(missing)}" if missing else ""


def _options(command: Any) -> Mapping[str, Any]:
    found = {name: p for p in command.params if p.param_type_name == "option" for name in (*p.opts, *p.secondary_opts)}
    help = command.get_help_option(command.context_class(command))
    return found | ({name: help for name in help.opts} if help else {})


def _wrong_value(option: Any, value: str) -> str:
    """By the type of the command's parameter; typer's own conversion would look for files, too."""
    if ELLIPSIS in value or value.isupper():
        return ""
    annotation = option.type_descriptor.annotation
    try:
        number = annotation(value) if annotation in (int, float) or issubclass(annotation, Enum) else None
    except ValueError as error:
        return str(error)
    if number is None or isinstance(number, Enum):
        return ""
    low, high = (bound if bound is not None else number for bound in (option.min, option.max))
    return "" if low <= number <= high else f"{number} is out of range"
