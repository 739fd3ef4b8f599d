"""`p2pmodel train` as people run it: a process that can be killed, and patch files that do not show it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from p2pmodel import starter
from p2pmodel.cli.app import app
from p2pmodel.domain.errors import P2PModelError, Rejected
from p2pmodel.domain.ids import Digest
from p2pmodel.engine.training.loop import Trained
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.engine.training.resuming import Progress
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.node.lineages.intake import check_patch_file, take_in
from p2pmodel.node.lineages.lineage import Lineage, known_lineages
from p2pmodel.node.lineages.states import read_change
from p2pmodel.node.patches import continuity, savepoints
from p2pmodel.node.patches.contributing import Assignment, train_patch
from p2pmodel.node.patches.savepoints import Savepoints
from p2pmodel.store import patchfile
from p2pmodel.store.fsck import fsck
from p2pmodel.store.home import Home
from p2pmodel.tensors import blob, control
from p2pmodel.wire import bundle, canonical
from tests.support.lineages import begin, grow
from tests.support.training import CHAT_TEMPLATE, PROSE, byte_tokenizer, small_model

SHORT = ("--steps", "6", "--checkpoint-every", "3", "--sequence", "32", "--fisher-examples", "4")


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, a text, and a home that has founded a lineage on them."""
    folder = tmp_path_factory.mktemp("lineage")
    small_model().save_pretrained(folder / "model")
    byte_tokenizer(template=CHAT_TEMPLATE).save_pretrained(folder / "model")
    (folder / "prose.txt").write_text(PROSE * 60)
    home = Home.open(folder / "home")
    found(home, folder / "model", Founding("tiny", (home.key.peer,), 1, starter.EXAM, kinds=("ia3@1", "lora@1")))
    home.close()
    return folder


@pytest.fixture
def home(founded: Path, tmp_path: Path) -> Path:
    """A copy of its own, with the same key."""
    shutil.copytree(founded / "home", tmp_path / "home")
    return tmp_path / "home"


def command(founded: Path, home: Path, output: Path, *more: str, data: Path | None = None) -> list[str]:
    """Arguments of `p2pmodel`."""
    where = ("--home", str(home), "--model", "tiny", "--base", str(founded / "model"), "--threads", "1")
    which = ("--data", str(data or founded / "prose.txt"), "--output", str(output))
    return ["train", *where, *which, *more]


def run(arguments: list[str], code: int = 0) -> Result:
    """In this process, which has loaded torch already."""
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, P2PModelError):
        assert result.exception.exit_code == code, result.exception
    else:
        assert result.exit_code == code, result.exception
    return result


def lineage_of(home: Path) -> Lineage:
    (lineage,) = known_lineages(Home.open(home))
    return lineage


def progress_of(home: Home) -> Progress | None:
    names = [name for name in home.refs.names("models/") if "/training/" in name]
    if not names:
        return None
    _, model, _, key = names[0].split("/")
    return Savepoints(Lineage(home, Digest(model)), Digest(key)).found()


def kill_after(arguments: list[str], folder: Path, step: int) -> Progress:
    """Lets a process train up to `step` steps, and kills it at whatever it then does."""
    home = Home.open(folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "p2pmodel", *arguments], stderr=subprocess.PIPE, env=environment
    ) as process:
        try:
            while process.poll() is None:
                progress = progress_of(home)
                if progress is not None and progress.step >= step:
                    break
                time.sleep(0.005)
            assert process.poll() is None, process.stderr and process.stderr.read()
        finally:
            process.send_signal(signal.SIGKILL)
        process.wait()
    left = progress_of(home)
    assert left is not None
    return left


def test_a_training_that_is_killed_twice_gives_the_same_patch(founded: Path, home: Path, tmp_path: Path) -> None:
    options = ("--steps", "250", "--checkpoint-every", "10", "--sequence", "32", "--control", "--clip", "1")
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(home, undisturbed)
    run(command(founded, undisturbed, tmp_path / "whole.p2patch", *options))
    killed = command(founded, home, tmp_path / "killed.p2patch", *options)
    first = kill_after(killed, home, 20)
    second = kill_after(killed, home, first.step + 50)
    assert 20 <= first.step < second.step < 250
    assert not (tmp_path / "killed.p2patch").exists()
    done = run(killed)
    assert f"going on after step {second.step} of 250" in done.stderr
    assert (tmp_path / "killed.p2patch").read_bytes() == (tmp_path / "whole.p2patch").read_bytes()
    assert progress_of(Home.open(home)) is None
    report = fsck(Home.open(home))
    assert not report.corrupt
    assert not report.dangling_refs


def test_checkpoints_that_an_audit_wants_are_kept(founded: Path, home: Path, tmp_path: Path) -> None:
    run(command(founded, home, tmp_path / "a.p2patch", *SHORT))
    opened = bundle.open_bundle((tmp_path / "a.p2patch").read_bytes())
    provenance, objects = opened.patch.provenance, Home.open(home).objects
    assert [provenance.step_of(at) for at in range(len(provenance.checkpoints))] == [0, 3, 6]
    assert len(provenance.states) == len(provenance.checkpoints) == 3
    assert all(objects.verify(digest) for digest in (*provenance.checkpoints, *provenance.states))
    assert opened.patch.checkpoint in provenance.checkpoints
    exact = objects.load(opened.patch.checkpoint)
    change = read_change(lineage_of(home), "ia3@1", opened.raw.adapter)
    assert opened.patch.adapter.size < len(exact)
    updates = {name: value - 1 for name, value in blob.unpack(exact, None, len(exact)).items()}
    apart = sum(float((change.values[name] - update).square().sum()) for name, update in updates.items())
    assert apart <= 0.02 * sum(float(update.square().sum()) for update in updates.values())
    run(command(founded, home, tmp_path / "b.p2patch", *SHORT, "--bits", "32"))
    assert bundle.open_bundle((tmp_path / "b.p2patch").read_bytes()).raw.adapter == exact
    run(command(founded, home, tmp_path / "b.p2patch", *SHORT, "--bits", "8"), code=4)
    run(command(founded, home, tmp_path / "b.p2patch", *SHORT, "--bits", "4", "--kind", "lora"), code=4)


def test_restarting_forgets_what_was_broken_off(founded: Path, home: Path, tmp_path: Path) -> None:
    long = command(
        founded, home, tmp_path / "a.p2patch", "--steps", "60", "--checkpoint-every", "5", "--sequence", "32"
    )
    kill_after(long, home, 5)
    estimate = json.loads(run([*long, "--dry-run", "--json"]).stdout)
    assert 5 <= estimate["resumes"] < 60
    assert "going on" not in run([*long, "--restart"]).stderr


def test_rows_recipes_and_plots(founded: Path, home: Path, tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": f"what is {n}? ", "completion": f"{n} is {n}."} for n in range(40)]
    rows += [
        {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": f"I{n}"}]} for n in range(9)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    refused = run(command(founded, home, tmp_path / "a.p2patch", *SHORT, data=data), code=4)
    assert "rows.jsonl has 1 broken line: line 50 is not valid JSON" in str(refused.exception)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'skip-broken = true\nkind = "lora"\nrank = 2\nsteps = 50\nschedule = "wsd"\nfisher-labels = "data"\n'
    )
    more = ("--recipe", str(recipe), "--plot", str(tmp_path / "plot.png"), "--json", *SHORT)
    report = json.loads(run(command(founded, home, tmp_path / "a.p2patch", *more, data=data)).stdout)
    assert report["skipped"] == 1
    assert report["steps"] == 6
    assert {"file", "id", "parent", "loss_before", "loss_after", "bytes", "adapter_bytes", "samples"} <= report.keys()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    shown = run(["patch", "show", report["file"], "--recipe", "--home", str(home)])
    assert 'kind = "lora"\nalpha = 16.0\nrank = 2\n' in shown.stdout
    assert 'schedule = "wsd"' in shown.stdout
    (tmp_path / "again.toml").write_text(shown.stdout)
    again = ["--recipe", str(tmp_path / "again.toml"), "--skip-broken", "--json"]
    repeated = json.loads(run(command(founded, home, tmp_path / "b.p2patch", *again, data=data)).stdout)
    assert repeated["id"] == report["id"]
    patch = bundle.open_bundle((tmp_path / "a.p2patch").read_bytes()).patch
    assert patch.provenance.data[0].examples == 49


def test_a_dry_run_says_what_a_training_would_be(founded: Path, home: Path, tmp_path: Path) -> None:
    report = json.loads(run(command(founded, home, tmp_path / "a.p2patch", *SHORT, "--dry-run", "--json")).stdout)
    assert report["blocks"] > report["held_out"] > 0
    assert report["tokens"] == report["blocks"] * 32
    assert report["seconds"] > 0
    assert not (tmp_path / "a.p2patch").exists()
    run(command(founded, home, tmp_path / "a.p2patch", *SHORT))
    opened = bundle.open_bundle((tmp_path / "a.p2patch").read_bytes())
    assert report["bytes"] == (tmp_path / "a.p2patch").stat().st_size
    more = ("--control", "--bits", "32", "--licence", "CC0-1.0")
    report = json.loads(
        run(command(founded, home, tmp_path / "b.p2patch", *SHORT, *more, "--dry-run", "--json")).stdout
    )
    run(command(founded, home, tmp_path / "b.p2patch", *SHORT, *more))
    assert report["bytes"] == (tmp_path / "b.p2patch").stat().st_size
    change = read_change(lineage_of(home), "ia3@1", opened.raw.adapter)
    assert report["values"] == sum(t.numel() for t in change.values.values())


def test_what_is_large_goes_unless_a_record_needs_it(
    founded: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(savepoints, "MAX_KEPT_BYTES", 0)
    arguments = command(founded, home, tmp_path / "a.p2patch", *SHORT)
    run(arguments)
    patch, objects = bundle.open_bundle((tmp_path / "a.p2patch").read_bytes()).patch, Home.open(home).objects
    kept = [digest for digest in (*patch.provenance.checkpoints, *patch.provenance.states) if objects.has(digest)]
    assert kept == [patch.provenance.states[-1]]  # for the next round
    take_in(lineage_of(home), (tmp_path / "a.p2patch").read_bytes())
    run(arguments)
    assert objects.verify(patch.adapter.digest)


def test_a_sequence_is_no_longer_than_the_model_reads(founded: Path, home: Path, tmp_path: Path) -> None:
    usual = json.loads(run(command(founded, home, tmp_path / "a.p2patch", "--dry-run", "--json")).stdout)
    assert usual["tokens"] == usual["blocks"] * 64
    refused = run(command(founded, home, tmp_path / "a.p2patch", "--sequence", "65"), code=4)
    assert "reads 64 tokens at a time, not 65" in str(refused.exception)


@pytest.mark.parametrize("option", ["--output", "--plot"])
def test_a_place_that_cannot_be_written_is_said_before_the_training(founded: Path, home: Path, option: str) -> None:
    refused = run([*command(founded, home, founded / "a.p2patch"), option, str(founded / "none" / "a.png")], code=4)
    assert "there is no folder" in str(refused.exception)


def test_nothing_to_learn_from_is_said(home: Path) -> None:
    assert "nothing to learn from" in str(run(["train", "--home", str(home)], code=2).exception)


def test_a_control_variate_is_checked_like_the_rest(founded: Path, home: Path, tmp_path: Path) -> None:
    run(command(founded, home, tmp_path / "a.p2patch", *SHORT, "--control"))
    raw, lineage = (tmp_path / "a.p2patch").read_bytes(), lineage_of(home)
    opened = bundle.open_bundle(raw)
    check_patch_file(lineage, opened)
    assert opened.raw.control is not None
    change = read_change(lineage, "ia3@1", opened.raw.adapter)
    read = control.read(opened.raw.control, control.places(opened.raw.adapter, change, 1 << 20), 1 << 20)
    assert read.keys() == change.values.keys()
    assert any(bool(tensor.any()) for tensor in read.values())

    def with_control(variate: bytes | None) -> bundle.OpenBundle:
        ref = (
            None
            if variate is None
            else replace(opened.patch.adapter, digest=canonical.digest(variate), size=len(variate))
        )
        header = lineage.home.key.sign("patch", replace(opened.patch, control=ref))
        return bundle.open_bundle(bundle.pack(header, opened.raw.adapter, opened.raw.fisher, variate))

    check_patch_file(lineage, with_control(None))
    infinite = blob.unpack(opened.raw.control, None, 1 << 20)
    infinite["unit"] = torch.full_like(infinite["unit"], 3e38)
    for wrong in (b"nonsense", opened.raw.fisher, opened.raw.control[:-1], blob.pack(infinite)):
        with pytest.raises(Rejected):
            check_patch_file(lineage, with_control(wrong))
    header = opened.raw.header
    for other in (None, opened.raw.fisher):
        with pytest.raises(Rejected, match="control variate"):
            bundle.open_bundle(bundle.pack(header, opened.raw.adapter, opened.raw.fisher, other))
    stored = take_in(lineage, raw)
    assert lineage.home.objects.has(opened.patch.blobs[2].digest)
    assert stored.digest == opened.id


def test_the_fisher_can_be_adams(founded: Path, home: Path, tmp_path: Path) -> None:
    run(command(founded, home, tmp_path / "a.p2patch", *SHORT, "--fisher", "adam"))
    check_patch_file(lineage_of(home), patchfile.read(tmp_path / "a.p2patch"))
    done = run(command(founded, home, tmp_path / "b.p2patch", *SHORT, "--fisher", "adam", "--kind", "lora"), code=4)
    assert "LoRA" in str(done.exception)


def test_local_steps_are_corrected_by_the_mean_of_all(
    founded: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a contributor that has a control variate of an earlier round; a newcomer's are not."""
    lineage = lineage_of(home)
    options = TrainingOptions(steps=4, batch=2, sequence=32, fisher_examples=2, checkpoint_every=2)
    plain = Assignment(lineage, founded / "model", lineage.head, "ia3@1", (founded / "prose.txt",), options=options)
    mean = {slot.name: torch.full(slot.shape, 0.1) for slot in lineage.manifest.slots if slot.name.startswith("ia3")}

    def trained(assignment: Assignment) -> Trained:
        return train_patch(assignment, tmp_path / "a.p2patch", lambda step: None).trained

    newcomer = trained(replace(plain, mean=mean))
    assert newcomer.checkpoints == trained(plain).checkpoints
    none = {name: torch.zeros_like(value) for name, value in mean.items()}
    known = continuity.Inheritance(canonical.digest(b"past"), newcomer.final_state, none, None)
    monkeypatch.setattr(continuity, "inherited", lambda *of: known)
    results = [trained(each) for each in (plain, replace(plain, mean=mean), replace(plain, mean=mean))]
    assert results[0].checkpoints[0] == results[1].checkpoints[0]
    assert results[0].checkpoints[1] != results[1].checkpoints[1]
    assert results[1].checkpoints == results[2].checkpoints


def test_a_kind_that_the_lineage_does_not_take_is_refused(founded: Path, home: Path, tmp_path: Path) -> None:
    done = run(command(founded, home, tmp_path / "a.p2patch", *SHORT, "--kind", "dense"), code=4)
    assert "tiny takes no patches of kind dense@1" in str(done.exception)


def test_lora_has_no_control_variate(founded: Path, home: Path, tmp_path: Path) -> None:
    done = run(command(founded, home, tmp_path / "a.p2patch", *SHORT, "--kind", "lora", "--control"), code=4)
    assert "no control variate" in str(done.exception)


def test_a_training_again_on_the_same_version_begins_as_the_first_did(
    founded: Path, home: Path, tmp_path: Path
) -> None:
    for name in "ab":
        run(command(founded, home, tmp_path / f"{name}.p2patch", *SHORT, "--control"))
    assert (tmp_path / "a.p2patch").read_bytes() == (tmp_path / "b.p2patch").read_bytes()


def test_the_optimiser_is_inherited_by_later_versions_only(tmp_path: Path) -> None:
    lineage = begin(tmp_path)
    layout, other = canonical.digest(b"layout"), canonical.digest(b"other")
    one, two = grow(lineage, 2)
    gradient = {"w": torch.ones(3)}
    continuity.bequeath(lineage, "ia3@1", lineage.model, layout, b"base", gradient, {"w": torch.zeros(3)})
    continuity.bequeath(lineage, "lora@1", lineage.model, layout, b"base", None, None)
    assert continuity.inherited(lineage, "ia3@1", lineage.model, layout) is None
    for version in (one, two):
        past = continuity.inherited(lineage, "ia3@1", version, layout)
        assert past is not None
        assert past.moments == b"base"
        assert past.control is not None
        assert torch.equal(past.control["w"], gradient["w"])
        assert continuity.inherited(lineage, "ia3@1", version, other) is None
        assert continuity.inherited(lineage, "lora@1", version, layout) is None
    continuity.bequeath(lineage, "ia3@1", one, layout, b"one", None, None)
    newest = continuity.inherited(lineage, "ia3@1", two, layout)
    assert newest is not None
    assert (newest.moments, newest.control) == (b"one", None)
    lineage.home.objects.remove(canonical.digest(b"one"))
    assert continuity.inherited(lineage, "ia3@1", two, layout) is None


def test_experts_are_named_for_no_other_kind(founded: Path, home: Path, tmp_path: Path) -> None:
    for option in (("--expert", "code"), ("--router",)):
        done = run(command(founded, home, tmp_path / "a.p2patch", *SHORT, *option), code=2)
        assert "Add --kind expert" in str(done.exception)
