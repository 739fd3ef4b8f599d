"""Where lines of versions part, whichever lineages they run through."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.ids import ModelId, PatchId, VersionId
from p2pmodel.domain.model import BlobRef, Manifest, ModelFile, Origin
from p2pmodel.domain.version import AMEND, RESTORE, Candidate, Verdict, Version
from p2pmodel.logic.ancestry import Parting, Point, Strand, line, merged, part
from p2pmodel.logic.lineage import verify_chain
from p2pmodel.logic.retention import needed_blobs
from p2pmodel.wire import canonical, records
from p2pmodel.wire.signing import Key
from tests.support.factories import blob, candidate, manifest

KEY = Key.generate()


class Strands(dict[ModelId, Strand]):
    """Lineages that are grown by hand."""

    def found(self, name: str, origin: tuple[Manifest, Point] | None = None, base: bytes = b"weights") -> Point:
        noun = manifest(KEY, name=name)
        noun = dataclasses.replace(noun, files=(ModelFile("model.safetensors", blob(base)),))
        if origin is not None:
            at = origin[1]
            noun = dataclasses.replace(noun, origin=Origin(at.model, at.version, "1.0.1", self.values_of(at)))
        model = ModelId(canonical.digest(canonical.encode(noun)))
        self[model] = Strand(noun, ())
        return Point(model, VersionId(model))

    def values_of(self, at: Point) -> BlobRef:
        made = [v.candidate.result for v in self[at.model].versions if v.id == at.version]
        return made[0] if made else self[at.model].manifest.base_values or blob(b"neutral")

    def branch(self, name: str, at: Point) -> Point:
        return self.found(name, (self[at.model].manifest, at))

    def grow(self, at: Point, *patches: str, **changes: object) -> Point:
        strand = self[at.model]
        number = len(strand.versions) + 1
        ids = tuple(map(patch, patches))
        plain = candidate(at.model, number, at.version, ids)
        plain = dataclasses.replace(plain, result=blob(f"{at} {patches}".encode()))
        noun: Candidate = dataclasses.replace(plain, **changes)  # type: ignore[arg-type]
        version = Version(records.version_id(noun), noun, ())
        self[at.model] = Strand(strand.manifest, (*strand.versions, version))
        return Point(at.model, version.id)


def patch(name: str) -> PatchId:
    return PatchId(canonical.digest(name.encode()))


def parted(strands: Strands, first: Point, second: Point) -> Parting:
    found = part(strands, first, second)
    assert found is not None
    return found


def test_a_branch_parts_at_its_origin() -> None:
    strands = Strands()
    base = strands.found("main")
    one = strands.grow(base, "a")
    branch = strands.branch("side", one)
    two, side = strands.grow(one, "b"), strands.grow(branch, "c")
    found = parted(strands, two, side)
    assert found.at == one
    assert [c.patches for c in found.ahead] == [(patch("b"),)]
    assert [c.patches for c in found.behind] == [(patch("c"),)]
    assert parted(strands, one, branch) == Parting(one, (), ())
    assert merged(strands, side) == {patch("a"), patch("c")}
    assert merged(strands, side) ^ merged(strands, found.at) == {patch("c")}


def test_two_branches_part_at_the_older_of_their_origins() -> None:
    strands = Strands()
    base = strands.found("main")
    one = strands.grow(base, "a")
    two = strands.grow(one, "b")
    old, new = strands.branch("old", one), strands.branch("new", two)
    old, new = strands.grow(old, "c"), strands.grow(new, "d")
    assert parted(strands, old, new).at == one
    assert parted(strands, new, old).at == one
    assert len(parted(strands, new, old).ahead) == 2
    again = strands.branch("again", new)
    assert parted(strands, again, old).at == one
    assert parted(strands, again, new) == Parting(new, (), ())


def test_lineages_of_the_same_files_part_at_the_neutral_base() -> None:
    strands = Strands()
    first, second, other = strands.found("a"), strands.found("b"), strands.found("c", base=b"others")
    one, two = strands.grow(first, "a"), strands.grow(second, "b")
    found = parted(strands, one, two)
    assert found.at == first
    assert (len(found.ahead), len(found.behind)) == (1, 1)
    assert part(strands, one, other) is None
    assert parted(strands, strands.branch("d", one), two).at == first


def test_what_is_not_known_is_not_guessed() -> None:
    strands = Strands()
    one = strands.grow(strands.found("main"), "a")
    two = strands.grow(one, "b")
    old, new, twin = (strands.branch(name, at) for name, at in (("old", one), ("new", two), ("twin", one)))
    del strands[one.model]
    assert part(strands, old, new) is None
    assert parted(strands, strands.grow(old, "c"), twin).at == one
    assert [point for point, _ in line(strands, new)] == [two]


def test_a_restored_version_has_come_of_what_it_restores() -> None:
    strands = Strands()
    base = strands.found("main")
    one = strands.grow(base, "a")
    two = strands.grow(one, "b")
    settled: dict[str, object] = {"patches": (), "alpha": 0.0}
    back = strands.grow(two, merge=RESTORE, result=strands.values_of(one), **settled)
    assert merged(strands, back) == {patch("a")}
    amendment = dataclasses.replace(strands[base.model].manifest.amendment, exam=blob(b"another"))
    same = strands.grow(back, merge=AMEND, amendment=amendment, result=strands.values_of(one), **settled)
    assert merged(strands, strands.grow(same, "c")) == {patch("a"), patch("c")}
    assert merged(strands, strands.grow(same, merge=RESTORE, result=blob(b"neutral"), **settled)) == set()


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=12), st.data())
def test_partings_are_the_same_from_both_sides(steps: list[tuple[int, bool]], data: st.DataObject) -> None:
    strands = Strands()
    points = [strands.found("main")]
    for number, (place, branches) in enumerate(steps):
        at = points[place % len(points)]
        heads = {m: s.versions[-1].id if s.versions else VersionId(m) for m, s in strands.items()}
        if branches or heads[at.model] != at.version:
            points.append(strands.branch(f"branch{number}", at))
        else:
            points.append(strands.grow(at, f"p{number}"))
    first, second = (data.draw(st.sampled_from(points)) for _ in range(2))
    there, back = parted(strands, first, second), parted(strands, second, first)
    assert (there.at, there.ahead, there.behind) == (back.at, back.behind, back.ahead)
    new = {p for c in there.ahead for p in c.patches}
    assert merged(strands, first) == merged(strands, there.at) | new


def test_a_branch_keeps_and_amends_the_values_that_it_begins_with() -> None:
    strands = Strands()
    one = strands.grow(strands.found("main"), "a")
    base = strands.branch("side", one)
    noun = strands[base.model].manifest
    values = strands.values_of(one)
    assert noun.base_values == values
    assert values.digest in needed_blobs(noun, base.version, (), {}, {}, ())
    amendment = dataclasses.replace(noun.amendment, exam=blob(b"another"))

    def chain(result: BlobRef) -> tuple[Version, ...]:
        made = dataclasses.replace(
            candidate(base.model, 1, base.version), merge=AMEND, patches=(), amendment=amendment, result=result
        )
        version = records.version_id(made)
        verdict = Verdict(KEY.peer, base.model, made.round, version, True, "", ())
        return verify_chain(noun, base.model, [(version, made, [verdict])])

    assert len(chain(values)) == 1
    with pytest.raises(Rejected, match="other values"):
        chain(blob(b"neutral"))


@pytest.mark.parametrize("number", ["", "1.0", "1.0.x", "1.0.0.0", "v1.0.0", "9" * 40])
def test_an_origin_names_a_version(number: str) -> None:
    digest = canonical.digest(b"model")
    with pytest.raises(ValueError, match="number"):
        Origin(digest, digest, number, blob())
