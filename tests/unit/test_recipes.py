"""Recipes as files, and what a training shows at its end."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.cli.recipes import KEYS, as_toml, read_recipe, recipe_of
from p2pmodel.cli.training_display import WIDTH, demand_plots, sparkline
from p2pmodel.domain.errors import InvalidInput
from p2pmodel.wire.signing import Key
from tests.support import factories


def test_a_recipe_holds_options_and_finds_its_files(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'data = ["a.txt", "/b.txt"]\nlearning-rate = 1\nearly_stopping = 3\npacking = false\nkind = "ia3"\n'
    )
    assert read_recipe(path) == {
        "data": [tmp_path / "a.txt", Path("/b.txt")],
        "learning_rate": 1.0,
        "early_stopping": 3,
        "packing": False,
        "kind": "ia3",
    }
    path.write_text('data = "a.txt"\noutput = "a.p2patch"\nmodel = "m"\nrouter = true\n')
    assert read_recipe(path) == {
        "data": [tmp_path / "a.txt"],
        "output": tmp_path / "a.p2patch",
        "model": "m",
        "router": True,
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning-rte = 1.0", r"'learning-rte'.*Did you mean learning-rate\?"),
        ("xyzzy = 1", "'xyzzy'.*p2pmodel train --help"),
        ('steps = "many"', "gives steps as 'many'; it has to be a whole number"),
        ("steps = true", "a whole number"),
        ("packing = 1", "true or false"),
        ("data = [1]", "a list of file names"),
        ("[training]\nsteps = 3", "'training'"),
        ("steps =", "not valid TOML"),
        ("a = '\xff", "not UTF-8|not valid TOML"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidInput, match=says):
        read_recipe(path)


def test_a_recipe_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize(
    ("options", "read_as"),
    [
        ((), {}),
        ((("rank", 4.0), ("router", 0.0)), {"rank": 4, "router": False}),
        ((("density", 0.025), ("mask_examples", 8.0)), {"density": 0.025, "mask_examples": 8}),
    ],
    ids=["ia3", "expert", "fish"],
)
def test_the_recipe_of_a_patch_can_be_used_again(
    tmp_path: Path, options: tuple[tuple[str, float], ...], read_as: dict[str, object]
) -> None:
    patch = factories.patch(Key.generate())
    recipe = replace(patch.provenance.recipe, kind_options=options)
    text = recipe_of(replace(patch, provenance=replace(patch.provenance, recipe=recipe)))
    (tmp_path / "r.toml").write_text(text)
    read = read_recipe(tmp_path / "r.toml")
    assert read["steps"] == 10
    assert read["seed"] == 1
    assert read["learning_rate"] == 0.01
    assert read["data"] == [tmp_path / "notes.txt"]
    assert {name.replace("_", "-") for name in read} <= KEYS.keys()
    (tmp_path / "r.toml").write_text(recipe_of(patch, "mine"))
    assert read_recipe(tmp_path / "r.toml")["expert"] == "mine"
    for name, value in read_as.items():
        assert type(read[name]) is type(value)
        assert read[name] == value


@given(
    st.dictionaries(
        st.from_regex("[a-z-]{1,9}", fullmatch=True),
        st.text(st.characters(exclude_categories=["Cs"]))
        | st.booleans()
        | st.integers(-(1 << 60), 1 << 60)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.lists(st.text('ab"\\\n'), max_size=3),
    )
)
def test_toml_is_read_as_it_was_written(values: dict[str, object]) -> None:
    assert tomllib.loads(as_toml(values)) == values


@given(st.lists(st.floats(0, 20), max_size=200))
def test_a_sparkline_has_a_bar_a_value_up_to_its_width(values: list[float]) -> None:
    line = sparkline(values)
    assert len(line) == min(len(values), WIDTH)
    if 0 < len(values) <= WIDTH and max(values) > min(values):
        assert line[values.index(max(values))] == "█"
        assert line[values.index(min(values))] == "▁"


def test_plots_are_files_that_can_be_drawn() -> None:
    with pytest.raises(InvalidInput, match=r"ends in \.png"):
        demand_plots(Path("losses.gif"))
