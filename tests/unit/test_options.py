"""Options that several commands share."""

import json
from pathlib import Path

import pytest

from p2pmodel.cli.app import main, named_home
from p2pmodel.cli.options import parse_address
from p2pmodel.domain.errors import UsageError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9100", ("127.0.0.1", 9100)),
        (":9100", ("127.0.0.1", 9100)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:0", ("::1", 0)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", "1:70000", "1:-1", "1:²"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


@pytest.mark.parametrize(
    ("words", "home"),
    [
        (["join", "--home", "a"], "a"),
        (["--home", "a", "join", "--home=b", "--cpu"], "b"),
        (["infer", "--", "--home", "a"], None),
        (["join", "--home"], None),
        ([], None),
    ],
    ids=["behind", "last", "text", "nothing", "none"],
)
def test_the_home_that_is_named(words: list[str], home: str | None) -> None:
    assert named_home(["p2pmodel", *words]) == (home and Path(home))


@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
def test_the_home_that_is_named_says_what_options_default_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], behind: bool
) -> None:
    monkeypatch.setenv("P2PMODEL_HOME", str(tmp_path))
    home = ["--home", str(tmp_path / "named")]
    words = ["p2pmodel", "id", "show", *home] if behind else ["p2pmodel", *home, "id", "show"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.startswith("12D3KooW")
    (tmp_path / "named" / "config.toml").write_text("[id.show]\njson = true\n")
    with pytest.raises(SystemExit):
        main()
    assert json.loads(capsys.readouterr().out)["key"].startswith(str(tmp_path / "named"))
