"""The kinds that change weights: what they train, what their blobs hold, and what is refused of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected
from p2pmodel.domain.model import Slot
from p2pmodel.engine.data import Blocks
from p2pmodel.engine.training.trainees import new_trainee
from p2pmodel.tensors import blob, changes, compact, fish, fourbit, lora, weights
from p2pmodel.tensors.kinds import Kinds, get_kind, largest_patch, slots_of
from p2pmodel.tensors.merging import BUILT_IN, Contribution, apply_update, get_strategy
from p2pmodel.tensors.patch_kind import KindOptions, Trainee
from p2pmodel.wire import canonical
from tests.unit.test_ia3 import whole

LIMIT = 1 << 24
FAMILIES = ("llama", "gpt2", "mixtral")
KINDS = ("fish@1", "dense@1", "lora@1")
OPTIONS = KindOptions(density=0.02, mask_examples=3, rank=2, alpha=4.0)
IDS = torch.randint(3, 30, (4, 9), generator=torch.Generator().manual_seed(1))


class Bench:
    """A small model, with a trainee of one kind on it. also: what else its lineage takes."""

    def __init__(self, family: str, kind: str, *also: str, parent: dict[str, Tensor] | None = None) -> None:
        torch.manual_seed(0)
        self.model = whole(family).train(False).requires_grad_(False)
        self.kinds = Kinds([kind, *also])
        self.slots = self.kinds.find_slots(self.model.base_model)
        self.parent = parent or self.kinds.initial(self.slots)
        self.kind = get_kind(kind)
        self.trainee: Trainee = new_trainee(self.model, kind, self.parent, Blocks.of_ids(IDS), OPTIONS, 0)

    def losses(self, part: slice) -> Tensor:
        logits = self.model(input_ids=IDS[part, :-1], use_cache=False).logits
        nats: Tensor = nn.functional.cross_entropy(logits.transpose(1, 2), IDS[part, 1:], reduction="none")
        return nats.sum(1)

    def train(self, steps: int = 3) -> None:
        optimiser = torch.optim.AdamW(list(self.trainee.parameters.values()), lr=1e-2, weight_decay=0.5)
        for _ in range(steps):
            with self.trainee.use():
                loss = self.losses(slice(0, len(IDS))).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            optimiser.zero_grad()

    def read(self) -> tuple[changes.Change, Any]:
        change = self.kind.read(blob.pack(self.trainee.adapter()), slots_of(self.kind, self.slots), LIMIT)
        fisher = blob.pack(compact.encode(self.trainee.squared_gradients(self.losses, len(IDS))))
        return change, self.kind.read_fisher(change, fisher, LIMIT)

    @torch.no_grad()
    def logits(self) -> Tensor:
        logits: Tensor = self.model(input_ids=IDS, use_cache=False).logits
        return logits

    def logits_at(self, state: dict[str, Tensor]) -> Tensor:
        applier = self.kinds.applier(self.model.base_model, list(state))
        with applier.use(state):
            logits = self.logits()
        applier.remove()
        return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_trained_is_what_a_reader_applies(family: str, kind: str) -> None:
    bench = Bench(family, kind)
    plain = bench.logits()
    with bench.trainee.use():
        assert torch.equal(bench.logits(), plain)
    bench.train()
    with bench.trainee.use(), bench.trainee.use():
        trained = bench.logits()
    assert not torch.allclose(trained, plain, atol=1e-3)
    assert torch.equal(bench.logits(), plain)
    change, _ = bench.read()
    torch.testing.assert_close(bench.logits_at(change.applied_to(bench.parent)), trained, rtol=1e-5, atol=1e-6)
    bench.trainee.remove()
    assert torch.equal(bench.logits(), plain)
    assert all(
        isinstance(p, nn.Parameter) for m in bench.model.modules() for p in m._parameters.values() if p is not None
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient_and_the_models_own_have_none(kind: str) -> None:
    bench = Bench("llama", kind)
    bench.train(1)
    with bench.trainee.use():
        loss = bench.losses(slice(0, 4)).sum()
    grads = torch.autograd.grad(loss, list(bench.trainee.parameters.values()))
    assert all(bool(grad.any()) for grad in grads)
    assert list(bench.trainee.parameters) == sorted(bench.trainee.parameters)
    assert all(p.dtype == torch.float32 and p.is_leaf for p in bench.trainee.parameters.values())
    assert all(p.grad is None for p in bench.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_of_a_fish_mask_no_bit_changes(family: str) -> None:
    bench = Bench(family, "fish@1")
    bench.train()
    change, _ = bench.read()
    state = change.applied_to(bench.parent)
    adapter = bench.trainee.adapter()
    chosen = 0
    for name, weight in bench.model.base_model.named_parameters():
        slot = weights.PREFIX + name
        if slot not in state:
            continue
        after = weights.folded(weight, state[slot]).view(-1).view(torch.int32)
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[adapter.get(slot + fish.INDEX, torch.empty(0, dtype=torch.int32)).long()] = True
        same = after == weight.reshape(-1).view(torch.int32)
        assert bool(same[~mask].all())
        chosen += int((~same).sum())
    assert 0 < chosen <= round(0.02 * sum(_size(slot) for slot in bench.slots))


def _size(slot: Slot) -> int:
    return torch.Size(slot.shape).numel()


def test_a_mask_is_the_global_top_k() -> None:
    fisher = {"b": torch.tensor([[0.5, 3.0], [0.5, 0.0]]), "a": torch.tensor([2.0, 0.5, 0.0, 0.0])}
    assert {n: i.tolist() for n, i in fish.choose(fisher, 2 / 8).items()} == {"a": [0], "b": [1]}
    assert {n: i.tolist() for n, i in fish.choose(fisher, 4 / 8).items()} == {"a": [0, 1], "b": [0, 1]}
    assert sum(len(i) for i in fish.choose(fisher, 1.0).values()) == 5
    everything = {"a": torch.rand(1000, generator=torch.Generator().manual_seed(0))}
    assert sum(len(i) for i in fish.choose(everything, 0.025).values()) == 25


def test_the_mask_depends_on_the_data_and_the_seed_alone() -> None:
    first, again = Bench("llama", "fish@1").trainee.adapter(), Bench("llama", "fish@1").trainee.adapter()
    assert blob.pack(first) == blob.pack(again)


def test_rows_of_vectors_have_the_fisher_of_a_loop() -> None:
    bench = Bench("mixtral", "ia3@1")
    together = bench.trainee.squared_gradients(bench.losses, len(IDS))
    for name, parameter in bench.trainee.parameters.items():
        alone = torch.zeros_like(parameter, dtype=torch.float64)
        for row in range(len(IDS)):
            with bench.trainee.use():
                loss = bench.losses(slice(row, row + 1)).sum()
            alone += torch.autograd.grad(loss, parameter)[0].double().square()
        torch.testing.assert_close(together[name], alone, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fisher_is_that_of_the_weights(kind: str) -> None:
    """Of each example alone, against gradients of the folded weights."""
    bench = Bench("gpt2", kind)
    bench.train()
    change, masses = bench.read()
    state = change.applied_to(bench.parent)
    slot = "weight:h.1.attn.c_proj.weight"
    leaf = state[slot].clone().requires_grad_(True)
    applier = bench.kinds.applier(bench.model.base_model, list(state))
    exact = torch.zeros_like(leaf, dtype=torch.float64)
    for row in range(len(IDS)):
        with applier.use({**state, slot: leaf}):
            loss = bench.losses(slice(row, row + 1)).sum()
        exact += torch.autograd.grad(loss, leaf)[0].double().square()
    if kind == "fish@1":
        held = masses[slot] >= 0
        assert 0 < int(held.sum()) < held.numel()
        torch.testing.assert_close(masses[slot][held].double(), exact[held], rtol=0.06, atol=1e-9)
    else:
        factored = exact.mean(1)[:, None] * exact.mean(0) / exact.mean()
        torch.testing.assert_close(masses[slot].double(), factored, rtol=0.15, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_goes_on_from_its_parent(kind: str) -> None:
    first = Bench("llama", "dense@1")
    first.train()
    parent = first.read()[0].applied_to(first.parent)
    bench = Bench("llama", kind, parent=parent)
    at_parent = bench.logits_at(parent)
    with bench.trainee.use():
        torch.testing.assert_close(bench.logits(), at_parent, rtol=1e-5, atol=1e-6)
    bench.train()
    with bench.trainee.use():
        trained = bench.logits()
    state = bench.read()[0].applied_to(parent)
    torch.testing.assert_close(bench.logits_at(state), trained, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["ia3@1", "dense@1"])
def test_updates_in_four_bits_say_nearly_the_same(kind: str) -> None:
    bench = Bench("llama", kind)
    bench.train()
    exact, own = bench.read()[0], slots_of(bench.kind, bench.slots)
    state = exact.applied_to(bench.parent)
    updates = {slot.name: state[slot.name] - bench.parent[slot.name] for slot in own}
    raw = blob.pack(fourbit.encode(updates)[0])
    change = bench.kind.read(raw, own, LIMIT)
    assert change.relative
    assert change.fisher_places == exact.fisher_places
    apart = sum(float((change.values[name] - update).square().sum()) for name, update in updates.items())
    assert 0 < apart <= 0.02 * sum(float(update.square().sum()) for update in updates.values())
    for wrong in (own[:-1], (*own, Slot(own[0].name + "more", (64,), "float32"))):
        with pytest.raises(Rejected):
            bench.kind.read(raw, wrong, LIMIT)
    with pytest.raises(Rejected):
        bench.kind.read(raw, own, len(raw) - 1)


@pytest.mark.parametrize("kind", ["ia3@1", "fish@1"])
def test_vectors_and_weights_live_in_one_version(kind: str) -> None:
    dense = Bench("llama", "dense@1", "ia3@1")
    dense.train()
    vectors = {s.name: torch.full(s.shape, 1.2) for s in dense.slots if s.name.startswith("ia3:")}
    parent = {**dense.read()[0].applied_to(dense.parent), **vectors}
    other = "dense@1" if kind == "ia3@1" else "ia3@1"
    bench = Bench("llama", kind, other, parent=parent)
    at_parent = bench.logits_at(parent)
    assert not torch.allclose(at_parent, bench.logits(), atol=1e-2)
    with bench.trainee.use():
        torch.testing.assert_close(bench.logits(), at_parent, rtol=1e-5, atol=1e-6)
    bench.train()
    with bench.trainee.use():
        trained = bench.logits()
    torch.testing.assert_close(bench.logits_at(bench.read()[0].applied_to(parent)), trained, rtol=1e-5, atol=2e-6)
    bench.trainee.remove()
    assert torch.equal(bench.logits(), dense.logits())


def test_a_bf16_model_is_trained_in_float32_and_folded_to_bf16() -> None:
    bench = Bench("llama", "ia3@1", "dense@1")
    bench.model.to(torch.bfloat16)
    trainee = new_trainee(bench.model, "dense@1", bench.parent, Blocks.of_ids(IDS), OPTIONS, 0)
    with trainee.use():
        loss = bench.losses(slice(0, 2)).sum()
    grads = torch.autograd.grad(loss, list(trainee.parameters.values()))
    assert all(grad.dtype == torch.float32 and bool(grad.any()) for grad in grads)


def test_folding_nothing_changes_no_bit() -> None:
    weight = torch.tensor([-0.0, 0.0, 1.0, -3e-40], dtype=torch.float32)
    assert torch.equal(weights.folded(weight, torch.zeros(4)).view(torch.int32), weight.view(torch.int32))


def contribution(number: int, change: changes.Change, fisher: Any) -> Contribution:
    return Contribution(canonical.digest(str(number).encode()), change.values, fisher, 1.0, change.relative)


def sparse(index: list[int], value: list[float], mass: list[float]) -> tuple[changes.Change, Any]:
    slots = (Slot("weight:w", (2, 3), "float32"),)
    raw = {"weight:w#index": torch.tensor(index, dtype=torch.int32), "weight:w#value": torch.tensor(value)}
    change = fish.read(blob.pack(raw), slots, LIMIT)
    return change, fish.masses(change, {"weight:w#value": torch.tensor(mass)})


def test_two_masks_merge_where_they_meet_and_stay_where_they_do_not() -> None:
    given = sorted(
        (
            contribution(0, *sparse([0, 4], [1.0, 2.0], [1.0, 1.0])),
            contribution(1, *sparse([1, 4], [5.0, 4.0], [2.0, 3.0])),
        ),
        key=lambda c: c.patch,
    )
    parent = {"weight:w": torch.full((2, 3), 10.0)}
    loose = {"fisher_clip": 1e9, "norm_clip": 1e9}
    update = get_strategy("fisher@1").combine(parent, given, loose)
    torch.testing.assert_close(
        apply_update(parent, update, 1.0)["weight:w"].view(-1), torch.tensor([11.0, 15.0, 10.0, 10.0, 13.5, 10.0])
    )
    # Clipped at twice the median of those that hold a value: alone at 0 and 1, of two (the lower one) at 4.
    clipped = get_strategy("fisher@1").combine(parent, given, {"norm_clip": 1e9})["weight:w"].view(-1)
    torch.testing.assert_close(clipped[[0, 1, 4]], torch.tensor([1.0, 5.0, (2 + 4 * 2) / 3], dtype=torch.float64))
    mean = get_strategy("mean@1").combine(parent, given, {})["weight:w"].view(-1)
    assert mean.tolist() == [0.5, 2.5, 0.0, 0.0, 3.0, 0.0]


@pytest.mark.parametrize("strategy", BUILT_IN)
def test_blocks_do_not_change_the_merge_of_kinds(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    from p2pmodel.tensors.merging import columns

    given = []
    for number, kind in enumerate(KINDS):
        bench = Bench("gpt2", kind)
        bench.train(1)
        given.append(contribution(number, *bench.read()))
    given.sort(key=lambda c: c.patch)
    whole_merge = get_strategy(strategy).combine(bench.parent, given, {})
    monkeypatch.setattr(columns, "BLOCK_ELEMENTS", 3 * 700)
    monkeypatch.setattr(columns, "CACHED_ELEMENTS", 130)
    assert blob.pack(get_strategy(strategy).combine(bench.parent, given, {})) == blob.pack(whole_merge)


def test_parts_of_lazy_tensors_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    means = {"w#rows": torch.rand(3, 5, generator=generator), "w#columns": torch.rand(3, 7, generator=generator)}
    lazy: list[changes.Lazy] = [
        changes.Factored({"w": (3, 5, 7)}, means),
        changes.Product({"w": torch.randn(15, 2)}, {"w": torch.randn(2, 7)}, 0.5),
        changes.Sparse(
            {"w": (15, 7)},
            {"w": torch.tensor([0, 50, 104], dtype=torch.int32)},
            {"w#value": torch.ones(3)},
            "#value",
            -1.0,
        ),
    ]
    for tensors in lazy:
        flat = tensors["w"].reshape(-1)
        for low, high in ((0, 105), (0, 1), (6, 8), (34, 71), (104, 105)):
            assert torch.equal(tensors.part("w", low, high), flat[low:high])
    rows, columns = means["w#rows"][1].double(), means["w#columns"][1].double()
    torch.testing.assert_close(lazy[0]["w"][1].double(), rows[:, None] * columns / rows.mean())


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
def test_a_fisher_whose_product_is_not_finite_is_refused(shape: tuple[int, ...]) -> None:
    rows, columns = torch.zeros(shape[:-1]), torch.ones(*shape[:-2], shape[-1])
    rows[..., 0] = 1e-30
    columns[..., 2] = torch.finfo(torch.float32).max / 5.001  # one row has all of the mass: five times its mean
    means = {"w#rows": rows, "w#columns": columns}
    assert bool(changes.Factored({"w": shape}, means)["w"].isfinite().all())
    with pytest.raises(Rejected, match=r"Fisher of slot 'w' is too large"):
        changes.Factored({"w": shape}, {**means, "w#columns": columns * 1.001})


SLOTS = (Slot("weight:v", (4,), "float32"), Slot("weight:w", (2, 3), "float32"))
INDEX, VALUE = torch.tensor([0, 5], dtype=torch.int32), torch.ones(2)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"weight:w#index": INDEX},
        {"weight:w#value": VALUE},
        {"weight:x#index": INDEX, "weight:x#value": VALUE},
        {"weight:w#index": INDEX, "weight:w#value": VALUE, "weight:w": torch.ones(2, 3)},
        {"weight:w#index": INDEX.long(), "weight:w#value": VALUE},
        {"weight:w#index": INDEX, "weight:w#value": VALUE.double()},
        {"weight:w#index": INDEX, "weight:w#value": torch.ones(3)},
        {"weight:w#index": INDEX.view(1, 2), "weight:w#value": VALUE.view(1, 2)},
        {"weight:w#index": INDEX.flip(0), "weight:w#value": VALUE},
        {"weight:w#index": torch.zeros(2, dtype=torch.int32), "weight:w#value": VALUE},
        {"weight:w#index": torch.tensor([-1, 2], dtype=torch.int32), "weight:w#value": VALUE},
        {"weight:w#index": torch.tensor([0, 6], dtype=torch.int32), "weight:w#value": VALUE},
        {"weight:v#index": torch.tensor([0, 4], dtype=torch.int32), "weight:v#value": VALUE},
        {"weight:w#index": INDEX, "weight:w#value": torch.tensor([1.0, torch.nan])},
        {"weight:w#index": INDEX[:0], "weight:w#value": VALUE[:0]},
    ],
)
def test_hostile_masks_are_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(Rejected):
        fish.read(blob.pack(tensors), SLOTS, LIMIT)


A, B, SCALE = torch.ones(1, 3), torch.ones(2, 1), torch.tensor([2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"scale": SCALE},
        {"weight:w#a": A, "weight:w#b": B},
        {"weight:w#a": A, "scale": SCALE},
        {"weight:w#a": A, "weight:w#b": B, "scale": SCALE * 0},
        {"weight:w#a": A, "weight:w#b": B, "scale": SCALE * 1e6},
        {"weight:w#a": A, "weight:w#b": B, "scale": SCALE.float()},
        {"weight:w#a": torch.ones(3, 3), "weight:w#b": torch.ones(2, 3), "scale": SCALE},
        {"weight:w#a": torch.ones(2, 3), "weight:w#b": B, "scale": SCALE},
        {"weight:w#a": A.double(), "weight:w#b": B, "scale": SCALE},
        {"weight:w#a": A * 1e30, "weight:w#b": B * 1e30, "scale": SCALE},
        {"weight:v#a": torch.ones(1, 1), "weight:v#b": torch.ones(4, 1), "scale": SCALE},
        {"weight:w#c": A, "weight:w#b": B, "scale": SCALE},
    ],
)
def test_hostile_factors_are_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(Rejected):
        lora.read(blob.pack(tensors), SLOTS, LIMIT)


def test_factors_and_masks_that_fit_are_taken() -> None:
    change = lora.read(blob.pack({"weight:w#a": A, "weight:w#b": B, "scale": SCALE}), SLOTS, LIMIT)
    assert torch.equal(change.values["weight:w"], torch.full((2, 3), 2.0))
    assert change.fisher_places == (("weight:w#columns", (3,)), ("weight:w#rows", (2,)))
    read: Callable[..., changes.Change] = get_kind("fish@1").read
    taken = read(blob.pack({"weight:w#index": INDEX, "weight:w#value": VALUE}), SLOTS, LIMIT)
    assert taken.values["weight:w"].tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("tensors", [{}, {"weight:w": torch.ones(3, 2)}, {"weight:x": torch.ones(1)}])
def test_hostile_updates_are_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(Rejected):
        get_kind("dense@1").read(blob.pack(tensors), SLOTS, LIMIT)


def test_lora_finds_linear_layers_and_no_experts() -> None:
    for family, expected in (
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ):
        base = whole(family).base_model
        found = lora.targets(base, [slot.name for slot in weights.find_slots(base)])
        assert {slot.split(".")[-2] for slot in found} == expected
        assert set(found.values()) == {family != "gpt2"}


def test_slots_are_the_layers_parameters_and_nothing_that_layers_share() -> None:
    with torch.device("meta"):
        base = whole("mixtral").base_model
    slots = weights.find_slots(base)
    assert all(".layers." in f".{slot.name.removeprefix('weight:')}" for slot in slots)
    assert any(len(slot.shape) == 3 for slot in slots)
    assert any(slot.name.endswith("input_layernorm.weight") for slot in slots)
    llama = whole("llama").base_model
    shared = llama.get_parameter("layers.0.mlp.up_proj.weight")
    llama.get_submodule("layers.1.mlp.up_proj").register_parameter("weight", shared)
    assert not any("up_proj" in slot.name for slot in weights.find_slots(llama))


def test_adams_moments_stand_for_a_fisher_where_they_say_enough() -> None:
    moments = {"weight:v": torch.ones(4), "weight:w": torch.rand(2, 3)}
    dense = get_kind("dense@1").fisher_of(moments)
    assert {name: tuple(t.shape) for name, t in dense.items()} == {
        "weight:v": (4,),
        "weight:w#rows": (2,),
        "weight:w#columns": (3,),
    }
    assert get_kind("fish@1").fisher_of({"weight:w#value": VALUE}).keys() == {"weight:w#value"}
    with pytest.raises(InvalidInput):
        get_kind("lora@1").fisher_of(moments)


def test_kinds_are_chosen_by_name() -> None:
    with pytest.raises(NotFound):
        Kinds(["ia3@1", "magic@1"])
    bench = Bench("llama", "ia3@1")
    with pytest.raises(InvalidInput):
        new_trainee(bench.model, "fish@1", bench.parent, Blocks.of_ids(IDS), OPTIONS, 0)
    assert largest_patch(["fish@1"], SLOTS) < largest_patch(["fish@1", "dense@1"], SLOTS)
    for bad in ({"density": 0.0}, {"density": 1.5}, {"rank": 0}, {"alpha": -1.0}, {"mask_examples": 0}):
        with pytest.raises(InvalidInput):
            KindOptions(**bad)  # type: ignore[arg-type]
