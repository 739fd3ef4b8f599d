"""Versions as people use them, through the commands: log, show, diff, checkout, tag, verify."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from p2pmodel import starter
from p2pmodel.cli.app import app
from p2pmodel.domain.errors import Busy, InvalidInput, NotFound, P2PModelError, Rejected, StorageError
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.version import LeftOut
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.store.home import Home
from p2pmodel.tensors import blob
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.support.lineages import add_patch, adopt, begin

Names = tuple[Path, list[VersionId]]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Names:
    """A home with two versions after the base: the second one left a patch out."""
    home = tmp_path_factory.mktemp("grown") / "home"
    lineage = begin(home)
    first = adopt(lineage, [add_patch(lineage, Key.generate(), 1), add_patch(lineage, Key.generate(), 2)])
    kept, bad = add_patch(lineage, Key.generate(), 3), add_patch(lineage, Key.generate(), 4)
    second = adopt(lineage, [kept], [LeftOut(bad, "it makes xml worse by 12.0%")])
    return home, [lineage.model, first, second]


@pytest.fixture
def home(grown: Names, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(grown[0], tmp_path / "home")
    return tmp_path / "home"


def run(*arguments: str | Path, home: Path) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments), "--home", str(home), "--json"], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def text(*arguments: str | Path, home: Path) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments), "--home", str(home)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_log_names_versions_tags_and_what_was_left_out(grown: Names, home: Path) -> None:
    run("tag", "stable", "1.0.1", home=home)
    data = run("log", home=home)
    assert [version["id"] for version in data["versions"]] == grown[1][1:]
    assert data["tags"] == {"stable": grown[1][1]}
    said = text("log", home=home)
    assert said.index("1.0.2") < said.index("1.0.1") < said.index("1.0.0")
    assert "(tag stable)" in said
    assert "left out" in said
    assert "-11.11%" in said


def test_the_graph_shows_patches_beside_versions(home: Path) -> None:
    lines = text("log", "--graph", home=home).splitlines()
    assert lines[0].startswith("*  1.0.2")
    assert "(head)" in lines[0]
    assert [line[:4] for line in lines[1:5]] == ["|\\", "| o ", "| x ", "|/"]
    assert lines[5].startswith("*  1.0.1")
    assert [line[:4] for line in lines[6:10]] == ["|\\", "| o ", "| o ", "|/"]
    assert lines[10].startswith("*  1.0.0")
    assert len(lines) == 11


def test_a_fork_is_drawn_as_a_lane_of_its_own(home: Path) -> None:
    lineage = Lineage(Home.open(home), Home.open(home).index.models()[0])
    first = lineage.versions[0].id
    adopt(lineage, [lineage.versions[1].candidate.patches[0]], parent=first)
    said = text("log", "--graph", home=home)
    assert "not in the chain" in said
    assert "|/" in said
    assert said.count("1.0.2") == 2
    assert "| *" in said


def test_show_says_where_a_version_comes_from(grown: Names, home: Path) -> None:
    data = run("show", "head", home=home)
    assert data["id"] == grown[1][2]
    assert len(data["candidate"]["patches"]) == 1
    said = text("show", home=home)
    for part in ("1.0.2 (head)", "trained on a.txt", "left out", "it makes xml worse by 12.0%", "adopted by", "0.8000"):
        assert part in said
    assert run("show", "base", home=home)["number"] == "1.0.0"


def test_diff_gives_norms_and_the_exam(grown: Names, home: Path) -> None:
    data = run("diff", "1.0.1", "1.0.2", home=home)
    lineage = Lineage(Home.open(home), grown[1][0])
    before, after = (version_state(lineage, version) for version in lineage_ids(lineage))
    norms = {name: float((after[name].double() - before[name].double()).norm()) for name in before}
    assert {slot["slot"]: slot["norm"] for slot in data["slots"]} == pytest.approx(norms)
    assert [slot["norm"] for slot in data["slots"]] == sorted(norms.values(), reverse=True)
    top = data["slots"][0]
    difference = (after[top["slot"]].double() - before[top["slot"]].double()).reshape(-1)
    assert top["largest"] == float(difference[top["at"]])
    assert abs(top["largest"]) == float(difference.abs().max())
    assert data["scores"] == [{"section": "xml", "before": 0.8, "after": 0.8}]
    assert "more slots differ" in text("diff", "base", home=home)
    same = run("diff", "1.0.1", "1.0.1", home=home)
    assert same["slots"] == []
    assert same["untouched"] == len(norms)


def lineage_ids(lineage: Lineage) -> tuple[Any, Any]:
    return lineage.versions[0].id, lineage.versions[1].id


def test_a_version_is_checked_out_bit_for_bit(grown: Names, home: Path, tmp_path: Path) -> None:
    lineage = Lineage(Home.open(home), grown[1][0])
    served = lineage.served_head
    folder = tmp_path / "out"
    data = run("checkout", "1.0.1", "--output", folder, "--with-base", home=home)
    candidate = lineage.versions[0].candidate
    raw = (folder / "state.safetensors").read_bytes()
    assert canonical.digest(raw) == candidate.result.digest
    values = blob.unpack(raw, None, len(raw))
    wanted = version_state(lineage, lineage.versions[0].id)
    assert all(torch.equal(values[name], wanted[name]) for name in wanted)
    described = json.loads((folder / "version.json").read_text())
    assert described["number"] == "1.0.1"
    assert described["software"].keys() >= {"p2pmodel", "torch", "transformers"}
    for file in lineage.manifest.files:
        assert file.name in data["files"]
        assert canonical.digest((folder / file.name).read_bytes()) == file.blob.digest
    assert Lineage(Home.open(home), grown[1][0]).served_head == served
    with pytest.raises(InvalidInput, match="not empty"):
        run("checkout", "1.0.1", "--output", folder, home=home)


def test_a_checked_out_version_is_proven_without_a_home(home: Path, tmp_path: Path) -> None:
    for version, count in (("head", 2), ("base", 0)):
        folder = tmp_path / version
        run("checkout", version, "--output", folder, home=home)
        proven = run("version", "verify", folder, home=tmp_path / "another")
        assert proven["versions"] == count


def test_a_changed_checkout_is_refused(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run("checkout", "head", "--output", folder, home=home)
    state, proof = (folder / "state.safetensors").read_bytes(), (folder / "proof.msgpack").read_bytes()
    (folder / "state.safetensors").write_bytes(state[:-1] + bytes([state[-1] ^ 1]))
    with pytest.raises(Rejected, match="not those that the version names"):
        run("version", "verify", folder, home=home)
    (folder / "state.safetensors").write_bytes(state)
    description = json.loads((folder / "version.json").read_text())
    for changed in ("{", "[]", json.dumps(description | {"number": "9.9.9"}), json.dumps({**description, "kinds": []})):
        (folder / "version.json").write_text(changed)
        with pytest.raises(Rejected, match=r"version\.json"):
            run("version", "verify", folder, home=home)
    (folder / "version.json").write_text(json.dumps(description))
    for at in range(100, len(proof), len(proof) // 40):
        (folder / "proof.msgpack").write_bytes(proof[:at] + bytes([proof[at] ^ 1]) + proof[at + 1 :])
        with pytest.raises(Rejected):
            run("version", "verify", folder, home=home)
    (folder / "proof.msgpack").unlink()
    with pytest.raises(InvalidInput, match=r"proof\.msgpack can't be read"):
        run("version", "verify", folder, home=home)


def test_a_changed_base_is_refused(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    run("checkout", "base", "--output", folder, "--with-base", home=home)
    run("version", "verify", folder, home=home)
    state = (folder / "state.safetensors").read_bytes()
    (folder / "state.safetensors").write_bytes(state[:-1] + bytes([state[-1] ^ 1]))
    with pytest.raises(Rejected, match="not those that the version names"):
        run("version", "verify", folder, home=home)
    (folder / "state.safetensors").write_bytes(state)
    config = (folder / "config.json").read_text()
    (folder / "config.json").unlink()  # it may be a link
    (folder / "config.json").write_text(config + " ")
    with pytest.raises(Rejected, match=r"config\.json is not the base's"):
        run("version", "verify", folder, home=home)


def test_the_chain_of_a_home_is_proven_offline(grown: Names, home: Path) -> None:
    proven = run("version", "verify", home=home)
    assert proven == {**proven, "id": grown[1][2], "number": "1.0.2", "versions": 2, "values": 2}
    assert run("version", "verify", "1.0.1", home=home)["versions"] == 1


def test_a_damaged_value_is_found(grown: Names, home: Path) -> None:
    lineage = Lineage(Home.open(home), grown[1][0])
    path = lineage.home.objects.path(lineage.versions[0].candidate.result.digest)
    raw = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises((StorageError, Rejected)):
        run("version", "verify", home=home)
    for _ in range(2):  # put aside by the first, and still not here
        with pytest.raises(StorageError, match=r"values of starter 1\.0\.1 are not here"):
            run("fsck", home=home)


def test_tags_name_versions(grown: Names, home: Path) -> None:
    assert run("tag", home=home) == {}
    run("tag", "stable", "1.0.1", home=home)
    assert run("show", "stable", home=home)["id"] == grown[1][1]
    assert run("tag", home=home) == {"stable": grown[1][1]}
    with pytest.raises(Busy, match="there already"):
        run("tag", "stable", "1.0.2", home=home)
    run("tag", "stable", "1.0.2", "--force", home=home)
    assert run("show", "stable", home=home)["id"] == grown[1][2]
    assert "stable" in text("tag", home=home)
    run("tag", "stable", "--delete", home=home)
    with pytest.raises(NotFound):
        run("show", "stable", home=home)
    with pytest.raises(NotFound):
        run("tag", "stable", "--delete", home=home)


@pytest.mark.parametrize("name", ["head", "base", "1.0.1", "v2", "deadbeef", "../x", "a/b", "", "a" * 65])
def test_what_would_be_taken_for_a_version_is_no_tag(home: Path, name: str) -> None:
    with pytest.raises(P2PModelError):
        run("tag", name, "1.0.1", home=home)


def test_the_starter_has_a_history_of_one_when_it_is_new(tmp_path: Path) -> None:
    assert starter.MODEL.is_dir()
    said = text("log", "--graph", home=tmp_path / "new")
    assert said.startswith("*  1.0.0")
    assert run("version", "verify", home=tmp_path / "new")["versions"] == 0


def test_what_a_version_needs_is_looked_for(home: Path, tmp_path: Path) -> None:
    needs = run("deps", "1.0.1", home=home)
    assert {need["kind"] for need in needs} == {"base", "tokenizer", "values", "patch kind", "software"}
    assert all(need["met"] for need in needs)
    torch_range = next(need for need in needs if need["name"] == "torch")
    assert torch_range["found"] == torch.__version__
    assert "<2.14" in torch_range["wanted"]


def test_a_checkout_says_what_it_lacks(home: Path, tmp_path: Path) -> None:
    run("checkout", "head", "--output", tmp_path / "whole", "--with-base", home=home)
    assert all(need["met"] for need in run("deps", tmp_path / "whole", home=home))
    run("checkout", "head", "--output", tmp_path / "bare", home=home)
    with pytest.raises(NotFound, match=r"config\.json"):
        run("deps", tmp_path / "bare", home=home)
    path = tmp_path / "whole" / "version.json"
    described = json.loads(path.read_text())
    for change, error, says in (
        ({"software": {"torch": ">=99"}}, NotFound, "torch"),
        ({"software": {"no-such-package": ">=1"}}, NotFound, "no-such-package"),
        ({"software": {"torch": "a lot"}}, InvalidInput, "no range"),
        ({"kinds": ["magic@7"]}, NotFound, "magic@7"),
        ({"kinds": 3}, InvalidInput, "describes no version"),
    ):
        path.write_text(json.dumps(described | change))
        with pytest.raises(error, match=says):
            run("deps", tmp_path / "whole", home=home)
