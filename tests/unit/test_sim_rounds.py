"""Rounds of whole swarms in virtual time: what has to hold does, a seed tells one history, a broken promise shows."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from p2pmodel.cli.app import app
from p2pmodel.domain.errors import InvalidInput, NotFound
from p2pmodel.domain.ids import PeerId
from p2pmodel.logic import rounds
from p2pmodel.logic.round_state import Event, Tick
from p2pmodel.sim.book import bits
from p2pmodel.sim.judge import simulate
from p2pmodel.sim.scenario import Scenario, bundled, load, parse
from tests.unit.test_rounds import MODEL, events, opened, rules_of

SMALL = """
name = "small"
about = "a few nodes"
hours = 2.0
settle_minutes = 20.0
[swarm]
nodes = 24
contributors = 6
[schedule]
min_patches = 5
open_seconds = 900.0
[work]
train_seconds = [60.0, 300.0]
[limits]
versions = 4
"""
WORLDS = {
    "calm": "",
    "loss": "[network]\nloss = 0.3\nfailure = 0.2\n",
    "partition": "[[partitions]]\nat_minutes = 20.0\nminutes = 30.0\nshare = 0.4\nmaintainers = 2\n",
    "churn": "[churn]\nmean_life_hours = 1.0\naway_seconds = [10.0, 300.0]\n",
    "liars": "[liars]\ncontributors = 0.3\nmaintainers = 1\nforgers = 3\n",
    "spoiler": "[liars]\nspoilers = 1\n",
    "leaper": "[liars]\nleapers = 1\n",
    "amender": "[liars]\namenders = 1\n",
    "skew": "[clocks]\nskew_seconds = 12.0\ndrift = 0.05\n",
}


def world(more: str, **swarm: int) -> Scenario:
    scenario = parse(SMALL + more, "small.toml")
    return replace(scenario, swarm=replace(scenario.swarm, **swarm))


@pytest.mark.parametrize("name", WORLDS)
def test_promises_are_kept_whatever_the_world_is_like(name: str) -> None:
    outcome = simulate(world(WORLDS[name], threshold=4 if name == "liars" else 3), 1)
    assert outcome.violations == ()
    assert outcome.merged > 0
    assert (outcome.misbehaved, outcome.refused > 0) == (name in ("liars", "amender"), name == "liars")


def test_a_version_that_comes_at_the_end_has_time_to_arrive() -> None:
    """It is proven 8.6 s before the end, and one node still lacks it."""
    scenario, seed = load("lossy").changed(30, 2.0), 950
    assert simulate(scenario, seed).violations == ()
    strict = replace(scenario, limits=replace(scenario.limits, reach_seconds=8.0))
    assert any("1 of 30 honest nodes have not reached 1.0.8" in text for text in simulate(strict, seed).violations)


def test_who_forges_may_go_and_come_back() -> None:
    scenario = parse((SMALL + WORLDS["churn"] + "[liars]\nforgers = 8\n").replace("versions = 4", "versions = 2"), "")
    outcome = simulate(replace(scenario, hours=1.0), 1)
    assert outcome.went > 5
    assert outcome.refused > 0
    assert outcome.violations == ()


def test_a_seed_tells_one_history() -> None:
    scenario = world(WORLDS["churn"])
    first, again, other = (simulate(scenario, seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_patches_of_rounds_in_which_maintainers_were_silent_are_merged_later() -> None:
    slow = "[work]\ntrain_seconds = [60.0, 300.0]\nexamine_seconds = [60.0, 900.0]\n"
    text = SMALL.replace("[work]\ntrain_seconds = [60.0, 300.0]\n", slow).replace("versions = 4", "versions = 2")
    scenario = parse(text, "slow.toml")
    outcome = simulate(replace(scenario, hours=4.0, swarm=replace(scenario.swarm, threshold=4)), 0)
    assert outcome.abandoned > 0
    assert outcome.violations == ()


def test_a_threshold_that_is_too_low_is_found_out() -> None:
    """Where any one is enough, two candidates of one round pass, or two of one parent."""
    scenario = world("[liars]\ncontributors = 0.3\nmaintainers = 1\n", threshold=1)
    broken = [violation for seed in range(2) for violation in simulate(scenario, seed).violations]
    assert any("adopted 2 versions" in violation or "two adopted children" in violation for violation in broken)


@given(st.lists(st.tuples(st.floats(0, 40), events), max_size=30), st.integers(1, 3), st.floats(0, 200))
def test_nothing_happens_before_the_next_tick(steps: list[tuple[float, Event]], threshold: int, later: float) -> None:
    rules, now = rules_of(3, threshold), 0.0
    me: PeerId = rules.maintainers[0]
    state = opened()
    for pause, event in steps:
        now += pause
        state, _ = rounds.advance(state, event, now, rules, me)
        if state.ended and state.adopted is None:
            state = rounds.reopen(state, now)
    at = rounds.next_tick(state, rules, me)
    when = now + later
    after, effects = rounds.advance(state, Tick(), when, rules, me)
    assert (after == state and not effects) == (at is None or when < at)
    assert state.parent == MODEL


def test_sets_of_records() -> None:
    assert list(bits(0b101001)) == [0, 3, 5]


def test_scenarios_come_with_the_package() -> None:
    known = bundled()
    assert set(known) == {"calm", "churn", "day-5000", "liars", "lossy", "partition", "skew", "stallers"}
    assert all(scenario.name == name for name, scenario in known.items())
    assert load("calm") == known["calm"]
    with pytest.raises(NotFound, match="no scenario 'storm'"):
        load("storm")
    with pytest.raises(NotFound, match="no file"):
        load("nowhere/storm.toml")
    with pytest.raises(InvalidInput, match="contributors has to be"):
        known["calm"].changed(nodes=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "name is missing"),
        (SMALL + "[weather]\nrain = 1\n", "weather is no key"),
        (SMALL + "[network]\nlos = 0.1\n", "network.los is no key"),
        (SMALL + "[network]\nloss = 1.5\n", "network.loss has to be a share below 1"),
        (SMALL + "[network]\nloss = 'much'\n", "network.loss has to be a number, not 'much'"),
        (SMALL + "[network]\ndelay_seconds = 0.1\n", "network.delay_seconds has to be two numbers"),
        (SMALL + "[network]\ndelay_seconds = [0.2, 0.1]\n", "network.delay_seconds has to be"),
        (SMALL + "[churn]\nreplaced = 0.5\n", "churn.mean_life_hours is missing"),
        (SMALL + "churn = 3\n", "churn has to be a table|limits.churn is no key"),
        (SMALL + "[[partitions]]\nat_minutes = 90.0\nminutes = 20.0\nshare = 0.5\n", "before it all settles"),
        (SMALL.replace("nodes = 24", "nodes = true"), "swarm.nodes has to be a whole number, not 'True'"),
        (SMALL.replace("nodes = 24", "nodes = 8"), "swarm.contributors has to be"),
        ("name = ", "is no TOML"),
    ],
    ids=range(13),
)
def test_what_is_wrong_with_a_scenario_is_one_sentence_with_its_key(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        parse(text, "storm.toml")
    assert caught.value.message.startswith("storm.toml")


def test_the_command_prints_figures_and_ends_with_1_when_a_promise_is_broken(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("sim") / "small.toml"
    file.write_text(SMALL)
    run = CliRunner().invoke(app, ["sim", str(file), "--seeds", "2", "--nodes", "12", "--hours", "0.5"])
    assert run.exit_code == 1
    assert f"again: p2pmodel sim {file} --seed 1 --nodes 12 --hours 0.5" in run.stdout
    data = json.loads(CliRunner().invoke(app, ["sim", str(file), "--seed", "1", "--json"]).stdout)
    assert data["failed"] == []
    assert data["runs"][0]["seed"] == 1
    listed = CliRunner().invoke(app, ["sim", "--list"])
    assert listed.exit_code == 0
    assert "day-5000" in listed.stdout
    assert isinstance(CliRunner().invoke(app, ["sim"]).exception, Exception)
