"""Recipes: the options of a training as a TOML file, which flags win over."""

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.patch import Patch

MAX_RECIPE_BYTES = 1 << 20

KEYS: dict[str, type] = {
    "data": list,
    "validation": float,
    "validation-data": list,
    "validation-blocks": int,
    "skip-broken": bool,
    "packing": bool,
    "sequence": int,
    "licence": str,
    "kind": str,
    "density": float,
    "mask-examples": int,
    "rank": int,
    "alpha": float,
    "expert": str,
    "router": bool,
    "bits": int,
    "model": str,
    "base": Path,
    "version": str,
    "output": Path,
    "plot": Path,
    "steps": int,
    "batch": int,
    "accumulate": int,
    "learning-rate": float,
    "schedule": str,
    "warm-up": float,
    "weight-decay": float,
    "clip": float,
    "dtype": str,
    "early-stopping": int,
    "checkpoint-every": int,
    "seed": int,
    "fisher": str,
    "fisher-labels": str,
    "fisher-examples": int,
    "control": bool,
    "fresh": bool,
    "threads": int,
}
"""Each is called what the option of `p2pmodel train` is called."""
OF_KINDS = frozenset(("density", "mask-examples", "rank", "alpha", "router"))
"""Those that a patch's own recipe may have as options of its kind, all of them numbers."""

NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list of file names",
    Path: "a file name",
}


def read_recipe(path: Path) -> dict[str, Any]:
    """By the names of the command's parameters. Files are looked for beside the recipe. Raises InvalidInput."""
    try:
        raw = path.read_bytes()[: MAX_RECIPE_BYTES + 1]
        if len(raw) > MAX_RECIPE_BYTES:
            raise InvalidInput(f"{path.name} is too large for a recipe.")
        values = tomllib.loads(raw.decode())
    except OSError as error:
        raise InvalidInput(f"{path.name} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{path.name} is not UTF-8 text.") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{path.name} is not valid TOML: {error}.") from None
    return {
        key.replace("-", "_"): _checked(path, key, value)
        for key, value in ((key.replace("_", "-"), value) for key, value in values.items())
    }


def as_toml(values: Mapping[str, Any]) -> str:
    """Lines of `key = value`, by the keys' names."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())


def recipe_of(patch: Patch, expert: str = "") -> str:
    """The recipe that a patch was trained with, as a file for `p2pmodel train --recipe`. expert: what the patch's blob
    calls it, where it is of one. Raises InvalidInput for an option that no training has."""
    recipe, provenance = patch.provenance.recipe, patch.provenance
    kind_options = {name.replace("_", "-"): value for name, value in recipe.kind_options}
    if unknown := kind_options.keys() - OF_KINDS:
        raise InvalidInput(f"The patch's kind has an option {min(unknown)[:64]!r} that is not known here.")
    values: dict[str, Any] = {"data": [file.name for file in provenance.data]}
    if provenance.validation:
        values["validation-data"] = [file.name for file in provenance.validation]
    values |= {
        "validation": recipe.validation,
        "validation-blocks": recipe.held_out_blocks,
        "packing": recipe.packing,
        "sequence": recipe.sequence,
        "licence": patch.licence,
        "kind": patch.kind.partition("@")[0],
        **{name: KEYS[name](value) for name, value in kind_options.items()},
        **({"expert": expert} if expert else {}),
        "bits": 32 if provenance.chosen is None else 4,
        "version": patch.parent,
        "steps": recipe.steps,
        "batch": recipe.batch,
        "accumulate": recipe.accumulate,
        "learning-rate": recipe.learning_rate,
        "schedule": recipe.schedule,
        "warm-up": recipe.warm_up,
        "weight-decay": recipe.weight_decay,
        "clip": recipe.clip,
        "dtype": recipe.precision,
        "early-stopping": recipe.early_stopping,
        "checkpoint-every": provenance.checkpoint_every,
        "seed": recipe.seed,
        "fisher": "adam" if recipe.fisher == "adam" else "examples",
        "fisher-labels": "model" if recipe.fisher == "adam" else recipe.fisher,
        "fisher-examples": recipe.fisher_examples,
        "control": recipe.control,
        "fresh": not recipe.continued,
        "threads": provenance.threads,
    }
    return as_toml(values)


def _checked(path: Path, key: str, value: Any) -> Any:
    wanted = KEYS.get(key)
    if wanted is None:
        close = difflib.get_close_matches(key, KEYS, n=2)
        hint = f"Did you mean {' or '.join(close)}?" if close else "See the options of: p2pmodel train --help"
        raise InvalidInput(f"{path.name} has the key {key[:64]!r}, which is no option of a training.", hint)
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is Path and isinstance(value, str):
        return path.parent / value
    if wanted is list:
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return [path.parent / name for name in names]
    elif type(value) is wanted:
        return value
    raise InvalidInput(f"{path.name} gives {key} as {str(value)[:32]!r}; it has to be {NAMES[wanted]}.")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)
