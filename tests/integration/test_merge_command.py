"""`p2pmodel merge`: patches of the starter model, as files and from the home, into one patch."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from p2pmodel.cli.app import app
from p2pmodel.cli.merging import parse_strategy, parse_weights
from p2pmodel.domain.errors import InvalidInput, NotFound, P2PModelError, Rejected, StorageError, UsageError
from p2pmodel.domain.ids import PatchId
from p2pmodel.domain.model import MergeSpec
from p2pmodel.node.lineages import states
from p2pmodel.node.lineages.intake import check_tensors
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import patch_file_state, patch_state, version_state
from p2pmodel.tensors.merging import BUILT_IN
from p2pmodel.wire import bundle
from p2pmodel.wire.signing import Key
from tests.support.lineages import add_patch, adopt, begin


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    return begin(tmp_path / "home")


def run(lineage: Lineage, *arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(app, ["merge", *arguments, "--json", "--home", str(lineage.home.path)])
    if isinstance(result.exception, P2PModelError):
        raise result.exception
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


def as_file(lineage: Lineage, patch: PatchId, path: Path) -> Path:
    header = lineage.patches[patch]
    load = lineage.home.objects.load
    path.write_bytes(bundle.pack(load(patch), load(header.adapter.digest), load(header.fisher.digest)))
    return path


@pytest.mark.parametrize("strategy", [name.removesuffix("@1") for name in BUILT_IN])
def test_the_merge_is_a_patch_like_any_other(lineage: Lineage, tmp_path: Path, strategy: str) -> None:
    patches = [add_patch(lineage, Key.generate(), seed) for seed in range(3)]
    output = tmp_path / "merged.p2patch"
    texts = [str(as_file(lineage, patches[0], tmp_path / "first.p2patch")), *patches[1:]]
    result = run(lineage, *texts, "--strategy", strategy, "--alpha", "0.5", "--output", str(output))
    assert result["alpha"] == 0.5
    for command in (["patch", "show"], ["patch", "verify"]):
        shown = CliRunner().invoke(app, [*command, str(output), "--home", str(lineage.home.path)])
        assert shown.exit_code == 0, shown.output
    moved = patch_file_state(lineage, output)
    before = version_state(lineage, lineage.model)
    assert any(not torch.equal(moved[slot], before[slot]) for slot in before)
    if strategy == "mean":
        states = [patch_state(lineage, lineage.patches[patch]) for patch in patches]
        for slot, value in before.items():
            mean = sum(state[slot].double() - value.double() for state in states) / 3
            torch.testing.assert_close(moved[slot], (value.double() + 0.5 * mean).float())


def test_the_order_in_which_patches_are_named_changes_nothing(lineage: Lineage, tmp_path: Path) -> None:
    patches = [add_patch(lineage, Key.generate(), seed) for seed in range(3)]
    output = str(tmp_path / "merged.p2patch")
    first = run(lineage, *patches, "--alpha", "1", "--output", output)
    assert run(lineage, *reversed(patches), "--alpha", "1", "--output", output)["id"] == first["id"]


def test_the_influence_of_a_patch_is_what_its_absence_changes(lineage: Lineage, tmp_path: Path) -> None:
    small, large = add_patch(lineage, Key.generate(), 1, size=0.01), add_patch(lineage, Key.generate(), 2, size=0.1)
    weighed = [small, large, "--strategy", "mean", "--alpha", "1", "--explain", "--output", str(tmp_path / "m.p2patch")]
    influences = run(lineage, *weighed)["influences"]
    assert isinstance(influences, list)
    states = {patch: patch_state(lineage, lineage.patches[patch]) for patch in (small, large)}
    first = influences[0]
    difference = (states[large][first["slot"]].double() - states[small][first["slot"]].double()).norm() / 2
    assert first["distance"] == pytest.approx(float(difference), rel=1e-6)
    assert {x["patch"] for x in influences} == {small, large}
    without = run(lineage, *weighed, "--lambda", f"{large}=0")["influences"]
    assert isinstance(without, list)
    assert {x["patch"] for x in without} == {small}


def test_the_scale_is_found_on_the_exam(lineage: Lineage, tmp_path: Path) -> None:
    adopt(lineage, [add_patch(lineage, Key.generate(), 1, size=0.3)])
    from tests.support.lineages import add_patch_of

    back = add_patch_of(lineage, Key.generate(), version_state(lineage, lineage.model))
    result = run(lineage, back, "--output", str(tmp_path / "merged.p2patch"))
    before, after = result["tuned"]  # type: ignore[misc]
    assert after < before  # type: ignore[has-type]


def test_what_does_not_fit_together_is_refused(lineage: Lineage, tmp_path: Path) -> None:
    old = add_patch(lineage, Key.generate(), 1)
    output = ["--alpha", "1", "--output", str(tmp_path / "merged.p2patch")]
    with pytest.raises(InvalidInput, match="named twice"):
        run(lineage, old, old, *output)
    with pytest.raises(UsageError, match="none of the patches"):
        run(lineage, old, "--lambda", "abcdef=1", *output)
    with pytest.raises(NotFound):
        run(lineage, "0123456789", *output)
    with pytest.raises(UsageError, match="scale nan"):
        run(lineage, old, "--alpha", "nan", *output[2:])
    with pytest.raises(InvalidInput, match="there is no folder"):
        run(lineage, old, "--alpha", "1", "--output", str(tmp_path / "nowhere" / "merged.p2patch"))
    (tmp_path / "broken.p2patch").write_bytes(b"no patch")
    with pytest.raises(Rejected, match=r"broken\.p2patch is no patch file"):
        run(lineage, str(tmp_path / "broken.p2patch"), *output)
    with pytest.raises(Rejected, match="weights"):
        run(lineage, old, "--lambda", f"{old}=0", *output)
    adopt(lineage, [old])
    with pytest.raises(InvalidInput, match="different parents"):
        run(lineage, old, add_patch(lineage, Key.generate(), 2), *output)
    assert not (tmp_path / "merged.p2patch").exists()


def test_strategies_and_weights_are_spelled_plainly() -> None:
    assert parse_strategy("ties:norm_clip=2,density=0.3").parameters == (("density", 0.3), ("norm_clip", 2.0))
    assert parse_weights(["a=b=0.5"]) == {"a=b": 0.5}
    with pytest.raises(NotFound, match="built in are"):
        parse_strategy("magic")
    with pytest.raises(Rejected, match="density"):
        parse_strategy("ties:density=2")
    for wrong in ("x", "x=", "=1", "x=-1", "x=nan"):
        with pytest.raises(UsageError):
            parse_weights([wrong])


def test_a_merge_by_hand_has_no_momentum_that_its_round_would_add_again(tmp_path: Path) -> None:
    lineage = begin(tmp_path / "home", merge=MergeSpec("mean@1", (("momentum", 0.5),)))
    adopt(lineage, [add_patch(lineage, Key.generate(), 1, size=0.1)])
    patch = add_patch(lineage, Key.generate(), 2)
    output = tmp_path / "merged.p2patch"
    run(lineage, patch, "--alpha", "1", "--output", str(output))
    alone = patch_state(lineage, lineage.patches[patch])
    for slot, value in patch_file_state(lineage, output).items():
        torch.testing.assert_close(value, alone[slot])


def test_large_blobs_are_mapped_and_verified(lineage: Lineage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = [add_patch(lineage, Key.generate(), seed) for seed in range(2)]
    texts = [str(as_file(lineage, patches[0], tmp_path / "first.p2patch")), patches[1]]
    small, large = tmp_path / "small.p2patch", tmp_path / "large.p2patch"
    run(lineage, *texts, "--alpha", "1", "--output", str(small))
    monkeypatch.setattr(states, "_MAPPED_BYTES", 0)
    run(lineage, *texts, "--alpha", "1", "--output", str(large))
    merged = patch_file_state(lineage, large)
    for slot, value in patch_file_state(lineage, small).items():
        assert torch.equal(merged[slot], value)
    hurt = lineage.home.objects.path(lineage.patches[patches[1]].adapter.digest)
    hurt.chmod(0o600)
    hurt.write_bytes(hurt.read_bytes()[:-1] + b"!")
    with pytest.raises(StorageError, match="damaged"):
        run(lineage, *texts, "--alpha", "1", "--output", str(large))


def test_values_that_are_not_aligned_are_refused(lineage: Lineage) -> None:
    patch = lineage.patches[add_patch(lineage, Key.generate(), 1)]
    raw = lineage.home.objects.load(patch.adapter.digest)
    length = int.from_bytes(raw[:8], "little")
    shifted = (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    with pytest.raises(Rejected, match="aligned"):
        check_tensors(lineage, patch, shifted, lineage.home.objects.load(patch.fisher.digest))
