"""What garbage collection may not take, over lineages of any shape."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmodel.domain.ids import Digest, PatchId, VersionId
from p2pmodel.domain.model import BlobRef
from p2pmodel.domain.patch import Patch, Provenance, Recipe
from p2pmodel.domain.version import AMEND, Candidate, LeftOut, Version, VersionNumber
from p2pmodel.logic.retention import needed_blobs
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key
from tests.support.factories import manifest

PEERS = [Key.generate().peer for _ in range(3)]
RECIPE = Recipe(seed=0, steps=1, batch=1, sequence=8, optimizer="none", learning_rate=0.0, fisher_examples=1)
MANIFEST = manifest(Key.generate())
MODEL = canonical.digest(b"model")


def ref(text: str) -> BlobRef:
    return BlobRef(canonical.digest(text.encode()), 1)


def patch_on(parent: VersionId, number: int, contributor: int) -> tuple[PatchId, Patch]:
    states = (ref(f"s{number}a").digest, ref(f"s{number}b").digest)
    provenance = Provenance((), RECIPE, (), 1, states, states)
    patch = Patch(
        PEERS[contributor], MODEL, parent, "ia3@1", ref(f"adapter {number}"), ref(f"fisher {number}"), 1, 1.0, 1.0, "",
        provenance, ref(f"control {number}") if number % 2 else None,
    )  # fmt: skip
    return canonical.digest(canonical.encode(patch)), patch


@st.composite
def lineages(draw: st.DrawFn) -> tuple[list[Version], dict[VersionId, Candidate], dict[PatchId, Patch], VersionId]:
    """A tree of versions: adopted, abandoned branches, and candidates that came to nothing."""
    candidates: dict[VersionId, Candidate] = {}
    patches: dict[PatchId, Patch] = {}
    adopted: list[Version] = []
    tips = [VersionId(MODEL)]
    for round_ in range(1, draw(st.integers(0, 6)) + 1):
        parent = draw(st.sampled_from(tips))
        new = [patch_on(parent, 100 * round_ + n, draw(st.integers(0, 2))) for n in range(draw(st.integers(1, 4)))]
        patches |= dict(new)
        merged = draw(st.integers(1, len(new)))
        ids = [patch_id for patch_id, _ in new]
        candidate = Candidate(
            MODEL, round_, parent, VersionNumber(1, 0, round_), tuple(sorted(ids[:merged])),
            tuple(LeftOut(each, "worse") for each in ids[merged:]), MANIFEST.merge, 1.0, ref(f"result {round_}"),
            control=ref(f"mean {round_}") if draw(st.booleans()) else None,
        )  # fmt: skip
        if draw(st.booleans()):
            exam = draw(st.sampled_from((MANIFEST.exam, ref(f"exam {round_}"))))
            candidate = dataclasses.replace(
                candidate, merge=AMEND, patches=(), left_out=(), control=None,
                amendment=dataclasses.replace(MANIFEST.amendment, exam=exam),
            )  # fmt: skip
        version = VersionId(canonical.digest(canonical.encode(candidate)))
        candidates[version] = candidate
        if draw(st.booleans()):
            adopted.append(Version(version, candidate, ()))
            tips.append(version)
    return adopted, candidates, patches, adopted[-1].id if adopted else VersionId(MODEL)


def blobs(patch: Patch) -> set[Digest]:
    return {blob.digest for blob in patch.blobs}


def named_by(candidate: Candidate) -> set[Digest]:
    """All that whoever takes the candidate in has to fetch."""
    named = {blob.digest for blob in candidate.blobs}
    return named if candidate.amendment is None else named | {candidate.amendment.exam.digest}


@settings(max_examples=200, deadline=None)
@given(lineages(), st.data())
def test_what_a_version_needs_is_never_dropped(
    grown: tuple[list[Version], dict[VersionId, Candidate], dict[PatchId, Patch], VersionId], data: st.DataObject
) -> None:
    versions, candidates, patches, head = grown
    recent = data.draw(st.sets(st.sampled_from(sorted(patches)))) if patches else set()
    kept = needed_blobs(MANIFEST, head, versions, candidates, patches, recent, PEERS[0])
    assert MANIFEST.exam.digest in kept
    for version in versions:
        for patch_id in version.candidate.patches:
            assert blobs(patches[patch_id]) <= kept
    adopted = {version.id for version in versions}
    for version_id, candidate in candidates.items():
        if version_id in adopted or candidate.parent == head:
            assert named_by(candidate) <= kept
        else:
            assert not named_by(candidate) & kept - {MANIFEST.exam.digest}
    merged = {p for version in versions for p in version.candidate.patches}
    of_the_round = {
        p for c in candidates.values() if c.parent == head for p in (*c.patches, *(left.patch for left in c.left_out))
    }
    for patch_id, patch in patches.items():
        own = patch.contributor == PEERS[0]
        wanted = own or patch_id in merged | recent | of_the_round or patch.parent == head
        assert (blobs(patch) <= kept) == wanted
        assert not blobs(patch) & kept or wanted
        assert own == ({*patch.provenance.states} <= kept)
