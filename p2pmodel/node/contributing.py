"""Training a patch on one's own data, on this machine alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path

from p2pmodel import __version__
from p2pmodel.domain.ids import PatchId, VersionId
from p2pmodel.domain.model import BlobRef
from p2pmodel.domain.patch import DataFile, Patch, Provenance, Recipe
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.data import blocks, read_texts, split
from p2pmodel.engine.training import OPTIMIZER, Trained, TrainingOptions, train
from p2pmodel.node.lineage import Lineage
from p2pmodel.node.states import version_state
from p2pmodel.store.home import Home
from p2pmodel.tensors import blob
from p2pmodel.tensors.kinds import get_kind
from p2pmodel.wire import bundle, canonical


@dataclass(frozen=True)
class NewPatch:
    """A trained and signed patch: `file` is its bundle."""

    id: PatchId
    patch: Patch
    trained: Trained
    file: bytes


def train_patch(
    home: Home,
    lineage: Lineage,
    base: Path,
    parent: VersionId,
    files: Sequence[Path],
    kind_name: str,
    options: TrainingOptions,
    licence: str,
    on_step: Callable[[int, float], None],
) -> NewPatch:
    """Reads the data, trains from the parent version's values, signs. on_step is told (step, loss in nats per token).

    Raises InvalidInput for data that can't be used, NotFound when the parent's values are not here.
    """
    kind = get_kind(kind_name)
    texts = read_texts(files)
    tokenizer = load_tokenizer(base)
    train_part, held_out = split(blocks(texts, tokenizer, options.sequence), options.seed)
    state = version_state(lineage, parent)
    trained = train(load_whole(base), kind, state, train_part, held_out, options, on_step)
    adapter, fisher = blob.pack(trained.adapter), blob.pack(trained.fisher)
    recipe = Recipe(
        seed=options.seed,
        steps=options.steps,
        batch=options.batch,
        sequence=options.sequence,
        optimizer=OPTIMIZER,
        learning_rate=options.learning_rate,
        fisher_examples=options.fisher_examples,
    )
    data = tuple(DataFile(t.name, t.digest, t.size, 1, licence) for t in texts)
    software = (("p2pmodel", __version__), *((name, installed(name)) for name in ("torch", "transformers")))
    patch = Patch(
        contributor=home.key.peer,
        model=lineage.model,
        parent=parent,
        kind=kind.name,
        adapter=BlobRef(canonical.digest(adapter), len(adapter)),
        fisher=BlobRef(canonical.digest(fisher), len(fisher)),
        samples=trained.samples,
        loss_before=trained.loss_before,
        loss_after=trained.loss_after,
        licence=licence,
        provenance=Provenance(data, recipe, software, options.checkpoint_every, trained.checkpoints),
    )
    header = home.key.sign("patch", patch)
    return NewPatch(canonical.digest(header), patch, trained, bundle.pack(header, adapter, fisher))
