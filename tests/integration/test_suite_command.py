"""`p2pmodel test` as a CI system uses it: tables, JUnit XML, statuses; and exams that are not what they say."""

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from p2pmodel import starter
from p2pmodel.cli.app import app
from p2pmodel.domain.errors import InvalidInput, NotFound, Regressed, Rejected
from p2pmodel.engine.exams import Suite
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.wire.signing import Key
from tests.support.lineages import add_patch, adopt, begin

SUITE = """
name = "mine"

[[domain]]
name = "python"
tune = "python.jsonl"
test = "python.jsonl"
tolerance = 0.02

[[choice]]
name = "keywords"
tune = "keywords.jsonl"
test = "keywords.jsonl"

[[regression]]
name = "safe"
tune = "safe.jsonl"
test = "safe.jsonl"
tokens = 8
"""
ROWS: dict[str, list[dict[str, Any]]] = {
    "python": [{"text": "import os\nimport sys\n\ndef main():\n    return 0\n"}],
    "keywords": [{"prompt": "import os\nimport ", "choices": ["sys\n", "qxz\n"], "answer": 0}],
    "safe": [{"prompt": "import ", "must_not": ["no such thing"]}],
}


@pytest.fixture(scope="module")
def lineage(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    """Its head is ruined: what the base has learned is gone."""
    lineage = begin(tmp_path_factory.mktemp("lineage") / "home")
    adopt(lineage, [add_patch(lineage, Key.generate(), 1, size=3.0)])
    add_patch(lineage, Key.generate(), 2, size=0.0)
    return lineage


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "exam.toml").write_text(SUITE)
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(*arguments: str | Path, home: Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--home", str(home), "--threads", "1"])


def test_a_regression_ends_with_a_status_of_its_own(lineage: Lineage, suite: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    result = run("test", "head", "--suite", suite, "--junit", report, home=lineage.home.path)
    assert isinstance(result.exception, Regressed)
    assert Regressed.exit_code == 11
    assert "python regresses by" in result.exception.message
    assert "REGRESSED" in result.stdout
    root = ElementTree.fromstring(report.read_bytes())
    assert root.tag == "testsuites"
    assert (root.get("tests"), root.get("failures")) == ("3", str(len(root.findall(".//failure"))))
    assert [case.get("name") for case in root.iter("testcase")] == ["python", "choice/keywords", "regression/safe"]
    failures = [case.get("name") for case in root.iter("testcase") if case.find("failure") is not None]
    assert "python" in failures
    assert "regression/safe" not in failures
    subject = next(x.get("value") for x in root.iter("property") if x.get("name") == "subject")
    assert all(f"{subject}: " in str(case.findtext("system-out")) for case in root.iter("testcase"))


def test_a_patch_that_changes_nothing_passes(lineage: Lineage, suite: Path) -> None:
    patch = next(patch for patch, noun in lineage.patches.items() if noun.parent == lineage.head)
    result = run("test", patch[:12], "--suite", suite, "--json", home=lineage.home.path)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["regressions"] == []
    assert not data["is_the_lineages"]
    assert [(s["section"], s["change"], s["tolerance"]) for s in data["sections"]] == [
        ("python", 0.0, 0.02),
        ("choice/keywords", 0.0, 0.005),
        ("regression/safe", 0.0, 0.0),
    ]


def test_without_a_suite_it_is_the_models_own_exam(lineage: Lineage) -> None:
    result = run("test", "base", "--json", home=lineage.home.path)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["is_the_lineages"]
    assert data["digest"] == lineage.manifest.exam.digest
    assert [s["section"] for s in data["sections"]][-1] == "general"
    assert all(s["parent"] == s["score"] for s in data["sections"])


def test_an_exam_that_changed_after_founding_is_refused_by_its_digest(lineage: Lineage, tmp_path: Path) -> None:
    folder = tmp_path / "exam"
    shutil.copytree(starter.EXAM, folder)
    assert Suite.load(folder).digest == lineage.manifest.exam.digest
    rows = (folder / "xml.test.jsonl").read_text().splitlines(keepends=True)
    (folder / "xml.test.jsonl").write_text("".join(rows[1:]))
    result = run("test", "base", "--suite", folder, home=lineage.home.path)
    assert isinstance(result.exception, Rejected)
    assert result.exception.reason == "digest"
    assert result.exception.message.count(".") == 1
    assert lineage.manifest.exam.digest[:10] in result.exception.message


def test_what_is_neither_a_patch_nor_a_version_is_said(lineage: Lineage, suite: Path) -> None:
    result = run("test", "nothing", "--suite", suite, home=lineage.home.path)
    assert isinstance(result.exception, NotFound)


def test_a_lineage_needs_text_in_its_exam(suite: Path, tmp_path: Path) -> None:
    (suite / "exam.toml").write_text("[[choice]]" + SUITE.split("[[choice]]")[1])
    with pytest.raises(InvalidInput, match=r"no \[\[domain\]\]"):
        begin(tmp_path / "home", suite)


def test_a_suite_can_be_looked_at(suite: Path) -> None:
    result = CliRunner().invoke(app, ["exam", "check", str(suite), "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["digest"] == Suite.load(suite).digest
    assert [section["name"] for section in data["sections"]] == ["python", "choice/keywords", "regression/safe"]
    assert "the Manifest's" in CliRunner().invoke(app, ["exam", "check", str(suite)]).stdout
