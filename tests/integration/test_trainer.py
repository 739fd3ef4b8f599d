"""Training of a small model: what comes out, what is left as it was, and what makes no difference."""

import dataclasses
import math

import pytest
import torch
from transformers import LlamaForCausalLM

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.ids import Digest
from p2pmodel.engine.data import Blocks, Parts
from p2pmodel.engine.training import loop as training
from p2pmodel.engine.training.auditing import replay_segment
from p2pmodel.engine.training.loop import Step, Trained
from p2pmodel.engine.training.pace import measure
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.engine.training.resuming import MemoryKeeper, Progress
from p2pmodel.engine.training.trainees import new_trainee
from p2pmodel.tensors.blob import pack
from p2pmodel.tensors.kinds import get_kind
from p2pmodel.tensors.patch_kind import KindOptions
from p2pmodel.wire import canonical
from tests.support.training import byte_tokenizer, prose_parts, small_model, trained_patch

KIND = get_kind("ia3@1")
OPTIONS = TrainingOptions(steps=12, batch=4, sequence=32, learning_rate=0.1, fisher_examples=8, checkpoint_every=5)

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return small_model()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return prose_parts(tmp_path_factory.mktemp("texts"), byte_tokenizer())


@pytest.fixture(scope="module")
def parent(model: LlamaForCausalLM) -> State:
    return KIND.initial(KIND.find_slots(model.base_model))


@pytest.fixture(scope="module")
def trained(model: LlamaForCausalLM, parent: State, parts: Parts) -> Trained:
    return trained_patch(model, parent, parts, OPTIONS)


class Hoarder(MemoryKeeper):
    """Keeps everything, and finds what it is told to."""

    def __init__(self, blobs: dict[Digest, bytes] | None = None, start: Progress | None = None) -> None:
        super().__init__()
        self._blobs = {} if blobs is None else blobs
        self.blobs, self.start = self._blobs, start
        self.notes: list[Progress] = []

    def found(self) -> Progress | None:
        return self.start

    def note(self, progress: Progress) -> None:
        self.notes.append(Progress.decode(progress.encode()))


def same(a: Trained, b: Trained) -> bool:
    figures = [(t.losses, t.held_out, t.checkpoints, t.states, t.best, t.samples, t.tokens) for t in (a, b)]
    blobs = [(pack(t.adapter), pack(t.fisher), pack(t.control or {}), t.final_state) for t in (a, b)]
    return figures[0] == figures[1] and blobs[0] == blobs[1]


def test_training_lowers_the_held_out_loss(trained: Trained, parent: State) -> None:
    assert trained.loss_after < trained.loss_before - 0.05
    assert trained.samples == 12 * 4
    assert trained.tokens == 12 * 4 * 32
    assert trained.adapter.keys() == trained.fisher.keys() == parent.keys()
    for name, fisher in trained.fisher.items():
        assert fisher.shape == parent[name].shape
        assert bool((fisher >= 0).all())
        assert bool(fisher.sum() > 0)


def test_training_is_the_seeds(model: LlamaForCausalLM, parent: State, trained: Trained, parts: Parts) -> None:
    assert same(trained_patch(model, parent, parts, OPTIONS), trained)
    other = trained_patch(model, parent, parts, dataclasses.replace(OPTIONS, seed=1))
    assert other.checkpoints[1] != trained.checkpoints[1]


def test_checkpoints_are_the_first_the_regular_and_the_last(trained: Trained, parent: State) -> None:
    assert len(trained.checkpoints) == len(trained.states) == len(trained.held_out) == 4
    assert trained.checkpoints[0] == canonical.digest(pack(parent))
    assert trained.checkpoints[trained.best] == canonical.digest(pack(trained.adapter))
    assert trained.states[-1] == canonical.digest(trained.final_state)
    assert trained.loss_after == trained.held_out[trained.best] == min(trained.held_out)


def test_training_starts_at_the_parent(model: LlamaForCausalLM, trained: Trained, parts: Parts) -> None:
    further = trained_patch(model, trained.adapter, parts, dataclasses.replace(OPTIONS, steps=1))
    assert further.loss_before == pytest.approx(trained.loss_after, abs=1e-6)


def test_training_leaves_the_model_as_it_was(model: LlamaForCausalLM, parent: State, parts: Parts) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    steps: list[Step] = []
    trained_patch(model, parent, parts, dataclasses.replace(OPTIONS, steps=2), on_step=steps.append)
    assert [step.number for step in steps] == [1, 2]
    assert all(math.isfinite(step.loss) and step.tokens == 4 * 32 for step in steps)
    assert [step.held_out is None for step in steps] == [True, False]
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad
        assert p.grad is None


def test_a_training_that_goes_wrong_gives_the_best_state_seen(
    model: LlamaForCausalLM, parent: State, parts: Parts
) -> None:
    options = dataclasses.replace(OPTIONS, learning_rate=200.0, steps=4, checkpoint_every=2, held_out_blocks=16)
    wild = trained_patch(model, parent, parts, options)
    assert wild.loss_after == wild.loss_before
    assert pack(wild.adapter) == pack(parent)


def test_early_stopping_ends_a_training_that_goes_wrong(model: LlamaForCausalLM, parent: State, parts: Parts) -> None:
    options = dataclasses.replace(OPTIONS, learning_rate=200.0, checkpoint_every=2, early_stopping=2)
    stopped = trained_patch(model, parent, parts, options)
    assert stopped.best == 0
    assert len(stopped.losses) == 4
    assert len(stopped.checkpoints) == 3


def test_a_loss_that_is_not_finite_is_said(model: LlamaForCausalLM, parent: State, parts: Parts) -> None:
    broken = {name: torch.full_like(tensor, 1e38) for name, tensor in parent.items()}
    with pytest.raises(InvalidInput, match="not finite"):
        trained_patch(model, broken, parts, OPTIONS)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch": 0},
        {"accumulate": 0},
        {"learning_rate": math.nan},
        {"learning_rate": -1.0},
        {"schedule": "none"},
        {"precision": "int8"},
        {"validation": 1.0},
        {"warm_up": 2.0},
        {"clip": -1.0},
        {"steps": 100_000, "checkpoint_every": 1},
        {"fisher": "mine"},
        {"seed": -1},
        {"weight_decay": math.inf},
    ],
)
def test_options_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(InvalidInput):
        dataclasses.replace(OPTIONS, **change)  # type: ignore[arg-type]


def test_accumulated_batches_are_one_larger_batch(model: LlamaForCausalLM, parent: State, parts: Parts) -> None:
    large = trained_patch(model, parent, parts, dataclasses.replace(OPTIONS, batch=4, steps=4))
    small = trained_patch(model, parent, parts, dataclasses.replace(OPTIONS, batch=1, accumulate=4, steps=4))
    assert small.samples == large.samples
    assert small.losses == pytest.approx(large.losses, abs=1e-6)
    for name, tensor in large.adapter.items():
        assert torch.allclose(small.adapter[name], tensor, atol=1e-6), name


def test_a_schedule_spans_the_planned_rounds(model: LlamaForCausalLM, parent: State, parts: Parts) -> None:
    """Two rounds of six steps on the same batches are one training of twelve, to the bit."""

    def states(options: TrainingOptions, before: bytes | None, batches: list[Blocks]) -> bytes:
        trainee = new_trainee(model, "ia3@1", parent, parts.train, KindOptions(), 0)
        run = training.Run(model, trainee, parts.train, parts.train[:0], options, {})
        with training.frozen(model, trainee):
            if before is not None:
                run.optimiser.load(before)
            for number, batch in enumerate(batches):
                run.step(number, batch)
        trainee.remove()
        return run.optimiser.save()

    whole = dataclasses.replace(OPTIONS, schedule="wsd", steps=12)
    batches = [parts.train[at * 4 : at * 4 + 4] for at in range(12)]
    half = dataclasses.replace(whole, steps=6, rounds=2)
    first = states(half, None, batches[:6])
    assert states(dataclasses.replace(half, round=1), first, batches[6:]) == states(whole, None, batches)


def test_tokens_count_alike_in_accumulated_batches(model: LlamaForCausalLM, parent: State, parts: Parts) -> None:
    """The mean is over all tokens of a step, not over its batches' means."""
    labels = parts.train.labels.clone()
    labels[::2, 3:] = -100
    few = Parts(Blocks(parts.train.ids, labels), parts.held_out)
    large = trained_patch(model, parent, few, dataclasses.replace(OPTIONS, batch=4, steps=2))
    small = trained_patch(model, parent, few, dataclasses.replace(OPTIONS, batch=2, accumulate=2, steps=2))
    assert small.tokens == large.tokens < 2 * 4 * 32
    assert small.losses == pytest.approx(large.losses, abs=1e-6)


def test_bfloat16_learns_too_and_keeps_the_patch_in_float32(
    model: LlamaForCausalLM, parent: State, parts: Parts, trained: Trained
) -> None:
    half = trained_patch(model, parent, parts, dataclasses.replace(OPTIONS, precision="bf16"))
    assert half.loss_after < half.loss_before - 0.05
    assert half.loss_after == pytest.approx(trained.loss_after, abs=0.1)
    assert half.losses != trained.losses
    assert all(tensor.dtype == torch.float32 for tensor in (*half.adapter.values(), *half.fisher.values()))


def test_weight_decay_draws_towards_the_parent(model: LlamaForCausalLM, parent: State, parts: Parts) -> None:
    def moved(weight_decay: float) -> float:
        options = dataclasses.replace(OPTIONS, weight_decay=weight_decay, schedule="constant")
        adapter = trained_patch(model, parent, parts, options).adapter
        return sum(float((adapter[name] - parent[name]).square().sum()) for name in parent)

    assert moved(5.0) < moved(0.0) / 2


def test_clipping_limits_what_a_gradient_does(model: LlamaForCausalLM, parent: State, parts: Parts) -> None:
    clipped = trained_patch(model, parent, parts, dataclasses.replace(OPTIONS, clip=1e-12, steps=2))
    assert all(torch.allclose(clipped.adapter[name], parent[name], atol=1e-3) for name in parent)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("control", [False, True])
def test_a_training_that_goes_on_ends_in_the_same_bits(
    model: LlamaForCausalLM, parent: State, parts: Parts, at: int, control: bool
) -> None:
    options = dataclasses.replace(OPTIONS, control=control, weight_decay=0.1, clip=1.0)
    whole = Hoarder()
    expected = trained_patch(model, parent, parts, options, keeper=whole)
    resumed: list[Step] = []
    again = Hoarder(whole.blobs, whole.notes[at])
    assert same(trained_patch(model, parent, parts, options, keeper=again, on_step=resumed.append), expected)
    assert [step.number for step in resumed] == list(range(1, 13))
    assert sum(step.resumed for step in resumed) == whole.notes[at].step


def test_it_may_be_broken_off_between_checkpoints_too(
    model: LlamaForCausalLM, parent: State, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(OPTIONS, control=True)
    expected = trained_patch(model, parent, parts, options)
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)
    whole = Hoarder()
    trained_patch(model, parent, parts, options, keeper=whole)
    assert [progress.step for progress in whole.notes] == list(range(13))
    for at in (3, 8, 11):
        again = trained_patch(model, parent, parts, options, keeper=Hoarder(whole.blobs, whole.notes[at]))
        assert same(again, expected)


@pytest.mark.parametrize("kind", ["ia3@1", "fish@1", "dense@1", "lora@1"])
def test_a_segment_can_be_replayed_from_its_checkpoint_alone(model: LlamaForCausalLM, parts: Parts, kind: str) -> None:
    known = get_kind(kind)
    parent = known.initial(known.find_slots(model.base_model))
    options = dataclasses.replace(OPTIONS, learning_rate=0.01, weight_decay=0.1)
    kept = Hoarder()
    result = trained_patch(model, parent, parts, options, kind, keeper=kept)
    trainee = new_trainee(model, kind, parent, parts.train, KindOptions(density=0.02, rank=2), options.seed)
    for index, steps in ((1, range(5, 10)), (2, range(10, 12)), (0, range(5))):
        state = kept.blobs[result.states[index]]
        replayed = replay_segment(model, trainee, parts.train, options, state, steps)
        digests = [canonical.digest(raw) for raw in (replayed.before, replayed.after, replayed.state)]
        assert digests == [result.checkpoints[index], result.checkpoints[index + 1], result.states[index + 1]]
    trainee.remove()


def test_a_state_of_something_else_is_refused(model: LlamaForCausalLM, parent: State, parts: Parts) -> None:
    trainee = new_trainee(model, "ia3@1", parent, parts.train, KindOptions(), 0)
    with pytest.raises(InvalidInput, match="damaged"):
        replay_segment(model, trainee, parts.train, OPTIONS, b"nonsense", range(5))
    with pytest.raises(InvalidInput, match="other parameters"):
        replay_segment(model, trainee, parts.train, OPTIONS, pack({"x": torch.ones(1)}), range(5))
    trainee.remove()


def test_moments_of_an_earlier_round_are_gone_on_with(
    model: LlamaForCausalLM, parent: State, parts: Parts, trained: Trained
) -> None:
    fresh = trained_patch(model, trained.adapter, parts, OPTIONS)
    warm = trained_patch(model, trained.adapter, parts, OPTIONS, moments=trained.final_state)
    assert warm.checkpoints[0] == fresh.checkpoints[0]
    assert warm.states[0] != fresh.states[0]
    assert warm.checkpoints[1] != fresh.checkpoints[1]
    assert warm.loss_after < warm.loss_before


def test_the_control_variate_is_the_mean_gradient(model: LlamaForCausalLM, parent: State, parts: Parts) -> None:
    """Of one step without movement: the gradient of its loss."""
    options = dataclasses.replace(OPTIONS, steps=1, control=True)
    one = trained_patch(model, parent, parts, options)
    assert one.control is not None
    assert one.control.keys() == parent.keys()
    opposed = {name: -gradient for name, gradient in one.control.items()}
    still = trained_patch(model, parent, parts, options, correction=opposed)
    assert still.checkpoints[1] == still.checkpoints[0]  # g + mean(c) - cᵢ is zero
    assert still.control is not None
    assert pack(still.control) == pack(one.control)


@pytest.mark.parametrize("fisher", ["model", "data", "adam"])
def test_fishers_of_all_origins_are_of_the_same_slots(
    model: LlamaForCausalLM, parent: State, parts: Parts, fisher: str
) -> None:
    found = trained_patch(model, parent, parts, dataclasses.replace(OPTIONS, fisher=fisher)).fisher
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in parent.items()}
    assert all(bool((tensor >= 0).all()) and tensor.dtype == torch.float32 for tensor in found.values())
    assert sum(float(tensor.sum()) for tensor in found.values()) > 0


def test_the_fisher_does_not_depend_on_the_batch(model: LlamaForCausalLM, parent: State, parts: Parts) -> None:
    fishers = [
        trained_patch(model, parent, parts, dataclasses.replace(OPTIONS, steps=1, batch=batch, learning_rate=1e-9))
        for batch in (1, 8)
    ]
    for name in parent:
        assert torch.allclose(fishers[0].fisher[name], fishers[1].fisher[name], rtol=1e-3, atol=1e-9)


def test_measuring_changes_nothing(model: LlamaForCausalLM, parent: State, parts: Parts) -> None:
    trainee = new_trainee(model, "ia3@1", parent, parts.train, KindOptions(), 0)
    pace = measure(model, trainee, parts.train, parts.held_out, OPTIONS)
    assert pack(trainee.adapter()) == pack(parent) == pack(pace.adapter)
    trainee.remove()
    assert pace.values == sum(tensor.numel() for tensor in parent.values())
    assert pace.tokens == 4 * 32
    assert pace.total(OPTIONS) > pace.step > 0
    assert pace.fisher.keys() == parent.keys()
