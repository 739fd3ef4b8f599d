"""A kind of patch that another package brings, in one module and one entry point."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from p2pmodel import starter
from p2pmodel.domain.errors import InvalidInput, NotFound
from p2pmodel.domain.model import MergeSpec
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.node.lineages.intake import check_patch_file, take_in
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.merging import merge, stored
from p2pmodel.node.lineages.states import patch_file_state, version_state
from p2pmodel.node.patches.blending import blend
from p2pmodel.node.patches.contributing import Assignment, NewPatch, train_patch
from p2pmodel.node.patches.exporting import export_adapter, export_merged
from p2pmodel.node.patches.patchbook import open_patch
from p2pmodel.node.patches.rebasing import rebase
from p2pmodel.store import patchfile
from p2pmodel.store.home import Home
from p2pmodel.tensors.kinds import get_kind
from tests.support.lineages import adopt
from tests.support.training import PROSE, byte_tokenizer, small_model

MODULE = '''
"""Vectors on what the layers' norms give."""

from contextlib import contextmanager

from p2pmodel.domain.model import Slot
from p2pmodel.tensors import ia3


class Applier:
    def __init__(self, base, slots):
        self._state = {}
        self._handles = [
            base.get_submodule(slot.removeprefix("norm:")).register_forward_hook(self._scale(slot)) for slot in slots
        ]

    def _scale(self, slot):
        def hook(module, args, output):
            vector = self._state.get(slot)
            if vector is None:
                return None
            return output * (vector if vector.ndim == 1 else vector[:, None])

        return hook

    @contextmanager
    def use(self, state):
        before, self._state = self._state, dict(state or {})
        try:
            yield
        finally:
            self._state = before

    def remove(self):
        for handle in self._handles:
            handle.remove()


class Norms(ia3.Kind):
    name, prefix, learning_rate = "norms@1", "norm:", 0.02

    def find_slots(self, base):
        norms = [(path, module) for path, module in base.named_modules() if path.endswith("_layernorm")]
        return tuple(Slot("norm:" + path, tuple(module.weight.shape), "float32") for path, module in sorted(norms))

    def applier(self, base, slots):
        return Applier(base, slots)


kind = Norms()
'''
OPTIONS = TrainingOptions(steps=8, batch=2, sequence=32, learning_rate=0.02, fisher_examples=4, checkpoint_every=8)


@pytest.fixture
def lineage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lineage]:
    """Whose model takes patches of the installed kind, of vectors and of weights."""
    (tmp_path / "norms.py").write_text(MODULE)
    info = tmp_path / "norms-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: norms\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[p2pmodel.patch_kinds]\nnorms@1 = norms:kind\n")
    monkeypatch.syspath_prepend(tmp_path)
    small_model().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    home = Home.open(tmp_path / "home")
    kinds = ("norms@1", "ia3@1", "lora@1")
    yield found(home, tmp_path / "base", Founding("tiny", (home.key.peer,), 1, starter.EXAM, kinds=kinds))
    sys.modules.pop("norms", None)


def trained(lineage: Lineage, kind: str, text: str, output: Path, bits: int = 32) -> NewPatch:
    file = output.with_suffix(".txt")
    file.write_text(text)
    base = output.parent / "base"
    return train_patch(
        Assignment(lineage, base, lineage.head, kind, (file,), options=OPTIONS, licence="CC0-1.0", bits=bits),
        output,
        lambda step: None,
    )


def test_its_patches_are_trained_read_and_merged(lineage: Lineage, tmp_path: Path) -> None:
    assert get_kind("norms@1").learning_rate == 0.02
    files = tmp_path / "a.p2patch", tmp_path / "b.p2patch"
    patches = [
        trained(lineage, "norms@1", PROSE * 60, files[0]),
        trained(lineage, "norms@1", "12 ab " * 500, files[1], 4),
    ]
    assert all(patch.trained.loss_after < patch.trained.loss_before for patch in patches)
    before = version_state(lineage, lineage.head)
    changed = {name for name in before if name.startswith("norm:")}
    assert len(changed) == 4
    for file in files:
        check_patch_file(lineage, patchfile.read(file))
        state = patch_file_state(lineage, file)
        assert {name for name in before if not torch.equal(state[name], before[name])} == changed
        take_in(lineage, file.read_bytes())
    lineage.refresh()
    sources = [stored(lineage, patch) for patch in sorted(lineage.patches)]
    merged = merge(lineage, lineage.head, before, sources, MergeSpec("fisher@1")).at(1.0)
    assert {name for name in before if not torch.equal(merged[name], before[name])} == changed
    blended = blend(lineage.home, sorted(lineage.patches), tmp_path / "both", None, {}, 1.0, None, False)
    assert blended.kind == "norms@1"
    state = patch_file_state(lineage, tmp_path / "both")
    assert all(torch.equal(state[name], merged[name]) for name in changed)


def test_others_are_trained_on_what_it_changed(lineage: Lineage, tmp_path: Path) -> None:
    first, second = tmp_path / "a.p2patch", tmp_path / "b.p2patch"
    patch = trained(lineage, "norms@1", PROSE * 60, first)
    old = trained(lineage, "norms@1", PROSE * 60, second, 4).id
    for file in (first, second):
        take_in(lineage, file.read_bytes())
    lineage.refresh()
    adopt(lineage, [patch.id], state=patch_file_state(lineage, first))
    for kind in ("ia3@1", "lora@1"):
        later = trained(lineage, kind, PROSE * 60, tmp_path / "later.p2patch")
        assert later.trained.loss_before == pytest.approx(patch.trained.loss_after, abs=1e-5)
    moved = rebase(open_patch(lineage.home.path, old), lineage, lineage.head, tmp_path / "moved.p2patch")
    assert moved.patch.kind == "norms@1"
    check_patch_file(lineage, patchfile.read(tmp_path / "moved.p2patch"))
    with pytest.raises(InvalidInput, match=r"peft has no adapter for patches of kind norms@1"):
        export_adapter(open_patch(lineage.home.path, old), tmp_path / "base", tmp_path / "peft")
    with pytest.raises(InvalidInput, match=r"'norm:layers.* cannot be folded"):
        export_merged(lineage, tmp_path / "base", tmp_path / "whole", lineage.head)


def test_without_the_package_the_model_says_what_is_missing(lineage: Lineage, tmp_path: Path) -> None:
    sys.path.remove(str(tmp_path))
    with pytest.raises(NotFound, match=r"'norms@1' is not known here"):
        version_state(lineage, lineage.head)
