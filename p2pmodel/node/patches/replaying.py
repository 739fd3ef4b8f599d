"""What a training is done again with: the options that a signed recipe gives, where a training can have had them."""

import os
from dataclasses import fields

from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.modular import KIND, place_of
from p2pmodel.domain.patch import MAX_COUNT, Patch
from p2pmodel.engine.data import Blocks
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.node.lineages.states import read_change
from p2pmodel.node.patches.patchbook import OpenedPatch
from p2pmodel.tensors.patch_kind import KindOptions

EXPERT = "expert"
"""The option of a kind that is no number: the patch's slots say it, and no recipe does."""
_BYTES_OF_A_TOKEN = 16  # its id and its label


def options_of(patch: Patch, context: int) -> TrainingOptions:
    """context: the longest sequence that the model reads. Raises InvalidInput for a recipe that nobody can have trained
    by, or that no machine can do again."""
    recipe = patch.provenance.recipe
    known = {f.name: getattr(recipe, f.name) for f in fields(TrainingOptions) if hasattr(recipe, f.name)}
    options = TrainingOptions(**known, checkpoint_every=patch.provenance.checkpoint_every)
    if options.sequence > context:
        raise InvalidInput(f"The patch's recipe has sequences of {options.sequence} tokens; the model reads {context}.")
    return options


def demand_memory(options: TrainingOptions, blocks: Blocks, model: PreTrainedModel) -> None:
    """For the examples of a step, and for the logits of a forward pass and their gradients. Raises InvalidInput."""
    length, vocabulary = int(blocks.ids.shape[1]), int(model.config.get_text_config().vocab_size)
    needed = options.batch * length * (options.accumulate * _BYTES_OF_A_TOKEN + 2 * 4 * vocabulary)
    if needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise InvalidInput(
            f"A step of the patch's recipe takes {needed / 1e9:.0f} GB at least, more than this machine has.",
            "Audit it on a larger one.",
        )


def kind_options_of(opened: OpenedPatch) -> KindOptions:
    """Raises InvalidInput."""
    defaults, given = KindOptions(), dict(opened.patch.provenance.recipe.kind_options)
    numbers = {f.name for f in fields(KindOptions)} - {EXPERT}
    if unknown := given.keys() - numbers:
        raise InvalidInput(f"The patch's kind has an option {min(unknown)[:64]!r} that is not known here.")
    chosen = {name: type(getattr(defaults, name))(value) for name, value in given.items()}
    if wrong := [name for name, value in given.items() if chosen[name] != value or abs(value) > MAX_COUNT]:
        raise InvalidInput(f"The patch's kind has the option {wrong[0]} = {given[wrong[0]]:g}, which nobody can give.")
    return KindOptions(**chosen, expert=expert_of(opened))


def expert_of(opened: OpenedPatch) -> str:
    """The name of the one that a patch trained: its slots say it. Empty for other kinds."""
    if opened.patch.kind != KIND:
        return ""
    names = read_change(opened.lineage, opened.patch.kind, opened.adapter).values
    return next((place.expert for name in names if (place := place_of(name)) is not None), "")
