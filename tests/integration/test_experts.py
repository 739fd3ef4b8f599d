"""Experts hosted apart from their layers: the same tokens as the whole model, family by family, and nothing loaded that
is not hosted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected
from p2pmodel.domain.ports import Noted
from p2pmodel.domain.swarm import SessionRequest, Span
from p2pmodel.engine.checkpoint import Checkpoint, load_whole, read_checkpoint
from p2pmodel.engine.expert_calls import Pairs
from p2pmodel.engine.expert_layout import ExpertLayout
from p2pmodel.engine.experts import load_experts
from p2pmodel.engine.head import load_head
from p2pmodel.engine.runner import Runner
from p2pmodel.engine.stage import Stage, load_stage
from p2pmodel.engine.steps import Microbatch
from p2pmodel.engine.vectors import SessionVectors
from p2pmodel.engine.versions import VersionTable
from p2pmodel.tensors import ia3, weights
from p2pmodel.tensors.blob import pack
from p2pmodel.tensors.codecs import get_codec
from p2pmodel.wire import canonical
from tests.support.experts import EXPERTS, LocalExperts, load_shards, save_experts
from tests.support.families import save_small
from tests.support.stage_checks import StageChain, tokens

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "granitemoe", "gpt_oss")
NEW_TOKENS = 24
VERSION = canonical.digest(b"version")


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    save_experts(request.param, folder)
    return read_checkpoint(folder), load_whole(folder)


def trunks(checkpoint: Checkpoint) -> list[Stage]:
    return [load_stage(checkpoint, span, trunk=True) for span in (Span(0, 2), Span(2, checkpoint.layers))]


def greedy(model: PreTrainedModel) -> list[int]:
    ids = tokens(1, 7)
    found = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(found[0].tolist())


@torch.inference_mode()
def test_the_tokens_are_those_of_the_whole_model(family: tuple[Checkpoint, Any]) -> None:
    checkpoint, whole = family
    stages = trunks(checkpoint)
    head, expected = load_head(checkpoint, StageChain(stages)), greedy(whole)
    ids = tokens(3, 9)
    for peers in (2, 3, 4):
        remote = LocalExperts(load_shards(checkpoint, peers))
        for stage in stages:
            stage.board.remote = remote
        assert greedy(head) == expected
        gap = (head(input_ids=ids).logits - whole(input_ids=ids).logits).abs().max()
        assert gap < 1e-5 * max(1.0, float(whole(input_ids=ids).logits.abs().max()))
        assert all(remote.rows)


def test_only_what_is_hosted_is_loaded(family: tuple[Checkpoint, Any]) -> None:
    checkpoint, _ = family
    layout = ExpertLayout(checkpoint)
    with safe_open(checkpoint.path / "model.safetensors", framework="pt") as opened:
        size = {name: opened.get_tensor(name).nbytes for name in opened.keys()}  # noqa: SIM118
    everything = Span(0, checkpoint.layers)
    expert_bytes = sum(size[name] for name in layout.tensors)
    trunk = load_stage(checkpoint, everything, trunk=True)
    layer_bytes = sum(size[name] for name in size if checkpoint.in_span(name, everything))
    assert sum(p.nbytes for p in trunk.base.state_dict().values()) == layer_bytes - expert_bytes
    apart = load_experts(checkpoint, everything, (1, 2, 6))
    assert sum(p.nbytes for p in apart.base.parameters()) == expert_bytes * 3 // EXPERTS
    one_layer = load_experts(checkpoint, Span(checkpoint.layers - 1, checkpoint.layers), range(EXPERTS))
    assert sum(p.nbytes for p in one_layer.base.parameters()) == expert_bytes // len(layout.counts)


def test_gradients_run_through_experts_that_are_elsewhere(family: tuple[Checkpoint, Any]) -> None:
    checkpoint, _ = family
    (last,) = [load_stage(checkpoint, Span(checkpoint.layers - 2, checkpoint.layers), trunk=True)]
    whole = load_stage(checkpoint, last.span)
    last.board.remote = LocalExperts(load_shards(checkpoint, 3))
    hidden = torch.randn(2, 5, checkpoint.hidden_size, generator=torch.Generator().manual_seed(1))
    outer = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    found = []
    for stage in (last, whole):
        leaf = hidden.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(stage.forward(leaf, None, stage.span), leaf, outer)
        found.append(gradient)
    ours, theirs = found
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_families_without_the_interface_are_refused(tmp_path: Path) -> None:
    for kind in ("llama", "llama4_text"):
        folder = tmp_path / kind
        save_small(kind, folder)
        checkpoint = read_checkpoint(folder)
        with pytest.raises(InvalidInput, match="experts interface"):
            load_stage(checkpoint, Span(0, 1), trunk=True)
        with pytest.raises(InvalidInput, match="experts interface"):
            load_experts(checkpoint, Span(0, 1), (0,))


def test_what_is_not_hosted_is_refused(tmp_path: Path) -> None:
    save_experts("deepseek_v3", tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    dense = [layer for layer in range(checkpoint.layers) if layer not in ExpertLayout(checkpoint).counts]
    with pytest.raises(InvalidInput, match=f"no expert {EXPERTS}"):
        load_experts(checkpoint, Span(0, checkpoint.layers), (0, EXPERTS))
    with pytest.raises(InvalidInput, match="None of the layers"):
        load_experts(checkpoint, Span(dense[0], dense[0] + 1), (0,))
    shard = load_experts(checkpoint, Span(2, checkpoint.layers), (4, 5))
    rows, zero = torch.zeros(1, checkpoint.hidden_size), torch.zeros(1, dtype=torch.long)
    with pytest.raises(NotFound, match="layer 1"):
        shard.compute(1, rows, Pairs(zero, zero + 4, torch.ones(1)))
    for expert in (3, EXPERTS + 7):
        with pytest.raises(NotFound, match="experts 4-5"):
            shard.compute(2, rows, Pairs(zero, zero + expert, torch.ones(1)))


def test_versions_that_change_experts_are_served_in_parts(tmp_path: Path) -> None:
    save_experts("qwen3_moe", tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    everything = Span(0, checkpoint.layers)
    whole, trunk = load_stage(checkpoint, everything), load_stage(checkpoint, everything, trunk=True)
    shards = load_shards(checkpoint, 3)
    generator = torch.Generator().manual_seed(4)
    state: dict[str, Tensor] = {}
    for slot in (*ia3.find_slots(whole.base), *weights.find_slots(whole.base)):
        noise = 0.1 * torch.randn(slot.shape, generator=generator)
        state[slot.name] = 1 + noise if slot.name.startswith("ia3") else noise
    tables = [VersionTable(part) for part in (whole, trunk)]
    for table in tables:
        table.put(VERSION, state)
    of_shards = [VersionTable(shard) for shard in shards]
    for table, shard in zip(of_shards, shards, strict=True):
        table.put(VERSION, shard.own_part(state))
    trunk.board.remote = LocalExperts(shards, [table.get(VERSION) for table in of_shards])
    hidden = torch.randn(1, 6, checkpoint.hidden_size, generator=generator)
    ours = trunk.forward(hidden, None, everything, vectors=tables[1].get(VERSION))
    theirs = whole.forward(hidden, None, everything, vectors=tables[0].get(VERSION))
    base = whole.forward(hidden, None, everything)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert (base - theirs).norm() > 0.1 * theirs.norm()
    own = {name: tensor for name, tensor in state.items() if name.startswith("ia3")}
    with pytest.raises(Rejected, match="on other peers"):
        SessionVectors(trunk).read(pack(own), everything, by_row=False)


@torch.inference_mode()
def test_lower_precision_is_as_near_as_that_of_the_whole_model(family: tuple[Checkpoint, Any]) -> None:
    checkpoint, _ = family
    everything, low = Span(0, checkpoint.layers), torch.bfloat16
    trunk = load_stage(checkpoint, everything, low, trunk=True)
    shares = ((0, 1, 5), (2, 3, 4, 6, 7))
    trunk.board.remote = LocalExperts([load_experts(checkpoint, everything, share, low) for share in shares])
    hidden = torch.randn(1, 6, checkpoint.hidden_size, generator=torch.Generator().manual_seed(1))
    exact = load_stage(checkpoint, everything).forward(hidden, None, everything)
    ours = trunk.forward(hidden, None, everything)
    theirs = load_stage(checkpoint, everything, low).forward(hidden, None, everything)
    assert ours.dtype == theirs.dtype == low
    assert (ours.float() - exact).norm() < max(1.5 * (theirs.float() - exact).norm(), 0.02 * exact.norm())


def test_sessions_train_through_a_trunk(tmp_path: Path) -> None:
    save_experts("deepseek_v3", tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    everything, codec = Span(0, checkpoint.layers), get_codec("fp32")
    whole, trunk = load_stage(checkpoint, everything), load_stage(checkpoint, everything, trunk=True)
    generator = torch.Generator().manual_seed(5)
    hidden, outer = (torch.randn(1, 8, checkpoint.hidden_size, generator=generator) for _ in range(2))
    slot = next(s for s in ia3.find_slots(trunk.base))
    vectors = pack({slot.name: torch.ones(slot.shape) + 0.1})
    answers = []
    for stage in (whole, trunk):
        table = VersionTable(stage)
        table.put(VERSION, {})
        runner = Runner(stage, VERSION, table, max_cached_tokens=64)
        if stage is trunk:
            stage.board.remote = LocalExperts(load_shards(checkpoint, 2))
        request = SessionRequest("0" * 32, VERSION, VERSION, "fp32", everything, 4, rows=2, training=True)
        handle = runner.open(request)
        runner.load(handle, vectors)
        meta = Microbatch(2, inputs=True).encode()
        (output,) = runner.step([(handle, 0, meta, codec.encode(hidden))])
        assert not isinstance(output, Exception | Noted)
        gradients = runner.backward(handle, 0, codec.encode(outer))
        answers.append([torch.frombuffer(bytearray(part), dtype=torch.float32) for part in (output, gradients)])
        runner.close(handle)
    for ours, theirs in zip(*answers, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
