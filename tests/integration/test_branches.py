"""Two lines of development over one base: branches begin, are served to those who know nothing else, and merge."""

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from p2pmodel import starter
from p2pmodel.cli.app import app
from p2pmodel.cli.localswarm import LocalSwarm
from p2pmodel.domain.errors import Busy, InvalidInput, NotFound, Rejected
from p2pmodel.domain.ids import Digest, PatchId, VersionId
from p2pmodel.domain.model import BlobRef, Limits, Origin, Schedule
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.evaluation import attached
from p2pmodel.logic.admission import result_limit
from p2pmodel.node.asking.client import Sampling, SwarmClient
from p2pmodel.node.lineages import discovery
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.node.lineages.intake import check_patch_file, needed_blobs, store, take_in
from p2pmodel.node.lineages.lineage import Lineage, find_lineage, known_lineages
from p2pmodel.node.lineages.states import base_ref, neutral_state, patch_file_state, patch_state, version_state
from p2pmodel.node.patches.branch_merging import merge_branches
from p2pmodel.node.patches.rebasing import masses_of
from p2pmodel.node.rounds.maintaining import Maintainer
from p2pmodel.node.versions.branching import branch
from p2pmodel.store import patchfile
from p2pmodel.store.fsck import fsck
from p2pmodel.store.home import Home
from p2pmodel.tensors import blob
from p2pmodel.tensors.changes import factors
from p2pmodel.tensors.kinds import Kinds
from p2pmodel.wire import canonical, records
from p2pmodel.wire.signing import Key
from tests.support import factories
from tests.support.lineages import add_patch, add_patch_of, adopt, exam_of
from tests.support.training import byte_tokenizer, small_model

PROSE = "the quick brown fox jumps over the lazy dog and runs away. " * 3
State = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exam_of(tmp_path_factory.mktemp("exam"), PROSE)


def begin(home: Home, exam: Path, base: Path = starter.MODEL, name: str = "main", kind: str = "ia3@1") -> Lineage:
    schedule, limits = Schedule(min_patches=1), Limits(regression_tolerance=0.5)
    founding = Founding(name, (home.key.peer,), 1, exam, schedule=schedule, limits=limits, kinds=(kind,))
    return found(home, base, founding)


def advance(lineage: Lineage, seed: int, size: float, values: State | None = None) -> PatchId:
    """A version that is its only patch, which moves all by chance, or to these values."""
    key = Key.generate()
    patch = add_patch(lineage, key, seed, size) if values is None else add_patch_of(lineage, key, values)
    adopt(lineage, [patch], state=patch_state(lineage, lineage.patches[patch]))
    return patch


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, exam: Path) -> Path:
    """A home with `main` at 1.0.2, and `side`, which began with 1.0.1 and went back to the neutral values at its own
    1.0.1."""
    home = Home.open(tmp_path_factory.mktemp("grown") / "home")
    main = begin(home, exam)
    advance(main, 1, 0.3)
    said = run(home.path, "branch", "side", "--from", "1.0.1", "--model", "main")
    assert f"side begins with main 1.0.1 ({main.head[:10]}" in said
    advance(main, 2, 0.01)
    side = find_lineage(home, "side")
    advance(side, 3, 0.0, neutral_state(side.manifest))
    return home.path


@pytest.fixture
def home(grown: Path, tmp_path: Path) -> Home:
    """A copy of it, to be changed."""
    shutil.copytree(grown, tmp_path / "home")
    return Home.open(tmp_path / "home")


def run(home: Path, *arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments), "--home", str(home)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def data(home: Path, *arguments: str | Path) -> Any:
    return json.loads(run(home, *arguments, "--json"))


def expected(main: Lineage, side: Lineage) -> dict[str, Tensor]:
    """Of both heads, by the Fishers of their last patches."""
    theirs, own = (version_state(lineage, lineage.head) for lineage in (side, main))
    masses = []
    for lineage in (side, main):
        (patch,) = lineage.versions[-1].candidate.patches
        masses.append(masses_of(lineage, lineage.patches[patch]))
    result = {}
    for name, value in own.items():
        mass, others = (each[name].double() for each in masses)
        assert bool((mass + others > 0).all())
        way = theirs[name].double() - value.double()
        result[name] = (value.double() + mass / (mass + others) * way).float()
    return result


def test_a_branch_has_the_values_that_it_begins_with_and_a_life_of_its_own(home: Home) -> None:
    main, side = find_lineage(home, "main"), find_lineage(home, "side")
    one = main.versions[0].id
    assert side.founding.origin is not None
    assert (side.founding.origin.version, side.founding.origin.number) == (one, "1.0.1")
    assert all(torch.equal(v, version_state(main, one)[n]) for n, v in version_state(side, side.model).items())
    for name in ("files", "slots", "kinds", "merge", "exam", "schedule", "limits"):
        assert getattr(side.manifest, name) == getattr(main.manifest, name)
    rows = {row["name"]: row for row in data(home.path, "branch", "--model", "main")}
    assert (rows["side"]["ahead"], rows["side"]["behind"]) == (1, 1)
    assert "1 ahead, 1 behind" in run(home.path, "branch", "--model", "main")
    assert f"branches off main 1.0.1 ({one[:10]}" in run(home.path, "log", "--model", "side")
    graph = run(home.path, "log", "--graph", "--model", "side").splitlines()
    assert graph[-1].startswith("*  1.0.1")
    assert graph[-1].endswith("of main")
    assert "(branch side)" in run(home.path, "log", "--graph", "--model", "main")
    assert "begins with  main 1.0.1" in run(home.path, "model", "show", "side")
    assert "of main 1.0.1" in run(home.path, "show", "base", "--model", "side")
    assert data(home.path, "diff", "base", "head", "--model", "side")["slots"]
    assert data(home.path, "log", "--model", str(starter.MODEL))["name"] == "main"  # the folder means what began there


def test_a_chain_that_begins_elsewhere_is_proven_offline(home: Home, tmp_path: Path) -> None:
    said = run(home.path, "version", "verify", "--model", "side")
    assert "1 version after the base" in said
    assert "main 1.0.1" in said
    assert "is proven too" in said
    for version in ("base", "head"):
        folder = tmp_path / version
        run(home.path, "checkout", version, "--model", "side", "--output", folder)
        assert "by what its Manifest says" in run(home.path, "version", "verify", folder)
    assert json.loads((folder / "version.json").read_text())["origin"]["number"] == "1.0.1"
    shutil.copy(tmp_path / "head" / "state.safetensors", tmp_path / "base" / "state.safetensors")
    with pytest.raises(Rejected, match="not those that the version names"):
        run(home.path, "version", "verify", tmp_path / "base")
    assert data(home.path, "deps", "base", "--model", "side")
    side = find_lineage(home, "side")
    assert side.founding.base_values is not None
    run(home.path, "gc", "--keep-days", "1")
    assert not fsck(home).dangling_refs
    assert home.objects.has(side.founding.base_values.digest)


def test_a_branch_that_lies_of_its_origin_is_found_out(home: Home) -> None:
    main, side = find_lineage(home, "main"), find_lineage(home, "side")
    assert side.founding.origin is not None
    origin = dataclasses.replace(side.founding.origin, result=base_ref(main.founding))
    liar = dataclasses.replace(side.founding, name="liar", origin=origin)
    Lineage.create(home, home.key.sign("manifest", liar))
    with pytest.raises(Rejected, match="other values"):
        run(home.path, "version", "verify", "--model", "liar")


def test_what_others_say_of_an_origin_does_not_count(home: Home, tmp_path: Path) -> None:
    main, side = find_lineage(home, "main"), find_lineage(home, "side")
    assert side.founding.origin is not None
    merge_branches(main, side, tmp_path / "before")
    honest = patch_file_state(main, tmp_path / "before")
    lie = home.objects.put(blob.pack({name: value + 1 for name, value in neutral_state(main.manifest).items()}))
    for number in range(6):  # whichever comes first
        origin = dataclasses.replace(side.founding.origin, result=lie)
        liar = dataclasses.replace(side.founding, name=f"liar{number}", origin=origin)
        Lineage.create(home, home.key.sign("manifest", liar))
    merge_branches(main, side, tmp_path / "after")
    assert all(map(torch.equal, patch_file_state(main, tmp_path / "after").values(), honest.values()))
    with pytest.raises(Rejected, match="other values"):
        merge_branches(main, find_lineage(home, "liar0"), tmp_path / "lie")


def test_the_merge_of_two_branches_is_weighed_by_their_fishers(home: Home, tmp_path: Path) -> None:
    main, side = find_lineage(home, "main"), find_lineage(home, "side")
    output = tmp_path / "side.p2patch"
    said = data(home.path, "merge-branches", "side", "--model", "main", "--output", output)
    assert said["at"] == ["main", "1.0.1"]
    assert said["theirs"] == list(side.versions[0].candidate.patches)
    assert said["own"] == list(main.versions[1].candidate.patches)
    assert said["their_norm"] > said["own_norm"] > 0
    assert 0 < said["angle"] < 180
    merged = patch_file_state(main, output)
    for name, value in expected(main, side).items():
        torch.testing.assert_close(merged[name], value)
    check_patch_file(main, patchfile.read(output))
    shown = run(home.path, "patch", "show", output)
    assert "a.txt" in shown
    assert "merged branches" in shown
    text = run(home.path, "merge-branches", "main", "--model", "side", "--output", tmp_path / "main.p2patch")
    assert "1 patch since main 1.0.1" in text
    assert "p2pmodel patch publish" in text
    back = patch_file_state(side, tmp_path / "main.p2patch")
    assert all(torch.allclose(back[name], value, atol=1e-6) for name, value in merged.items())


def test_what_only_one_side_changed_goes_over_as_it_is(home: Home, tmp_path: Path) -> None:
    main, side = find_lineage(home, "main"), find_lineage(home, "side")
    old = branch(main, main.versions[0].id, "old", (home.key.peer,), 1)
    assert merge_branches(old, side, tmp_path / "p").angle is None
    state = patch_file_state(old, tmp_path / "p")
    assert all(torch.allclose(state[n], v) for n, v in version_state(side, side.head).items())


def test_what_cannot_be_merged_is_refused_in_a_sentence(home: Home, exam: Path, tmp_path: Path) -> None:
    main, side = find_lineage(home, "main"), find_lineage(home, "side")
    output = tmp_path / "no.p2patch"
    with pytest.raises(InvalidInput, match="itself"):
        merge_branches(main, main, output)
    twin = branch(main, main.versions[0].id, "twin", (home.key.peer,), 1)
    with pytest.raises(InvalidInput, match=r"twin has changed nothing since main 1\.0\.1"):
        merge_branches(main, twin, output)
    small_model().save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(InvalidInput, match="another base"):
        merge_branches(begin(home, exam, tmp_path / "small", "small"), side, output)
    with pytest.raises(Busy, match="known here already"):
        run(home.path, "branch", "side", "--model", "main")
    stranger = Home.open(tmp_path / "stranger")
    for lineage in (twin, branch(main, main.head, "late", (home.key.peer,), 1)):
        for ref in (lineage.record, lineage.founding.base_values):
            assert ref is not None
            stranger.objects.put(home.objects.load(ref.digest))
    fsck(stranger)
    with pytest.raises(NotFound, match="parted is not known here"):
        merge_branches(find_lineage(stranger, "twin"), find_lineage(stranger, "late"), output)
    home.objects.remove(side.versions[0].candidate.result.digest)
    with pytest.raises(NotFound, match="not on this machine"):
        merge_branches(main, side, output)
    assert not output.exists()


@pytest.mark.parametrize("kind", ["dense@1", "fish@1", "lora@1"])
def test_weights_merge_into_whatever_the_lineage_takes(tmp_path: Path, exam: Path, kind: str) -> None:
    """Of lineages that were founded apart, on the same files."""
    base = tmp_path / "small"
    small_model(num_hidden_layers=1).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    home = Home.open(tmp_path / "home")
    mine, other = begin(home, exam, base, "mine", kind), begin(home, exam, base, "other", "dense@1")
    slots = [slot for slot in other.manifest.slots if slot.name.endswith("q_proj.weight")]
    left, right = torch.randn(slots[0].shape[0], 2), torch.randn(2, slots[0].shape[1])
    fisher = {k: v for slot in slots for k, v in factors(slot.name, torch.rand(slot.shape) + 0.1).items()}
    patch = add_patch_of(other, Key.generate(), {slots[0].name: left @ right}, fisher)
    adopt(other, [patch], state=patch_state(other, other.patches[patch]))
    done = merge_branches(mine, other, tmp_path / "p")
    assert done.patch.kind == kind
    assert done.kept == pytest.approx(1.0)
    merged, wanted = patch_file_state(mine, tmp_path / "p"), version_state(other, other.head)
    assert all(torch.allclose(merged[name], wanted[name], atol=1e-4) for name in merged)
    check_patch_file(mine, patchfile.read(tmp_path / "p"))


def test_maintainers_adopt_the_merge_like_any_patch(home: Home, tmp_path: Path) -> None:
    main, side = find_lineage(home, "main"), find_lineage(home, "side")
    wanted, before, parent = expected(main, side), version_state(main, main.head), main.head
    merge_branches(main, side, tmp_path / "side.p2patch")
    patch = take_in(main, (tmp_path / "side.p2patch").read_bytes()).digest
    main.refresh()
    maintainer = Maintainer(main, home.key.peer, starter.MODEL, lambda seconds: None)
    proposal = maintainer.propose(3, parent, (patch,))
    assert proposal is not None
    assert not proposal.candidate.left_out
    for raw in proposal.blobs:
        home.objects.put(raw)
    record = home.key.sign("candidate", proposal.candidate)
    store(main, "candidate", record, needed_blobs(main, "candidate", record))
    main.refresh()
    verdict = maintainer.examine(records.version_id(proposal.candidate))
    assert verdict.accept
    store(main, "verdict", home.key.sign("verdict", verdict), ())
    main.refresh()
    assert str(main.number(main.head)) == "1.0.3"
    alpha, adopted = proposal.candidate.alpha, version_state(main, main.head)
    for name, value in wanted.items():
        torch.testing.assert_close(adopted[name], before[name] + alpha * (value - before[name]))
    run(home.path, "version", "verify", "--model", "main")


def test_a_newcomer_that_knows_the_branch_alone_serves_it_with_its_values(home: Home, tmp_path: Path) -> None:
    side = find_lineage(home, "side")
    with LocalSwarm(tmp_path) as swarm:
        holder = swarm.start("home", "--model", "side", "--layers", "none", "--threads", "1")
        holder.wait_until_serving(time.monotonic() + 120)
        newcomer = swarm.start(
            "newcomer", "--peers", holder.address, "--model", "side", "--layers", "0:6", "--threads", "1"
        )
        newcomer.wait_until_serving(time.monotonic() + 120)
        assert [x.manifest.name for x in known_lineages(Home.open(tmp_path / "newcomer"))] == ["side"]
        with SwarmClient.connect(tmp_path / "client", (newcomer.address,), "side", None) as client:
            ids, sampling = client.encode("def parse("), Sampling(max_new_tokens=8)
            answers = [
                client.generate("def parse(", sampling, version, "fp32", lambda piece: None).text
                for version in ("base", "head")
            ]
    assert answers == [answer(side, ids, version) for version in (side.model, side.head)]
    assert answers[0] != answers[1]


def answer(lineage: Lineage, ids: Tensor, version: str) -> str:
    """Computed here, on the whole model."""
    state = version_state(lineage, VersionId(Digest(version)))
    model, tokenizer = load_whole(starter.MODEL), load_tokenizer(starter.MODEL)
    kinds = Kinds(lineage.manifest.kinds)
    with torch.no_grad(), attached(model, kinds, state) as applier, applier.use(state):
        made = model.generate(ids, max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


async def test_values_that_a_branch_says_it_begins_with_are_no_larger_than_its_slots(tmp_path: Path) -> None:
    key, of = Key.generate(), canonical.digest(b"origin")
    plain = factories.manifest(key)
    values = BlobRef(canonical.digest(b"values"), result_limit(plain) + 1)
    noun = dataclasses.replace(plain, origin=Origin(of, of, "1.0.1", values))
    lineage = Lineage.create(Home.open(tmp_path), key.sign("manifest", noun))
    with pytest.raises(Rejected, match="bytes of values") as refused:
        await discovery._fetch_base_values(lineage, None, ())  # type: ignore[arg-type]  # nobody is asked
    assert refused.value.reason == "size"
