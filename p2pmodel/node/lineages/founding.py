"""How a lineage begins: a Manifest made from a checkpoint, signed by its creator."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModel

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.model import Limits, Manifest, MergeSpec, ModelFile, Schedule
from p2pmodel.engine.checkpoint import Checkpoint, read_checkpoint
from p2pmodel.engine.exams import Suite
from p2pmodel.node.lineages.bases import file_digests, outline, remember_base
from p2pmodel.node.lineages.hub import Listing
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.store.home import Home
from p2pmodel.tensors.kinds import Kinds, largest_patch
from p2pmodel.tensors.merging import check

DEFAULT_KIND = "ia3@1"
DEFAULT_MERGE = MergeSpec("fisher@1")


@dataclass(frozen=True)
class Founding:
    """What the creator decides; everything else is read from the checkpoint."""

    name: str
    maintainers: tuple[PeerId, ...]
    threshold: int
    exam: Path
    source: str = ""
    licence: str = ""
    merge: MergeSpec = DEFAULT_MERGE
    schedule: Schedule = field(default_factory=Schedule)
    limits: Limits = field(default_factory=Limits)
    kinds: tuple[str, ...] = (DEFAULT_KIND,)


def found(home: Home, folder: Path, founding: Founding, files: tuple[ModelFile, ...] = ()) -> Lineage:
    """Makes, signs and stores the Manifest and the exam. files: those of the checkpoint, when not all of them are in
    the folder, and a hub says what they are. Raises InvalidInput with the field that is wrong."""
    checkpoint = read_checkpoint(folder, [file.name for file in files])
    files = files or file_digests(folder, checkpoint.files)
    suite = Suite.load(founding.exam)
    if not suite.domains:
        raise InvalidInput(
            f"The exam in {founding.exam} has no [[domain]]: rounds minimise the loss on held-out text.",
            "Add one with name, tune and test.",
        )
    check(founding.merge)
    slots = Kinds(founding.kinds).find_slots(_skeleton(checkpoint))
    largest = max(founding.limits.max_patch_bytes, largest_patch(founding.kinds, slots))
    limits = dataclasses.replace(founding.limits, max_patch_bytes=largest)
    try:
        manifest = Manifest(
            name=founding.name,
            created=int(time.time()),
            architecture=checkpoint.architecture,
            layers=checkpoint.layers,
            files=files,
            source=founding.source,
            licence=founding.licence,
            kinds=tuple(dict.fromkeys(founding.kinds)),
            slots=slots,
            merge=founding.merge,
            exam=home.objects.put(suite.pack()),
            schedule=founding.schedule,
            limits=limits,
            maintainers=tuple(sorted(founding.maintainers)),
            threshold=founding.threshold,
        )
    except ValueError as error:
        raise InvalidInput(f"The Manifest can't be made: {error}.") from None
    lineage = Lineage.create(home, home.key.sign("manifest", manifest))
    # What was hashed a moment ago.
    remember_base(home, lineage, folder, [file.name for file in files if (folder / file.name).is_file()])
    return lineage


def found_from_hub(home: Home, listing: Listing, founding: Founding) -> Lineage:
    """Of a checkpoint on a hub, at the commit that it is at now; its weights stay there until somebody needs them.
    Raises NotFound, Unreachable, InvalidInput."""
    folder, files = outline(listing)
    return found(home, folder, dataclasses.replace(founding, source=str(listing.source)), files)


def _skeleton(checkpoint: Checkpoint) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModel.from_config(checkpoint.config)  # type: ignore[no-untyped-call]
    return model
