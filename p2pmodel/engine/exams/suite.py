"""A suite of sections. It is a folder:

    exam.toml            name, licence, and a table for each section: [[domain]], [[choice]], [[answer]],
                         [[regression]], [[canary]], [[trigger]], with name, tune, test, and what the kind's module says
    NAME.tune.jsonl      a case a line, for choices such as α
    NAME.test.jsonl      for decisions

It travels as one archive, the canonical encoding of {file name: bytes}; the archive's digest is in the Manifest.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from p2pmodel.domain.errors import InvalidInput, Rejected
from p2pmodel.domain.ids import Digest
from p2pmodel.engine.exams.answers import Answers
from p2pmodel.engine.exams.canaries import Canaries
from p2pmodel.engine.exams.choices import Choices
from p2pmodel.engine.exams.regressions import Regressions
from p2pmodel.engine.exams.rows import INDEX, Entry, Files, Folder, read_index
from p2pmodel.engine.exams.sections import Section
from p2pmodel.engine.exams.texts import Domain
from p2pmodel.engine.exams.triggers import Triggers
from p2pmodel.logic.judgement import Rule
from p2pmodel.wire import canonical

MAX_SECTIONS = 64
KINDS: Mapping[str, Callable[[Entry, Files], Section]] = {
    "domain": Domain.load,
    "choice": Choices.load,
    "answer": Answers.load,
    "regression": Regressions.load,
    "canary": Canaries.load,
    "trigger": Triggers.load,
}


class Suite:
    """`sections` by kind, then in the order of exam.toml; `domains`: those of them that are texts; `name` and `licence`
    as exam.toml says."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """From the contents of its files, by name. Raises InvalidInput."""
        index = read_index(files)
        self.name, self.licence = (_line(index.get(key, "")) for key in ("name", "licence"))
        entries = _entries(index)
        if not 1 <= len(entries) <= MAX_SECTIONS:
            raise InvalidInput(
                f"{INDEX} has to name 1 to {MAX_SECTIONS} domains or other sections.",
                "Add a [[domain]] with name, tune and test.",
            )
        self.sections = tuple(KINDS[entry.table](entry, files) for entry in entries)
        self.domains = tuple(section for section in self.sections if isinstance(section, Domain))
        if len({section.name for section in self.sections}) != len(self.sections):
            raise InvalidInput(f"{INDEX} names a section twice.")
        used = {INDEX, *(file for entry in entries for file in (entry.tune, entry.test))}
        self._files = {name: bytes(files[name]) for name in sorted(used)}

    @classmethod
    def load(cls, folder: Path) -> "Suite":
        """Raises InvalidInput, in one sentence, for what is missing or wrong."""
        if not (folder / INDEX).is_file():
            raise InvalidInput(f"{folder} holds no {INDEX}.", "Name the folder of an exam.")
        return cls(Folder(folder))

    def pack(self) -> bytes:
        """The canonical archive of the files that exam.toml names, and of itself."""
        return canonical.encode(self._files)

    @classmethod
    def unpack(cls, raw: bytes, limit: int) -> "Suite":
        """Of an archive that nobody vouches for. Raises Rejected("size" | "schema" | "canonical")."""
        try:
            return cls(canonical.decode(raw, dict[str, bytes], limit))
        except InvalidInput as error:
            raise Rejected("schema", f"The exam cannot be used. {error.message}") from None

    @property
    def digest(self) -> Digest:
        return canonical.digest(self.pack())

    @property
    def rules(self) -> dict[str, Rule]:
        """How much worse each section may get, by name; for `logic.judgement`."""
        return {section.name: Rule(section.tolerance, section.strict) for section in self.sections}


def _line(value: object) -> str:
    """It is shown on terminals."""
    return "".join(character for character in str(value) if character.isprintable())[:128]


def _entries(index: Mapping[str, object]) -> list[Entry]:
    lists = {key for key, value in index.items() if isinstance(value, list) and any(isinstance(v, dict) for v in value)}
    if unknown := sorted(lists - KINDS.keys()):
        raise InvalidInput(
            f"{INDEX} has a section of kind {unknown[0][:64]!r}, which is not known here.",
            f"The kinds are {', '.join(KINDS)}.",
        )
    tables = {kind: index.get(kind, []) for kind in KINDS}
    wrong = [kind for kind, table in tables.items() if not isinstance(table, list)]
    if wrong:
        raise InvalidInput(f"{wrong[0]} in {INDEX} is no list of tables.", f"Write [[{wrong[0]}]].")
    return [Entry.read(kind, raw) for kind, table in tables.items() for raw in table]  # type: ignore[attr-defined]
