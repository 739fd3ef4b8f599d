"""safetensors files of a Hugging Face folder: which there are, and single tensors without reading the rest."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from p2pmodel.domain.errors import InvalidInput

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 64 << 20


def weight_files(path: Path, elsewhere: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the files that hold the weights, with the index when there is one, which has to be here; those that it
    names need not. elsewhere: names of files that are known to belong to the folder, though they are not here.

    Raises InvalidInput when there are none, or only pickled ones.
    """
    if (path / SINGLE).is_file() or SINGLE in elsewhere:
        return (SINGLE,)
    if (path / INDEX).is_file():
        return (INDEX, *sorted(set(_weight_map(path).values())))
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise InvalidInput(
            f"{path} has only pickled weights, which can run code when they are read.",
            "Convert them: load the model with transformers where you trust it, and save it again.",
        )
    raise InvalidInput(f"{path} has no weights: neither {SINGLE} nor {INDEX}.")


def files_with(path: Path, wanted: Callable[[str], bool]) -> tuple[str, ...]:
    """Names of the files that hold the tensors whose names are `wanted`, whether they are here or not. Raises
    InvalidInput for an index that is none."""
    if not (path / INDEX).is_file() or (path / SINGLE).is_file():
        return (SINGLE,)
    return tuple(sorted({file for name, file in _weight_map(path).items() if wanted(name)}))


def select(path: Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The tensors whose names are `wanted`, as lazy slices of memory-mapped files; files without any are not opened.

    Raises InvalidInput when a file is missing or malformed.
    """
    slices: dict[str, Any] = {}
    for name in files_with(path, wanted):
        if not (path / name).is_file():
            raise InvalidInput(f"{path} lacks {name}, which holds weights that are needed here.")
        slices.update(_slices(path / name, wanted))
    return slices


def needed_for_names(path: Path) -> tuple[str, ...]:
    """The files that `tensor_names` reads weights' names from: none where there is an index."""
    return () if (path / INDEX).is_file() and not (path / SINGLE).is_file() else (SINGLE,)


def tensor_names(path: Path) -> tuple[str, ...]:
    """Of all tensors of the checkpoint, whether their files are here or not; sorted. Raises InvalidInput."""
    if not needed_for_names(path):
        return tuple(sorted(_weight_map(path)))
    if not (path / SINGLE).is_file():
        raise InvalidInput(f"{path} lacks {SINGLE}, which holds weights that are needed here.")
    try:
        with safe_open(path / SINGLE, framework="pt") as opened:
            return tuple(sorted(opened.keys()))
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"{path / SINGLE} cannot be read as safetensors: {error}.") from None


def read_json(path: Path) -> dict[str, Any]:
    """Raises InvalidInput when the file cannot be read, is too large, or holds no JSON object."""
    try:
        size = path.stat().st_size
        value = json.loads(path.read_bytes()) if size <= MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidInput(f"{path} holds no JSON object, or one too large ({size} bytes).")
    return value


def _slices(file: Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    try:
        # Not closed here: a slice reads from its mapping when the model takes it.
        opened: Any = safe_open(file, framework="pt")
        return {name: opened.get_slice(name) for name in opened.keys() if wanted(name)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"{file} cannot be read as safetensors: {error}.") from None


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidInput(f"{path / INDEX} has no weight map.")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InvalidInput(f"{path / INDEX} names {str(file)[:64]!r}, which is no safetensors file beside it.")
    return weight_map
