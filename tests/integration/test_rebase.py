"""Patches that move to newer versions, and to other bases."""

from pathlib import Path

import pytest
import torch

from p2pmodel import starter
from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import VersionId
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.node.lineages.intake import check_patch_file, take_in
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import patch_change, patch_file_state, version_state
from p2pmodel.node.patches.contributing import Assignment, train_patch
from p2pmodel.node.patches.patchbook import OpenedPatch, open_patch
from p2pmodel.node.patches.rebasing import rebase
from p2pmodel.store import patchfile
from p2pmodel.store.home import Home
from p2pmodel.tensors.changes import NOT_HELD
from p2pmodel.tensors.lora import factored
from p2pmodel.tensors.patch_kind import KindOptions
from p2pmodel.tensors.rebase import moved
from tests.support.lineages import adopt
from tests.support.training import PROSE, byte_tokenizer, small_model

KINDS = ("ia3@1", "fish@1", "lora@1", "dense@1")
OPTIONS = TrainingOptions(steps=30, batch=4, sequence=32, learning_rate=0.02, fisher_examples=8, checkpoint_every=10)
MINE, THEIRS = PROSE * 60, "0123 4567 89ab cdef; " * 160


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "mine.txt").write_text(MINE)
    (folder / "theirs.txt").write_text(THEIRS)
    return folder / "model"


def founded(folder: Path, base: Path, kinds: tuple[str, ...] = KINDS) -> Lineage:
    home = Home.open(folder)
    return found(home, base, Founding("tiny", (home.key.peer,), 1, starter.EXAM, kinds=kinds))


def trained(lineage: Lineage, base: Path, kind: str, text: str, output: Path) -> OpenedPatch:
    files = (base.parent / f"{text}.txt",)
    options = KindOptions(density=0.05, rank=4)
    train_patch(
        Assignment(lineage, base, lineage.head, kind, files, options=OPTIONS, kind_options=options, fresh=True),
        output,
        lambda step: None,
    )
    return open_patch(lineage.home.path, str(output))


def upstream(lineage: Lineage, base: Path, kind: str, folder: Path) -> VersionId:
    """A version of somebody else's patch alone."""
    trained(lineage, base, kind, "theirs", folder / "theirs.p2patch")
    take_in(lineage, (folder / "theirs.p2patch").read_bytes())
    lineage.refresh()
    ((patch_id, patch),) = lineage.patches.items()
    state = patch_change(lineage, patch).applied_to(version_state(lineage, lineage.head))
    return adopt(lineage, [patch_id], state=state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_moves_to_a_newer_version(base: Path, tmp_path: Path, kind: str) -> None:
    lineage = founded(tmp_path / "home", base)
    mine = trained(lineage, base, kind, "mine", tmp_path / "mine.p2patch")
    version = upstream(lineage, base, kind, tmp_path)
    mine = open_patch(lineage.home.path, str(tmp_path / "mine.p2patch"))
    new = tmp_path / "new.p2patch"
    done = rebase(mine, lineage, version, new, texts=[base.parent / "mine.txt"], bases=(base, base))
    assert done.weighted == 1
    assert not done.dropped
    assert done.kept > 0.5
    assert done.losses is not None
    assert done.losses.rebased < done.losses.version - 0.005
    check_patch_file(lineage, patchfile.read(new))
    theirs = [base.parent / "theirs.txt"]
    upstreams = rebase(mine, lineage, version, new, texts=theirs, bases=(base, base)).losses
    assert upstreams is not None
    assert upstreams.rebased < upstreams.before - 0.005  # the version's own learning is not lost
    assert open_patch(lineage.home.path, str(new)).patch.parent == version


def test_onto_its_own_parent_a_patch_stays_as_it_is(base: Path, tmp_path: Path) -> None:
    lineage = founded(tmp_path / "home", base)
    for kind in KINDS:
        mine = trained(lineage, base, kind, "mine", tmp_path / "mine.p2patch")
        rebase(mine, lineage, lineage.head, tmp_path / "new.p2patch")
        before, after = (patch_file_state(lineage, tmp_path / f"{name}.p2patch") for name in ("mine", "new"))
        assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_across_a_change_of_base(base: Path, tmp_path: Path) -> None:
    lineage = founded(tmp_path / "home", base)
    mine = trained(lineage, base, "ia3@1", "mine", tmp_path / "mine.p2patch")
    wider = tmp_path / "wider"
    model = small_model(intermediate_size=96)
    model.load_state_dict({n: t for n, t in small_model().state_dict().items() if "mlp" not in n}, strict=False)
    model.save_pretrained(wider)
    byte_tokenizer().save_pretrained(wider)
    other = founded(tmp_path / "home", wider)
    texts = [base.parent / "mine.txt"]
    done = rebase(mine, other, other.head, tmp_path / "new.p2patch", texts=texts, bases=(base, wider))
    assert done.patch.model == other.model
    assert done.dropped == ("ia3:in:layers.0.mlp.down_proj", "ia3:in:layers.1.mlp.down_proj")
    assert done.losses is not None
    check_patch_file(other, patchfile.read(tmp_path / "new.p2patch"))
    vectors_only = founded(tmp_path / "elsewhere", base, ("ia3@1",))
    dense = trained(lineage, base, "dense@1", "mine", tmp_path / "dense.p2patch")
    with pytest.raises(InvalidInput, match="takes no patches of kind dense@1"):
        rebase(dense, vectors_only, vectors_only.head, tmp_path / "no.p2patch")
    assert not (tmp_path / "no.p2patch").exists()


def test_the_weights_of_a_rebase() -> None:
    update, shift = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0]), torch.tensor([0.0, 0.5, 0.5, 0.0, 0.5])
    mass, others = torch.tensor([1.0, 1.0, 0.0, 1.0, NOT_HELD]), torch.tensor([0.0, 3.0, 0.0, 1.0, 1.0])
    expected = torch.tensor([1.0, 0.125, 0.25, 0.5, 0.0], dtype=torch.float64)
    assert torch.equal(moved(update, shift, mass, others), expected)
    assert torch.equal(moved(update, shift, mass, None)[:2], torch.tensor([0.5, 0.25], dtype=torch.float64))


def test_factors_of_what_has_that_rank_are_exact() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(20, 3) @ torch.randn(3, 12)
    held, kept = factored({"weight:a.weight": matrix}, 3)
    assert torch.allclose(held["weight:a.weight#b"] @ held["weight:a.weight#a"], matrix, atol=1e-5)
    assert kept == pytest.approx(1.0)
    assert factored({"weight:a.weight": torch.eye(20)}, 5)[1] < 0.9
