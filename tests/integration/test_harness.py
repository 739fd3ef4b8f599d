"""`p2pmodel test --harness`: tasks of lm-evaluation-harness from a folder, where it is installed."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from p2pmodel import starter
from p2pmodel.cli.app import app
from p2pmodel.domain.errors import InvalidInput, Regressed, UsageError
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.wire.signing import Key
from tests.support.lineages import add_patch, adopt, begin

TASK = """
task: tiny_lines
dataset_path: json
dataset_kwargs:
  data_files:
    test: lines.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
ROWS: list[dict[str, Any]] = [
    {"prompt": "import os\nimport ", "choices": ["sys\n", "qxz\n"], "answer": 0},
    {"prompt": "def __init__(self", "choices": ["):\n", "qqqq"], "answer": 0},
    {"prompt": "for i in ", "choices": ["range(10):", "}}}}"], "answer": 0},
    {"prompt": "    return ", "choices": ["None\n", "\x7f~~"], "answer": 0},
]
installed = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed: [harness]")


@pytest.fixture(scope="module")
def lineage(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    """Its head is ruined: what the base has learned is gone."""
    lineage = begin(tmp_path_factory.mktemp("lineage") / "home")
    adopt(lineage, [add_patch(lineage, Key.generate(), 1, size=3.0)])
    return lineage


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "lines.yaml").write_text(TASK)
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def test(lineage: Lineage, *arguments: object) -> Result:
    where = ("--home", lineage.home.path, "--model", lineage.model, "--base", starter.MODEL, "--threads", 1)
    return CliRunner().invoke(app, ["test", *map(str, arguments), *map(str, where)])


test.__test__ = False  # type: ignore[attr-defined]


@installed
def test_a_version_is_compared_with_its_parent(lineage: Lineage, tasks: Path) -> None:
    done = test(lineage, "head", "--harness", tasks, "--json")
    assert isinstance(done.exception, Regressed)
    report = json.loads(done.stdout)
    (result,) = report["results"]
    assert (result["task"], result["metric"], result["cases"]) == ("tiny_lines", "acc", 4)
    assert result["parent"] > result["score"]
    assert result["regression"] in report["regressions"]
    same = test(lineage, "base", "--harness", tasks, "--task", "tiny_lines", "--limit", 2)
    assert same.exit_code == 0, same.exception
    assert "tiny_lines" in same.stdout
    assert test(lineage, "head", "--harness", tasks, "--tolerance", 1).exit_code == 0


@installed
def test_what_cannot_be_run_is_said_in_one_sentence(lineage: Lineage, tasks: Path, tmp_path: Path) -> None:
    unknown = test(lineage, "head", "--harness", tasks, "--task", "nothing").exception
    assert isinstance(unknown, InvalidInput)
    assert "tiny_lines" in (unknown.hint or "")
    (tmp_path / "empty").mkdir()
    assert "no tasks" in str(test(lineage, "head", "--harness", tmp_path / "empty").exception)
    (tasks / "lines.jsonl").unlink()
    assert isinstance(test(lineage, "head", "--harness", tasks).exception, InvalidInput)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_without_the_harness_it_says_how_to_install_it(lineage: Lineage, tasks: Path) -> None:
    error = test(lineage, "head", "--harness", tasks).exception
    assert isinstance(error, InvalidInput)
    assert "p2pmodel[harness]" in (error.hint or "")


def test_options_of_the_harness_need_it(lineage: Lineage, tasks: Path) -> None:
    assert isinstance(test(lineage, "head", "--task", "tiny_lines").exception, UsageError)
    assert isinstance(test(lineage, "head", "--harness", tasks, "--junit", tasks / "x.xml").exception, UsageError)
