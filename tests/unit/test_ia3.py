"""(IA)³ on families of all makes: where the vectors are found, and that they scale what they say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from p2pmodel.domain.errors import InvalidInput, NotFound
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import ia3
from p2pmodel.tensors.kinds import get_kind

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT2: dict[str, Any] = {
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX: dict[str, Any] = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}

FAMILIES: dict[str, tuple[Callable[[], hf.PreTrainedConfig], set[str]]] = {
    "llama": (lambda: hf.LlamaConfig(**SMALL), {"out:self_attn.k_proj", "out:self_attn.v_proj", "in:mlp.down_proj"}),
    "olmo2": (lambda: hf.Olmo2Config(**SMALL), {"out:self_attn.k_proj", "out:self_attn.v_proj", "in:mlp.down_proj"}),
    "phi3": (lambda: hf.Phi3Config(**SMALL), {"out:self_attn.qkv_proj", "in:mlp.down_proj"}),
    "gpt2": (lambda: hf.GPT2Config(**GPT2), {"out:attn.c_attn", "in:mlp.c_proj"}),
    "gpt_neox": (lambda: hf.GPTNeoXConfig(**NEOX), {"out:attention.query_key_value", "in:mlp.dense_4h_to_h"}),
    "opt": (
        lambda: hf.OPTConfig(
            vocab_size=32,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=16,
            dropout=0.0,
        ),
        {"out:self_attn.k_proj", "out:self_attn.v_proj", "in:fc2"},
    ),
    "mixtral": (
        lambda: hf.MixtralConfig(**EXPERTS),
        {"out:self_attn.k_proj", "out:self_attn.v_proj", "in:mlp.experts.down_proj"},
    ),
    "qwen3_moe": (
        lambda: hf.Qwen3MoeConfig(**SMALL, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2),
        {"out:self_attn.k_proj", "out:self_attn.v_proj", "in:mlp.experts.down_proj"},
    ),
    "bert": (
        lambda: hf.BertConfig(**NEOX, is_decoder=True),
        {"out:attention.self.key", "out:attention.self.value", "in:output.dense"},
    ),
    "lfm2_moe": (
        lambda: hf.Lfm2MoeConfig(
            **SMALL,
            moe_intermediate_size=8,
            num_experts=4,
            num_experts_per_tok=2,
            num_dense_layers=0,
            layer_types=["full_attention"] * 2,
        ),
        {"out:self_attn.k_proj", "out:self_attn.v_proj", "in:feed_forward.experts.down_proj"},
    ),
    "gpt_oss": (
        lambda: hf.GptOssConfig(**EXPERTS, head_dim=4),
        {"out:self_attn.k_proj", "out:self_attn.v_proj", "in:mlp.experts.down_proj"},
    ),
}


def build(family: str) -> tuple[nn.Module, tuple[Slot, ...]]:
    torch.manual_seed(0)
    base = whole(family).train(False).base_model
    return base, ia3.find_slots(base)


def whole(family: str) -> hf.PreTrainedModel:
    model: hf.PreTrainedModel = hf.AutoModelForCausalLM.from_config(FAMILIES[family][0]())  # type: ignore[no-untyped-call]
    return model


def random_rows(slots: tuple[Slot, ...], rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {slot.name: 1 + 0.5 * torch.randn(rows, *slot.shape, generator=generator) for slot in slots}


def run(base: nn.Module, ids: Tensor) -> Tensor:
    hidden: Tensor = base(input_ids=ids).last_hidden_state
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_are_found_on_the_meta_device(family: str) -> None:
    with torch.device("meta"):
        base = whole(family).base_model
    slots = ia3.find_slots(base)
    places = {slot.name.removeprefix("ia3:").replace(_layers(base), "") for slot in slots}
    below = {f"{kind}:{path.split('.', 1)[1]}" for kind, path in (place.split(":") for place in places)}
    assert below == FAMILIES[family][1]
    assert len(slots) == 2 * len(below)
    assert [slot.name for slot in slots] == sorted(slot.name for slot in slots)


def _layers(base: nn.Module) -> str:
    return next(f"{path}." for path, module in base.named_modules() if isinstance(module, nn.ModuleList))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_are_as_if_alone(family: str) -> None:
    """Each row with its own vectors is that row computed alone with them, and other vectors do other things."""
    base, slots = build(family)
    ids, rows = torch.arange(15).view(3, 5) + 3, random_rows(slots, 3)
    applier = ia3.Applier(base, [slot.name for slot in slots])
    with torch.no_grad():
        plain = run(base, ids)
        with applier.use(rows):
            together = run(base, ids)
        for row in range(3):
            with applier.use({name: vectors[row] for name, vectors in rows.items()}):
                alone = run(base, ids[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together, plain, atol=1e-3)
        assert torch.equal(run(base, ids), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_slot_has_a_gradient(family: str) -> None:
    base, slots = build(family)
    state = {name: tensor.requires_grad_(True) for name, tensor in ia3.initial(slots).items()}
    with ia3.Applier(base, list(state)).use(state):
        run(base, torch.arange(10).view(1, 10) + 3).square().sum().backward()  # type: ignore[no-untyped-call]
    # The key's bias of a softmax cancels, its scale does not.
    assert all(tensor.grad is not None and bool(tensor.grad.abs().sum() > 0) for tensor in state.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_initial_state_changes_nothing_and_remove_leaves_nothing(family: str) -> None:
    base, slots = build(family)
    ids = torch.arange(10).view(2, 5) + 3
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
    with torch.no_grad():
        plain = run(base, ids)
        applier = ia3.Applier(base, [slot.name for slot in slots])
        for state in (ia3.initial(slots), None, {}):
            with applier.use(state):
                assert torch.equal(run(base, ids), plain)
        applier.remove()
        with applier.use(random_rows(slots, 2)):
            assert torch.equal(run(base, ids), plain)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()) == hooks
    assert not any({"forward", ia3.GATE} & vars(m).keys() for m in base.modules())
    assert not any("_scale_call" in repr(vars(m).get(ia3.ACTIVATION)) for m in base.modules())


def test_a_vector_is_the_same_as_scaled_weights() -> None:
    base, slots = build("llama")
    state = {name: rows[0] for name, rows in random_rows(slots, 1).items()}
    ids = torch.arange(8).view(1, 8) + 3
    with torch.no_grad():
        with ia3.Applier(base, list(state)).use(state):
            scaled = run(base, ids)
        for name, vector in state.items():
            weight = base.get_submodule(name.rpartition(":")[2]).get_parameter("weight")
            weight.mul_(vector[:, None] if name.startswith(ia3.OUT) else vector)
        torch.testing.assert_close(run(base, ids), scaled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_vector_of_experts_is_the_same_as_scaled_weights(family: str) -> None:
    base, slots = build(family)
    name = next(slot.name for slot in slots if "experts" in slot.name)
    vector, ids = 1 + torch.rand(24), torch.arange(8).view(1, 8) + 3
    with torch.no_grad():
        with ia3.Applier(base, [name]).use({name: vector}):
            scaled = run(base, ids)
        # Of gpt-oss the inputs are the rows.
        base.get_parameter(name.rpartition(":")[2]).mul_(vector[:, None] if family == "gpt_oss" else vector)
        torch.testing.assert_close(run(base, ids), scaled, rtol=1e-4, atol=1e-5)


def test_slots_of_other_spans_are_left_out() -> None:
    base, slots = build("llama")
    applier = ia3.Applier(base, [*(slot.name for slot in slots), "ia3:out:layers.7.self_attn.k_proj", "other:x"])
    with applier.use({"ia3:out:layers.7.self_attn.k_proj": torch.ones(3)}):
        run(base, torch.arange(8).view(1, 8))


def test_half_precision_stays_half() -> None:
    base, slots = build("llama")
    base.to(torch.bfloat16)
    with torch.no_grad(), ia3.Applier(base, [slot.name for slot in slots]).use(ia3.initial(slots)):
        assert run(base, torch.arange(8).view(1, 8)).dtype == torch.bfloat16


def test_use_nests() -> None:
    base, slots = build("llama")
    applier, ids = ia3.Applier(base, [slot.name for slot in slots]), torch.arange(8).view(1, 8)
    state = {name: rows[0] for name, rows in random_rows(slots, 1).items()}
    with torch.no_grad(), applier.use(state):
        first = run(base, ids)
        with applier.use(None):
            assert not torch.allclose(run(base, ids), first, atol=1e-3)
        assert torch.equal(run(base, ids), first)


def test_a_model_without_such_modules_is_refused() -> None:
    for base in (nn.Linear(2, 2), nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))):
        with pytest.raises(InvalidInput):
            ia3.find_slots(base)


def test_kinds_are_found_by_name() -> None:
    kind = get_kind("ia3@1")
    base, slots = build("llama")
    assert kind.find_slots(base) == slots
    assert kind.name == "ia3@1"
    assert all(bool((t == 1).all()) and t.dtype == torch.float32 for t in kind.initial(slots).values())
    with pytest.raises(NotFound):
        get_kind("magic@1")
