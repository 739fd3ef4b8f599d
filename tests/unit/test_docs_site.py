"""The documentation as a site: every page has its place, every link a target, and generated pages are current."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.generate import outdated, write
from tests.support.documents import DOCS, ROOT

SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)


def in_navigation(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from in_navigation(child)


def test_every_page_is_in_the_navigation() -> None:
    listed = list(in_navigation(SITE["nav"]))
    elsewhere = [pattern.lstrip("/") for pattern in SITE["not_in_nav"].split()]
    lost = [p for p in PAGES if p not in listed and not any(fnmatch.fnmatch(p, pattern) for pattern in elsewhere)]
    assert not lost, f"name them in mkdocs.yml: {', '.join(lost)}"
    assert sorted(set(listed)) == sorted(listed)
    assert set(listed) <= set(PAGES)


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as both GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title.lower())) for title in titles)
    return {text.strip().replace(" ", "-") for text in plain}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}" for page in PAGES)])
def test_links_lead_somewhere(page: str) -> None:
    file = ROOT / page
    broken = []
    for link in _LINK.findall(_CODE.sub("", file.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (file.parent / name).resolve() if name else file
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_generated_pages_are_current() -> None:
    assert not [*outdated("commands")]


def test_a_page_that_is_not_current_is_found(tmp_path: Path) -> None:
    missing = outdated("commands", tmp_path)
    write(missing, tmp_path)
    assert not outdated("commands", tmp_path)
    page = "docs/reference/recipes.md"
    with (tmp_path / page).open("a") as file:
        file.write("more\n")
    assert outdated("commands", tmp_path) == {page: missing[page]}


@pytest.mark.skipif(find_spec("material") is None, reason="needs the extra `docs`: scripts/docs installs it")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "tutorial.html").exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_the_service_is_one_that_systemd_takes_and_calls_safe(tmp_path: Path) -> None:
    text = (ROOT / "packaging" / "systemd" / "p2pmodel.service").read_text(encoding="utf-8")
    assert "ExecStart=/opt/p2pmodel/bin/p2pmodel " in text
    unit = tmp_path / "p2pmodel.service"
    unit.write_text(text.replace("/opt/p2pmodel/bin/p2pmodel", shutil.which("true") or "/bin/true"))
    (tmp_path / "p2pmodel.service.d").mkdir()
    shutil.copy(ROOT / "packaging" / "systemd" / "p2pmodel-gpu.conf", tmp_path / "p2pmodel.service.d" / "gpu.conf")
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr, done.stderr
    rating = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", str(unit)]
    done = subprocess.run(rating, capture_output=True, text=True, check=False)
    if "unrecognized option" not in done.stderr:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
