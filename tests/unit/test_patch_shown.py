"""What a signed patch says of itself, whatever that is, as the commands show it: lines of text, or one sentence."""

import dataclasses
import json
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmodel.cli.patching import _data, _training
from p2pmodel.cli.recipes import KEYS, OF_KINDS, recipe_of
from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.patch import MAX_COUNT, MAX_STEPS, DataFile, Patch, Provenance, Recipe
from p2pmodel.wire import canonical, records
from p2pmodel.wire.signing import Key
from p2pmodel.wire.statement import croissant, envelope, open_envelope
from tests.support.factories import patch

KEY = Key.generate()
DIGESTS = st.binary(max_size=2).map(canonical.digest)
COUNTS, SHARES = st.integers(1, MAX_COUNT), st.floats(0, 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=32)
OPTIONS = st.dictionaries(
    st.sampled_from([name.replace("-", "_") for name in KEYS]) | st.sampled_from(("", 'x"\nsteps', "=")),
    FINITE,
    max_size=2,
).map(lambda given: tuple(sorted(given.items())))
RECIPES = st.builds(
    Recipe,
    seed=st.integers(0, (1 << 63) - 1),
    steps=st.integers(0, MAX_STEPS),
    batch=COUNTS,
    sequence=COUNTS,
    fisher_examples=COUNTS,
    accumulate=COUNTS,
    learning_rate=FINITE.map(abs),
    clip=FINITE.map(abs),
    warm_up=SHARES,
    validation=SHARES,
    optimizer=TEXTS,
    schedule=TEXTS,
    precision=TEXTS,
    fisher=TEXTS,
    kind_options=OPTIONS,
    continued=st.booleans(),
)
FILES = st.builds(DataFile, TEXTS, DIGESTS, st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), licence=TEXTS)


@st.composite
def patches(draw: st.DrawFn) -> Patch:
    checkpoints = tuple(draw(st.lists(DIGESTS, max_size=4)))
    states: tuple[Digest, ...] = checkpoints if draw(st.booleans()) else ()
    files = st.lists(FILES, max_size=2).map(tuple)
    provenance = Provenance(
        draw(files),
        draw(RECIPES),
        tuple(draw(st.lists(st.tuples(TEXTS, TEXTS), max_size=2))),
        draw(st.integers(1, MAX_STEPS)),
        checkpoints,
        states,
        draw(files),
        draw(COUNTS),
        draw(st.none() | DIGESTS),
        draw(st.none() | DIGESTS),
    )
    return dataclasses.replace(patch(KEY), kind=draw(TEXTS), licence=draw(TEXTS), provenance=provenance)


@settings(max_examples=60, deadline=None)
@given(patches())
def test_a_patch_is_shown_in_lines(noun: Patch) -> None:
    record = KEY.sign("patch", noun)
    assert records.open_patch(record) == noun
    provenance = noun.provenance
    lines = [*_training(noun), *(_data("data", file) for file in (*provenance.data, *provenance.validation))]
    assert all(line.isprintable() for line in lines)
    assert open_envelope(envelope(record, KEY))[1] == noun
    assert json.dumps(croissant(canonical.digest(record), noun))


@settings(max_examples=60, deadline=None)
@given(patches())
def test_a_patchs_recipe_is_a_recipe_or_a_sentence(noun: Patch) -> None:
    """Nothing in it is an option that its reader did not ask for."""
    names = {name.replace("_", "-") for name, _ in noun.provenance.recipe.kind_options}
    if not names <= OF_KINDS:
        with pytest.raises(InvalidInput, match="not known here"):
            recipe_of(noun)
        return
    assert tomllib.loads(recipe_of(noun)).keys() <= KEYS.keys() - {"output", "plot", "base", "model"}
