"""docs/reference/, from the commands themselves."""

import re
from collections.abc import Iterator
from typing import Any

import typer.main

from p2pmodel.cli.app import app
from p2pmodel.cli.recipes import KEYS, NAMES

_WRITTEN = "<!-- Written by `python -m scripts.generate`; a test fails when it is out of date. -->"

_COMMANDS_HEAD = f"""\
# Commands

{_WRITTEN}

Every option can also be set in the environment, as `P2PMODEL_<COMMAND>_<OPTION>`, and in `config.toml` in the home
folder, under the command's name; what is typed wins over the environment, that over the file:

```toml
[join]
port = 7000
http = "9100"
```

With `--json` a command prints data and nothing else on standard output. Progress and logs go to standard error
(`p2pmodel --log-level INFO --log-format json …`). How commands end is in the [table of exit codes](../exit-codes.md).
`p2pmodel --install-completion` makes the shell complete commands and options.
"""

_RECIPES_HEAD = f"""\
# Keys of a recipe

{_WRITTEN}

`p2pmodel train --recipe recipe.toml` reads these keys. Each is an option of `p2pmodel train` by its name, and a flag
wins over it. Files are looked for beside the recipe. What the options do is in [Training a patch](../training.md).

| Key | Value | What it is | Default |
|---|---|---|---|
"""


def files() -> dict[str, str]:
    return {"docs/reference/commands.md": commands_page(), "docs/reference/recipes.md": recipes_page()}


def command_tree() -> Any:
    """The group of all commands, as click has it."""
    return typer.main.get_command(app)


def walk(command: Any, path: tuple[str, ...] = ("p2pmodel",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it, groups before what is in them, in the order of the help."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from walk(child, (*path, name))


def commands_page() -> str:
    parts = [_COMMANDS_HEAD]
    for path, command in walk(command_tree()):
        parts.append(f"\n## {' '.join(path)}\n\n{_text(command.help)}\n")
        context = command.context_class(command, info_name=" ".join(path))
        usage = re.sub(r"\s+", " ", command.get_usage(context)).removeprefix("Usage: ")
        parts.append(f"\n```\n{usage}\n```\n")
        children = getattr(command, "commands", {})
        if children:
            parts.append("\n| Command | What it does |\n|---|---|\n")
            parts += [
                f"| [`{' '.join((*path, name))}`](#{'-'.join((*path, name))}) | {_first(child.help)} |\n"
                for name, child in children.items()
                if not child.hidden
            ]
        parts += _parameters(command)
    return "".join(parts)


def recipes_page() -> str:
    options = {o.name.replace("_", "-"): o for o in command_tree().commands["train"].params}
    rows = [
        f"| `{key}` | {NAMES[kind]} | {_cell(options[key].help)} | {_default(options[key])} |\n"
        for key, kind in KEYS.items()
    ]
    return "".join([_RECIPES_HEAD, *rows])


def _parameters(command: Any) -> Iterator[str]:
    shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    arguments = [p for p in shown if p.param_type_name == "argument" and p.help]
    options = [p for p in shown if p.param_type_name == "option"]
    if arguments:
        yield "\n| Argument | What it is |\n|---|---|\n"
        for argument in arguments:
            yield f"| `{_cell(argument.metavar or argument.name.upper())}` | {_cell(argument.help)} |\n"
    if options:
        yield "\n| Option | What it is | Default |\n|---|---|---|\n"
        for option in options:
            names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
            required = "required" if option.required else _default(option)
            yield f"| {names} | {_cell(option.help or '')} | {required} |\n"


def _default(option: Any) -> str:
    """As the help shows it: what a person can rely on, not what the program begins with."""
    if isinstance(option.show_default, str):
        return _cell(option.show_default).replace("<", "&lt;")
    if option.default is None or option.is_flag or not option.show_default or callable(option.default):
        return ""
    text = str(option.default).replace("\n", "\\n").rstrip()
    return f"`{text}`" if text else ""


def _text(help: str | None) -> str:
    return re.sub(r"(?<!\n)\n(?!\n)", " ", (help or "").strip())


def _first(help: str | None) -> str:
    return _cell(_text(help).partition("\n")[0])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
