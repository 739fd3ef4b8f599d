"""A lineage as a home knows it, where records cannot be read, and offers of peers that are none."""

import dataclasses
from pathlib import Path

import pytest

from p2pmodel import starter
from p2pmodel.domain.errors import NotFound, Rejected, StorageError
from p2pmodel.domain.ids import Digest, ModelId, PeerId
from p2pmodel.domain.swarm import LineageOffer
from p2pmodel.node.lineages import discovery, intake
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import patch_state
from p2pmodel.node.rounds import asides
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.support import lineages
from tests.support.factories import blob


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    return lineages.begin(tmp_path / "home")


def file_of(lineage: Lineage, digest: Digest) -> Path:
    return lineage.home.objects._path(digest)


def test_a_record_that_cannot_be_read_keeps_nothing_else_out(lineage: Lineage) -> None:
    other = Lineage(lineage.home, lineage.model)
    hurt = lineages.add_patch(lineage, Key.generate(), 0)
    version = lineages.grow(lineage, 1)[-1]
    raw = file_of(lineage, hurt).read_bytes()
    file_of(lineage, hurt).chmod(0o644)
    file_of(lineage, hurt).write_bytes(b"damaged")
    with pytest.raises(StorageError, match="damaged"):
        other.refresh()
    assert other.head == version
    other.refresh()  # it is gone by now, as if it had never been here
    assert not other.knows(hurt)
    assert hurt not in other.known_records()
    assert hurt not in {record.digest for _, record in other.inventory()}
    assert {record.digest for _, record in other.inventory()} > set(other.candidates[version].patches)
    lineage.home.objects.put(raw)
    other.refresh()
    assert other.knows(hurt)
    assert other.patches[hurt] == lineage.patches[hurt]


async def test_an_offer_that_is_none_keeps_nobody_from_the_others(lineage: Lineage) -> None:
    peer = PeerId(Key.generate().peer)
    wrong = ModelId(canonical.digest(b"no model"))
    good = LineageOffer(lineage.model, lineage.manifest.name, lineage.record, lineage.model)
    bad = LineageOffer(wrong, lineage.manifest.name, blob(b"something else"), wrong)
    both = {offer.model: (offer, [peer]) for offer in (bad, good)}
    for text in (None, lineage.manifest.name, str(starter.MODEL)):
        found = await discovery._choose(lineage.home, None, both, text)  # type: ignore[arg-type]
        assert found.model == lineage.model
    with pytest.raises(Rejected):
        await discovery._choose(lineage.home, None, {wrong: (bad, [peer])}, None)  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        await discovery._choose(lineage.home, None, both, "another")  # type: ignore[arg-type]


def test_what_came_before_an_amendment_is_let_in_by_what_was_allowed_then(tmp_path: Path, lineage: Lineage) -> None:
    (old,) = lineage.candidates[lineages.grow(lineage, 1)[0]].patches
    smaller = dataclasses.replace(lineage.manifest.limits, max_patch_bytes=1000)
    _, amended = asides.propose_amendment(lineage, dataclasses.replace(lineage.manifest.amendment, limits=smaller))
    lineages.accept(lineage, lineage.candidates[amended])
    assert lineage.head == amended
    late = lineages.copied(lineage, tmp_path / "late", "candidate", "verdict")
    assert late.head == amended
    lineages.bring(lineage, late, "patch")
    assert patch_state(late, late.patches[old]).keys() == {slot.name for slot in late.manifest.slots}
    intake.check_stored_patch(late, old)
    with pytest.raises(Rejected, match="takes 1 to 1000"):
        lineages.add_patch(late, Key.generate(), 1)
    larger = dataclasses.replace(lineage.manifest.limits, max_patch_bytes=1 << 20)
    _, again = asides.propose_amendment(lineage, dataclasses.replace(lineage.manifest.amendment, limits=larger))
    lineages.accept(lineage, lineage.candidates[again])
    new = lineages.add_patch(lineage, Key.generate(), 1)
    with pytest.raises(Rejected, match="not known here") as refused:
        lineages.bring(lineage, late, "patch")
    assert refused.value.reason == "parent"  # to be tried again, when the amendment has come
    lineages.bring(lineage, late, "candidate")
    lineages.bring(lineage, late, "verdict")
    lineages.bring(lineage, late, "patch")
    assert new in late.patches
