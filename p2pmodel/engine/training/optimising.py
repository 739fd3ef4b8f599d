"""Adam on a trainee's parameters, and its whole state as bytes: what a training needs to go on from a step."""

from collections.abc import Mapping

import torch
from torch import Tensor

from p2pmodel.domain.errors import InvalidInput, Rejected
from p2pmodel.tensors import blob

NAME = "adam"
BETAS = (0.9, 0.95)
MAX_SEEN = 1 << 40
"""Steps that moments have seen, over all trainings in which they were kept."""
_PARAMETER, _FIRST, _SECOND, _STEPS = "parameter/", "first/", "second/", "steps"


class Optimiser:
    """Adam (Kingma & Ba, 2015). Weight decay is decoupled from it (Loshchilov & Hutter, 2019), and pulls towards where
    the training began (Li et al., 2018, arXiv:1802.01483), not towards zero: what is not learned stays as the parent
    has it, whatever a kind's neutral value is."""

    def __init__(self, parameters: Mapping[str, Tensor], weight_decay: float, clip: float) -> None:
        """clip: the largest norm of a step's gradient; 0 for any."""
        self.parameters = {name: parameters[name].requires_grad_(True) for name in sorted(parameters)}
        self._start = {n: p.detach().clone() for n, p in self.parameters.items()} if weight_decay else {}
        self._weight_decay, self._clip = weight_decay, clip
        self._adam = torch.optim.Adam(list(self.parameters.values()), betas=BETAS)

    def gradients(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.parameters.items()}

    def step(self, rate: float, correction: Mapping[str, Tensor]) -> None:
        """correction: added to the gradients, by name, before they are clipped."""
        for name, change in correction.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.add_(change.to(gradient))
        if self._clip:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self._clip)
        with torch.no_grad():
            for name, start in self._start.items():
                self.parameters[name].lerp_(start, min(1.0, rate * self._weight_decay))
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        self._adam.zero_grad(set_to_none=True)

    def second_moments(self) -> dict[str, Tensor]:
        """Without the bias of their start at zero: about the mean square of the last steps' gradients."""
        moments = {}
        for name, parameter in self.parameters.items():
            state = self._adam.state.get(parameter) or {}
            steps = float(state["step"]) if state else 0.0
            moments[name] = state["exp_avg_sq"] / (1 - BETAS[1] ** steps) if steps else torch.zeros_like(parameter)
        return moments

    def save(self) -> bytes:
        """A blob: parameters and both moments, float32, and for each how many steps its moments have seen."""
        tensors: dict[str, Tensor] = {}
        steps = []
        for name, parameter in self.parameters.items():
            state = self._adam.state.get(parameter) or {}
            steps.append(int(state["step"]) if state else 0)
            tensors[_PARAMETER + name] = parameter.detach()
            tensors[_FIRST + name] = state["exp_avg"] if state else torch.zeros_like(parameter)
            tensors[_SECOND + name] = state["exp_avg_sq"] if state else torch.zeros_like(parameter)
        return blob.pack({**tensors, _STEPS: torch.tensor(steps, dtype=torch.int64)})

    def load(self, raw: bytes, *, parameters: bool = True, moments: bool = True) -> None:
        """Raises InvalidInput when the state is of other parameters, or is damaged."""
        try:
            tensors = blob.unpack(raw, None, len(raw))
        except Rejected as error:
            raise InvalidInput(f"The state of the training is damaged: {error.message}") from None
        parts = (_PARAMETER, _FIRST, _SECOND)
        expected = {p + n: (torch.float32, t.shape) for n, t in self.parameters.items() for p in parts}
        expected[_STEPS] = (torch.int64, torch.Size((len(self.parameters),)))
        if {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} != expected:
            raise InvalidInput("The state of the training is of other parameters than these.", "Begin anew: --restart")
        counts = tensors[_STEPS]
        if len(counts) and not 0 <= int(counts.min()) <= int(counts.max()) <= MAX_SEEN:
            raise InvalidInput("The state of the training is damaged: nobody has made so many steps.")
        with torch.no_grad():
            for steps, (name, parameter) in zip(tensors[_STEPS].tolist(), self.parameters.items(), strict=True):
                if parameters:
                    parameter.copy_(tensors[_PARAMETER + name])
                if moments and steps:
                    self._adam.state[parameter] = {
                        "step": torch.tensor(float(steps)),
                        "exp_avg": tensors[_FIRST + name].to(parameter, copy=True),
                        "exp_avg_sq": tensors[_SECOND + name].to(parameter, copy=True),
                    }
