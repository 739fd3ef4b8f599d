"""Valid nouns to start a test from."""

from p2pmodel.domain.ids import Digest
from p2pmodel.domain.model import BlobRef, Limits, Manifest, MergeSpec, ModelFile, Schedule, Slot
from p2pmodel.domain.patch import DataFile, Patch, Provenance, Recipe
from p2pmodel.domain.version import Candidate, VersionNumber
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key

MODEL = canonical.digest(b"model")


def blob(content: bytes = b"blob") -> BlobRef:
    return canonical.blob_ref(content)


def manifest(*keys: Key, name: str = "test", layers: int = 6, threshold: int = 1) -> Manifest:
    return Manifest(
        name=name,
        created=1_700_000_000,
        architecture="llama",
        layers=layers,
        files=(ModelFile("config.json", blob(b"config")), ModelFile("model.safetensors", blob(b"weights"))),
        source="",
        licence="Apache-2.0",
        kinds=("ia3@1",),
        slots=(Slot("ia3:out:layers.0.self_attn.k_proj", (4,), "float32"),),
        merge=MergeSpec("fisher@1"),
        exam=blob(b"exam"),
        schedule=Schedule(),
        limits=Limits(),
        maintainers=tuple(sorted(key.peer for key in keys)),
        threshold=threshold,
    )


def patch(key: Key, model: Digest = MODEL, parent: Digest | None = None) -> Patch:
    recipe = Recipe(seed=1, steps=10, batch=4, sequence=64, optimizer="adamw", learning_rate=0.01, fisher_examples=8)
    data = (DataFile("notes.txt", canonical.digest(b"notes"), 5, 1, "CC0-1.0"),)
    return Patch(
        contributor=key.peer,
        model=model,
        parent=parent or model,
        kind="ia3@1",
        adapter=blob(b"adapter"),
        fisher=blob(b"fisher"),
        samples=40,
        loss_before=2.0,
        loss_after=1.5,
        licence="CC0-1.0",
        provenance=Provenance(data, recipe, (("torch", "2.13.0"),), 5, (canonical.digest(b"0"),)),
    )


def candidate(
    model: Digest = MODEL, round: int = 1, parent: Digest | None = None, patches: tuple[Digest, ...] = ()
) -> Candidate:
    return Candidate(
        model=model,
        round=round,
        parent=parent or model,
        number=VersionNumber(1, 0, round),
        left_out=(),
        merge=MergeSpec("fisher@1"),
        patches=tuple(sorted(patches)) or (canonical.digest(b"patch"),),
        alpha=1.0,
        result=blob(b"result"),
    )
