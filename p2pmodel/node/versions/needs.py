"""What a version needs to run, and whether it is here: base, tokenizer, values, patch kinds, software."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from p2pmodel.domain.errors import InvalidInput, NotFound, P2PModelError
from p2pmodel.domain.ids import VersionId, short
from p2pmodel.engine.checkpoint import TOKENIZER_FILES
from p2pmodel.node.lineages.bases import find_base
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import state_bytes
from p2pmodel.node.versions.checkout import DESCRIPTION, describe
from p2pmodel.tensors.kinds import get_kind
from p2pmodel.wire import canonical

MAX_DESCRIPTION_BYTES = 4 << 20
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Need:
    """kind: `base`, `tokenizer`, `values`, `patch kind` or `software`; wanted: a digest, or a range of versions; found:
    what is here instead of nothing."""

    kind: str
    name: str
    wanted: str
    found: str
    met: bool


class _File(msgspec.Struct):
    name: str
    digest: str


class _Base(msgspec.Struct):
    files: list[_File]


class _State(msgspec.Struct):
    digest: str


class _Description(msgspec.Struct):
    """What is read of a version.json, whoever wrote it."""

    number: str
    kinds: list[str]
    state: _State
    base: _Base
    software: dict[str, str]


def needs_of(lineage: Lineage, version: VersionId, base: Path | None) -> list[Need]:
    """Of a version of a home. The base counts as here when `find_base` finds and verifies it."""
    try:
        state = state_bytes(lineage, version)
    except NotFound:
        state = b""
    number = str(lineage.number(version))
    told = describe(lineage.manifest, lineage.model, version, number, canonical.blob_ref(state))
    description = msgspec.convert(told, _Description)
    try:
        folder = str(find_base(lineage.home, lineage, base))
    except P2PModelError:
        folder = ""
    files = [_file(file, folder, bool(folder)) for file in description.base.files]
    ref = lineage.result(version)
    values = Need("values", description.number, "made from the slots" if ref is None else short(ref.digest), "", True)
    if ref is not None:
        here = bool(state)
        values = Need("values", description.number, short(ref.digest), "in this home" if here else "", here)
    return [*files, values, *_rest(description)]


def needs_of_folder(folder: Path) -> list[Need]:
    """Of a folder that `checkout` wrote. Raises InvalidInput."""
    path = folder / DESCRIPTION
    try:
        raw = path.read_bytes()[: MAX_DESCRIPTION_BYTES + 1]
        if len(raw) > MAX_DESCRIPTION_BYTES:
            raise InvalidInput(f"{path} is over the limit of {MAX_DESCRIPTION_BYTES} bytes.")
        description = msgspec.convert(json.loads(raw), _Description)
    except OSError as error:
        raise InvalidInput(
            f"{path} can't be read: {error.strerror}.", "Name a folder that p2pmodel checkout wrote."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} describes no version: {error}.") from None
    files = [_file(f, str(folder), (folder / Path(f.name).name).is_file()) for f in description.base.files]
    return [*files, *_rest(description)]


def _file(file: _File, folder: str, here: bool) -> Need:
    kind = "tokenizer" if file.name in TOKENIZER_FILES else "base"
    return Need(kind, file.name, short(file.digest), f"in {folder}" if here else "", here)


def _rest(description: _Description) -> Iterator[Need]:
    for name in description.kinds:
        try:
            get_kind(name)
        except NotFound:
            yield Need("patch kind", name, name, "", False)
        else:
            yield Need("patch kind", name, name, "known here", True)
    for name, wanted in sorted(description.software.items()):
        yield _software(name, wanted)


def _software(name: str, wanted: str) -> Need:
    try:
        have = installed(name) if _PACKAGE.fullmatch(name) else ""
        met = bool(have) and SpecifierSet(wanted).contains(have, prereleases=True)
    except PackageNotFoundError:
        have, met = "", False
    except InvalidSpecifier:
        raise InvalidInput(f"{wanted[:64]!r} is no range of versions of {name[:64]!r}.") from None
    return Need("software", name, wanted, have, met)
