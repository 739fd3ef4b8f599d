"""What is trained of a patch, on a whole local model, by the patch's kind."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.engine.data import Blocks
from p2pmodel.engine.training.losses import row_nats
from p2pmodel.tensors import weights
from p2pmodel.tensors.kinds import get_kind, kinds_of
from p2pmodel.tensors.patch_kind import Applier, Fit, KindOptions, Lesson, Trainee


def new_trainee(
    model: PreTrainedModel, kind: str, parent: Mapping[str, Tensor], blocks: Blocks, options: KindOptions, seed: int
) -> Trainee:
    """kind: a name such as `ia3@1`; parent: the state of the version that the patch is against, by slot name; blocks:
    what it is trained on; seed: of whatever is drawn at the beginning.

    It puts its hooks on the model at once, and `remove` takes them away. Raises NotFound for a kind that is not known
    here, InvalidInput for a parent that has no slots of that kind.
    """
    known = get_kind(kind)
    own = {name: tensor for name, tensor in parent.items() if name.startswith(known.prefix)}
    if not own and known.fit is not Fit.NONE:
        raise InvalidInput(
            f"Patches of kind {kind[:64]!r} cannot be trained here.", "See what the model takes: p2pmodel model show"
        )
    # Updates of weights are as large as the model: those that nobody has made yet take no room on the device.
    still = {name for name, tensor in parent.items() if name.startswith(weights.PREFIX) and not tensor.any()}
    others = {name: tensor.to(model.device) for name, tensor in parent.items() if name not in own.keys() | still}
    with ExitStack() as stack:
        applier = kinds_of(others).applier(model.base_model, sorted(others))
        stack.callback(applier.remove)
        lesson = Lesson(
            model=model,
            base=model.base_model,
            device=model.device,
            parent=own,
            ids=blocks.ids,
            losses=lambda rows: row_nats(model, blocks[rows]),
            at_parent=lambda: applier.use(others),
            options=options,
            seed=seed,
        )
        trainee = _Based(applier, others, known.trainee(lesson))
        stack.pop_all()
        return trainee


@dataclass(frozen=True)
class _Based:
    """A trainee on a version whose slots of other prefixes stay as they are."""

    applier: Applier
    state: Mapping[str, Tensor]
    trainee: Trainee

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self.trainee.parameters

    @contextmanager
    def use(self) -> Iterator[None]:
        with self.applier.use(self.state), self.trainee.use():
            yield

    def adapter(self) -> dict[str, Tensor]:
        return self.trainee.adapter()

    def squared_gradients(self, losses: Callable[[slice], Tensor], rows: int) -> dict[str, Tensor]:
        with self.applier.use(self.state):
            return self.trainee.squared_gradients(losses, rows)

    def remove(self) -> None:
        self.trainee.remove()
        self.applier.remove()
