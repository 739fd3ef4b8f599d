"""A lineage of the starter model that has grown, made in process: patches drawn by chance, verdicts that accept."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from p2pmodel import starter
from p2pmodel.domain.ids import PatchId, VersionId
from p2pmodel.domain.model import MergeSpec
from p2pmodel.domain.patch import DataFile, Patch, Provenance, Recipe
from p2pmodel.domain.version import Candidate, DomainScore, LeftOut, Verdict, VersionNumber
from p2pmodel.node.lineages.founding import DEFAULT_MERGE, Founding, found
from p2pmodel.node.lineages.intake import needed_blobs, store
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import version_state
from p2pmodel.store.home import Home
from p2pmodel.tensors import blob, compact
from p2pmodel.wire import canonical, records
from p2pmodel.wire.signing import Key

LICENCE = "CC0-1.0"


def begin(
    folder: Path, exam: Path = starter.EXAM, others: Sequence[Key] = (), merge: MergeSpec = DEFAULT_MERGE
) -> Lineage:
    """With the home's key as a maintainer, the only one unless there are `others`, who all have to accept."""
    home = Home.open(folder)
    maintainers = tuple(sorted([home.key.peer, *(key.peer for key in others)]))
    founding = Founding(starter.NAME, maintainers, len(maintainers), exam, licence=starter.LICENCE, merge=merge)
    return found(home, starter.MODEL, founding)


def exam_of(folder: Path, text: str) -> Path:
    """An exam of one domain, `prose`, with the text as its only case in both parts."""
    for part in ("tune", "test"):
        (folder / f"prose.{part}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    index = '[[domain]]\nname = "prose"\ntune = "prose.tune.jsonl"\ntest = "prose.test.jsonl"\n'
    (folder / "exam.toml").write_text(f'name = "small"\nlicence = "CC0-1.0"\n{index}')
    return folder


def add_patch(lineage: Lineage, key: Key, seed: int, size: float = 0.01) -> PatchId:
    """A patch on the head that moves every value by chance."""
    chance = torch.Generator().manual_seed(seed)
    state = version_state(lineage, lineage.head)
    return add_patch_of(
        lineage, key, {name: value + size * torch.randn(value.shape, generator=chance) for name, value in state.items()}
    )


def add_patch_of(
    lineage: Lineage, key: Key, adapter: Mapping[str, torch.Tensor], fisher: Mapping[str, torch.Tensor] | None = None
) -> PatchId:
    """A patch on the head with these values, and this Fisher or one drawn by chance."""
    if fisher is None:
        chance = torch.Generator().manual_seed(0)
        fisher = {name: torch.rand(value.shape, generator=chance) for name, value in adapter.items()}
    raw = [blob.pack(adapter), blob.pack(compact.encode(dict(fisher)))]
    recipe = Recipe(seed=0, steps=1, batch=1, sequence=8, optimizer="none", learning_rate=0.0, fisher_examples=1)
    patch = Patch(
        contributor=key.peer,
        model=lineage.model,
        parent=lineage.head,
        kind=lineage.manifest.kinds[0],
        adapter=canonical.blob_ref(raw[0]),
        fisher=canonical.blob_ref(raw[1]),
        samples=1,
        loss_before=2.0,
        loss_after=1.9,
        licence=LICENCE,
        provenance=Provenance((DataFile("a.txt", canonical.digest(b"a"), 1, 1, LICENCE),), recipe, (), 1, ()),
    )
    record = key.sign("patch", patch)
    for part in raw:
        lineage.home.objects.put(part)
    store(lineage, "patch", record, needed_blobs(lineage, "patch", record))
    lineage.refresh()
    return canonical.digest(record)


def adopt(
    lineage: Lineage,
    patches: Sequence[PatchId],
    left_out: Sequence[LeftOut] = (),
    parent: VersionId | None = None,
    scores: tuple[DomainScore, ...] = (DomainScore("xml", 1.0, 0.9, 0.8, 0.85),),
    state: Mapping[str, torch.Tensor] | None = None,
    mean: Mapping[str, torch.Tensor] | None = None,
    alpha: float = 1.0,
    verdict: bool = True,
) -> VersionId:
    """A version with these values, or that goes three quarters of the way to its first patch, adopted by the home's
    key, unless there is to be no `verdict`. mean: of the patches' control variates, where they are said to have any."""
    key, objects = lineage.home.key, lineage.home.objects
    before = lineage.head if parent is None else parent
    number = lineage.number(before)
    last = 0 if before == lineage.model else lineage.version(before).candidate.round
    if state is None:
        patch = blob.unpack(objects.load(lineage.patches[patches[0]].adapter.digest), None, 1 << 30)
        old = version_state(lineage, before)
        state = {name: value + 0.75 * (patch[name] - value) for name, value in old.items()}
    result = objects.put(blob.pack(state))
    candidate = Candidate(
        model=lineage.model,
        round=max([last, *(c.round for c in lineage.candidates.values())]) + 1,
        parent=before,
        number=VersionNumber(number.major, number.minor, number.patch + 1),
        patches=tuple(sorted(patches)),
        left_out=tuple(left_out),
        merge=lineage.manifest.merge,
        alpha=alpha,
        result=result,
        control=None if mean is None else objects.put(blob.pack({n: t.bfloat16() for n, t in mean.items()})),
    )
    record = key.sign("candidate", candidate)
    store(lineage, "candidate", record, needed_blobs(lineage, "candidate", record))
    lineage.refresh()
    return accept(lineage, candidate, scores) if verdict else records.version_id(candidate)


def accept(lineage: Lineage, candidate: Candidate, scores: tuple[DomainScore, ...] = ()) -> VersionId:
    """The home's key adopts a candidate that is known here."""
    key, version = lineage.home.key, VersionId(canonical.digest(canonical.encode(candidate)))
    verdict = Verdict(key.peer, lineage.model, candidate.round, version, True, "", scores)
    store(lineage, "verdict", key.sign("verdict", verdict), ())
    lineage.refresh()
    return version


def grow(lineage: Lineage, versions: int, patches: int = 1) -> list[VersionId]:
    """That many versions, each of new patches of new contributors."""
    began = int(time.monotonic_ns() % 1_000_003)
    made = []
    for version in range(versions):
        seeds = [began + version * patches + patch for patch in range(patches)]
        made.append(adopt(lineage, [add_patch(lineage, Key.generate(), seed) for seed in seeds]))
    return made


def copied(source: Lineage, folder: Path, *kinds: str) -> Lineage:
    """To another home, with the records of these kinds alone."""
    target = Lineage.create(Home.open(folder), source.home.objects.load(source.model))
    for kind in kinds:
        bring(source, target, kind)
    return target


def bring(source: Lineage, target: Lineage, kind: str) -> None:
    """All of them, parents before children."""
    for row in sorted(source.home.index.records(source.model, kind), key=lambda row: row.round):
        record = source.home.objects.load(row.record.digest)
        refs = needed_blobs(target, kind, record)
        for ref in refs:
            target.home.objects.put(source.home.objects.load(ref.digest))
        store(target, kind, record, refs)
        target.refresh()
