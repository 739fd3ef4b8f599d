"""The house as it stands: floors, processes, sizes, and documents that are made from code."""

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from p2pmodel.domain import errors

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for p in (ROOT / "p2pmodel").rglob("*.py") if "v1" not in p.parts)
MAX_LINES = 450


def loaded_by(program: str) -> set[str]:
    """Top-level packages that a fresh Python has loaded at the end of `program`."""
    code = f"{program}\nimport sys\nprint('\\n'.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_by(
        "import contextlib, io, sys\nsys.argv = ['p2pmodel', '--help']\nfrom p2pmodel.cli.app import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    main()"
    )
    assert not loaded & {"torch", "hivemind", "transformers", "numpy", "grpc", "libp2p", "trio", "msgspec", "sqlite3"}


def test_a_node_never_loads_libp2p_and_the_gossip_child_never_hivemind() -> None:
    # Loading both into one process ends it: both register crypto.pb.KeyType.
    packages = [p.parent.name for p in SOURCES if p.name == "__init__.py" and p.parent.parent.name == "p2pmodel"]
    rooms = [name for name in packages if name != "gossip"]
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in SOURCES
        if p.parent.name in rooms and p.stem not in ("__init__", "__main__")
    ]
    node = loaded_by("import " + ", ".join([*modules, "p2pmodel.gossip.link"]))
    assert "hivemind" in node
    assert "libp2p" not in node
    child = loaded_by("import p2pmodel.gossip.child, p2pmodel.gossip.mesh")
    assert "libp2p" in child
    assert not child & {"hivemind", "torch"}


def test_no_module_grows_too_large() -> None:
    large = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not large


def test_nothing_is_pickled() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not {"pickle", "marshal", "shelve", "dill"} & {n.partition(".")[0] for n in names}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert f"{node.value.id}.{node.attr}" != "torch.load", path


def documented_exit_codes() -> dict[int, str]:
    document = (ROOT / "docs" / "exit-codes.md").read_text()
    rows = [line.split("|") for line in document.splitlines() if line.startswith("|")]
    return {int(row[1]): row[2].strip().strip("`") for row in rows if row[1].strip().isdecimal()}


def test_the_table_of_exit_codes_is_current() -> None:
    members = inspect.getmembers(errors, inspect.isclass)
    classes = [kind for _, kind in members if issubclass(kind, errors.P2PModelError)]
    codes = {kind.exit_code: kind.__name__ for kind in classes}
    assert len(codes) == len(classes), "two errors share an exit status"
    documented = documented_exit_codes()
    assert {code: name for code, name in documented.items() if code in codes} == codes
    assert set(documented) - set(codes) == {0, 130, 141}


def locked() -> dict[str, str]:
    text = "".join((ROOT / "requirements" / name).read_text() for name in ("lock.txt", "lock-dev.txt"))
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines), "a version is not pinned exactly"
    pairs = [line.split("==") for line in lines]
    assert len({canonicalize_name(name) for name, _ in pairs}) == len(pairs), "a package is locked twice"
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("part", ["dependencies", "dev"])
def test_the_lock_holds_what_the_project_asks_for(part: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] if part == "dependencies" else project["optional-dependencies"]["dev"]
    lock = locked()
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(lock[canonicalize_name(requirement.name)]), requirement
