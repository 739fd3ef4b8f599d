"""Training through stages against training the whole model: the same gradients, whatever the family."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain.errors import NotFound, Rejected
from p2pmodel.domain.ids import Digest, ModelId, VersionId
from p2pmodel.domain.swarm import SessionRequest, Span
from p2pmodel.engine.checkpoint import Checkpoint, load_whole, read_checkpoint
from p2pmodel.engine.evaluation import attached
from p2pmodel.engine.head import NO_VECTORS, RemoteSession, load_head, using_vectors
from p2pmodel.engine.runner import Runner
from p2pmodel.engine.stage import load_stage
from p2pmodel.engine.steps import Microbatch
from p2pmodel.engine.tuning import split_gradients
from p2pmodel.engine.versions import VersionTable, slot_layer
from p2pmodel.tensors import ia3
from p2pmodel.tensors.blob import pack
from p2pmodel.tensors.codecs import get_codec
from p2pmodel.tensors.kinds import get_kind
from tests.support.families import LAYERS, REQUIRED, VOCABULARY, save_small

MODEL = ModelId(Digest("aa" * 32))
ROWS, TOKENS = 3, 9
CUTS = (0, 1, LAYERS)
"""Of two stages."""


class Chain:
    """Implements `engine.head.RemoteChain`, and its tape, by calling runners one after another with bytes."""

    def __init__(self, runners: Sequence[Runner], spans: Sequence[Span], stack: str, codec: str = "fp32") -> None:
        self.runners, self.spans, self.stack, self.codec = runners, spans, stack, get_codec(codec)
        self.handles: list[Any] = [
            runner.open(SessionRequest("0" * 32, MODEL, VersionId(MODEL), codec, span, TOKENS, ROWS, training=True))
            for runner, span in zip(runners, spans, strict=True)
        ]
        self.number = 0

    def open(
        self, max_tokens: int, rows: int, rewinds: bool, vectors: Mapping[str, Tensor] = NO_VECTORS
    ) -> RemoteSession:
        raise AssertionError("nothing is generated here")

    def tape(self) -> "Chain":
        return self

    def close(self) -> None:
        for runner, handle in zip(self.runners, self.handles, strict=True):
            runner.close(handle)

    def forward(self, hidden: Tensor, microbatch: Microbatch, vectors: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        self.number += 1
        body: Any = self.codec.encode(hidden.reshape(1, -1, hidden.shape[2]))
        for runner, handle in zip(self.runners, self.handles, strict=True):
            runner.load(handle, pack(vectors))
            body = runner.step([(handle, self.number, microbatch.encode(), body)])[0]
            if isinstance(body, Exception):
                raise body
        count = hidden.shape[0] * hidden.shape[1]
        output = self.codec.decode(body, count, hidden.shape[2]).float().view(hidden.shape)
        shapes = {name: tuple(vector.shape) for name, vector in vectors.items()}
        return output, (self.number, hidden.shape if microbatch.inputs else None, shapes)

    def backward(self, ticket: Any, gradient: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        number, hidden, shapes = ticket
        body: Any = self.codec.encode(gradient.reshape(1, -1, gradient.shape[2]))
        for runner, handle in reversed(list(zip(self.runners, self.handles, strict=True))):
            body = runner.backward(handle, number, body)
        layers = {name: slot_layer(name, self.stack) for name in sorted(shapes)}
        order = [name for span in reversed(self.spans) for name in layers if layers[name] in span]
        return split_gradients(body, self.codec, hidden, {name: shapes[name] for name in order})


def make_chain(checkpoint: Checkpoint, cuts: Sequence[int] = CUTS, max_graph_bytes: int = 1 << 30) -> Chain:
    spans = [Span(a, b) for a, b in pairwise(cuts)]
    runners = []
    for span in spans:
        stage = load_stage(checkpoint, span)
        table = VersionTable(stage)
        table.put(VersionId(MODEL), {})
        runners.append(Runner(stage, MODEL, table, max_cached_tokens=1 << 12, max_graph_bytes=max_graph_bytes))
    return Chain(runners, spans, checkpoint.stack)


def a_state(slots: Sequence[Any], rows: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = () if rows is None else (rows,)
    return {
        slot.name: (1 + 0.1 * torch.randn(*shape, *slot.shape, generator=generator)).requires_grad_(True)
        for slot in slots
    }


def some_ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(5))


def whole_gradients(model: PreTrainedModel, state: dict[str, Tensor], **inputs: Any) -> tuple[float, list[Tensor]]:
    with attached(model, get_kind("ia3@1"), state) as applier, applier.use(state):
        loss = model(**inputs, use_cache=False).loss
    return loss.item(), list(torch.autograd.grad(loss, list(state.values()), materialize_grads=True))


def remote_gradients(model: PreTrainedModel, state: dict[str, Tensor], **inputs: Any) -> tuple[float, list[Tensor]]:
    with using_vectors(state):
        loss = model(**inputs).loss
    return loss.item(), list(torch.autograd.grad(loss, list(state.values()), materialize_grads=True))


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    a = torch.cat([torch.zeros(0) if t is None else t.flatten() for t in ours])
    b = torch.cat(
        [torch.zeros_like(o).flatten() if t is None else t.flatten() for o, t in zip(ours, theirs, strict=True)]
    )
    assert float((a - b).norm()) <= tolerance * float(b.norm()), f"{float((a - b).norm() / b.norm()):.2e}"
    assert float(b.norm()) > 0


@pytest.mark.parametrize("family", REQUIRED)
def test_gradients_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    save_small(family, tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    whole = load_whole(tmp_path).requires_grad_(False)
    try:
        slots = ia3.find_slots(whole.base_model)
    except Exception as error:  # families without attention have no slots
        pytest.skip(str(error))
    state, ids = a_state(slots), some_ids()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    chain = make_chain(checkpoint)
    model = load_head(checkpoint, chain)
    for inputs in ({"input_ids": ids, "labels": ids}, {"input_ids": ids, "labels": ids, "attention_mask": mask}):
        ours, theirs = remote_gradients(model, state, **inputs), whole_gradients(whole, state, **inputs)
        assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
        assert_close(ours[1], theirs[1], 1e-6)
    chain.close()


NOT_IN_PEFT = {"phi3", "olmo2", "deepseek_v3", "gpt_oss", "mamba2", "jamba", "mixtral"}
"""Those that it has no (IA)³ targets for; of Mixtral it has, but not of its experts' stacked weights."""


@pytest.mark.parametrize("family", [family for family in REQUIRED if family not in NOT_IN_PEFT])
def test_gradients_are_those_of_peft(family: str, tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model

    save_small(family, tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    whole = load_whole(tmp_path)
    state, ids = a_state(ia3.find_slots(whole.base_model)), some_ids()
    chain = make_chain(checkpoint)
    ours = remote_gradients(load_head(checkpoint, chain), state, input_ids=ids, labels=ids)
    chain.close()

    paths = {name: name.removeprefix(ia3.OUT).removeprefix(ia3.IN) for name in state}
    inward = [paths[name] for name in state if name.startswith(ia3.IN)]
    config = IA3Config(task_type="CAUSAL_LM", target_modules=list(paths.values()), feedforward_modules=inward)
    tuned = get_peft_model(whole, config)
    base: Any = whole.base_model  # whose modules PEFT has wrapped in place
    vectors = [base.get_submodule(paths[name]).ia3_l["default"] for name in state]
    for vector, value in zip(vectors, state.values(), strict=True):
        vector.data = value.detach().reshape(vector.shape).clone()
    loss = tuned(input_ids=ids, labels=ids, use_cache=False).loss
    theirs = torch.autograd.grad(loss, vectors)
    assert ours[0] == pytest.approx(loss.item(), rel=1e-6)
    assert_close(ours[1], [g.reshape(t.shape) for g, t in zip(theirs, ours[1], strict=True)], 1e-6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("llama")
    save_small("llama", folder)
    return read_checkpoint(folder), load_whole(folder).requires_grad_(False)


def test_what_was_dropped_is_computed_again(llama: tuple[Checkpoint, PreTrainedModel]) -> None:
    checkpoint, whole = llama
    state, ids = a_state(ia3.find_slots(whole.base_model)), some_ids()
    room = ROWS * TOKENS * checkpoint.hidden_size * 4
    chain = make_chain(checkpoint, max_graph_bytes=2 * room)
    model = load_head(checkpoint, chain)
    ours = remote_gradients(model, state, input_ids=ids, labels=ids)
    assert_close(ours[1], whole_gradients(whole, state, input_ids=ids, labels=ids)[1], 1e-6)
    assert [runner._tuner._tape.recomputed for runner in chain.runners] == [1, 1]
    assert [runner.graph_bytes for runner in chain.runners] == [0, 0]


def test_a_client_that_never_asks_for_gradients_fills_no_memory(llama: tuple[Checkpoint, PreTrainedModel]) -> None:
    checkpoint, whole = llama
    state = a_state(ia3.find_slots(whole.base_model))
    room = ROWS * TOKENS * checkpoint.hidden_size * 4
    chain = make_chain(checkpoint, max_graph_bytes=4 * room)
    hidden = torch.randn(ROWS, TOKENS, checkpoint.hidden_size)
    tickets = [chain.forward(hidden, Microbatch(ROWS), state)[1] for _ in range(20)]
    assert all(runner.graph_bytes <= 4 * room for runner in chain.runners)
    chain.backward(tickets[-1], hidden)
    with pytest.raises(NotFound, match="not kept"):
        chain.backward(tickets[0], hidden)
    chain.close()
    assert [runner.graph_bytes for runner in chain.runners] == [0, 0]


def test_every_row_can_have_vectors_of_its_own(llama: tuple[Checkpoint, PreTrainedModel]) -> None:
    checkpoint, whole = llama
    slots, ids = ia3.find_slots(whole.base_model), some_ids()
    by_row = a_state(slots, ROWS)
    chain = make_chain(checkpoint)
    _, ours = remote_gradients(load_head(checkpoint, chain), by_row, input_ids=ids, labels=ids)
    for row in range(ROWS):
        alone = {name: vector[row].detach().requires_grad_(True) for name, vector in by_row.items()}
        one = ids[row : row + 1]
        _, theirs = whole_gradients(whole, alone, input_ids=one, labels=one)
        assert_close([gradient[row] * ROWS for gradient in ours], theirs, 1e-5)


def test_what_goes_in_has_gradients_too(llama: tuple[Checkpoint, PreTrainedModel]) -> None:
    checkpoint, whole = llama
    ids = some_ids()
    model = load_head(checkpoint, make_chain(checkpoint))
    gradients = []
    for one in (model, whole):
        embeddings = one.get_input_embeddings()(ids).detach().requires_grad_(True)
        loss = one(inputs_embeds=embeddings, labels=ids).loss
        gradients.append(torch.autograd.grad(loss, embeddings)[0])
    assert_close([gradients[0]], [gradients[1]], 1e-6)


def test_lossy_codecs_keep_the_direction(llama: tuple[Checkpoint, PreTrainedModel]) -> None:
    checkpoint, whole = llama
    state, ids = a_state(ia3.find_slots(whole.base_model)), some_ids()
    exact = torch.cat([g.flatten() for g in whole_gradients(whole, state, input_ids=ids, labels=ids)[1]])
    for codec in ("bf16", "fp16", "int8"):
        chain = make_chain(checkpoint)
        chain.codec = get_codec(codec)
        for handle in chain.handles:
            handle.codec = chain.codec
        _, ours = remote_gradients(load_head(checkpoint, chain), state, input_ids=ids, labels=ids)
        flat = torch.cat([g.flatten() for g in ours])
        assert float(torch.nn.functional.cosine_similarity(flat, exact, dim=0)) > 0.995, codec


def test_malformed_micro_batches_are_refused(llama: tuple[Checkpoint, PreTrainedModel]) -> None:
    checkpoint, whole = llama
    chain = make_chain(checkpoint, cuts=(0, LAYERS))
    runner, handle = chain.runners[0], chain.handles[0]
    slots = ia3.find_slots(whole.base_model)
    hidden = torch.randn(1, ROWS * TOKENS, checkpoint.hidden_size)
    body, meta = bytes(memoryview(chain.codec.encode(hidden))), Microbatch(ROWS).encode()

    def refused(meta: bytes, body: bytes) -> str:
        (answer,) = runner.step([(handle, 1, meta, body)])
        assert isinstance(answer, Rejected)
        return answer.reason

    assert refused(meta, body[:-1]) == "frame"
    assert refused(meta, b"") == "frame"
    assert refused(Microbatch(2).encode(), body) == "frame"
    assert refused(Microbatch(1).encode(), body) == "frame"  # one row of more tokens than were agreed
    assert refused(b"\xc1", body) == "schema"
    assert refused(meta, body[:-4] + b"\x00\x00\xc0\x7f") == "finite"
    for state, reason in (
        ({"ia3:out:model.layers.0.nothing": torch.ones(4)}, "slot"),
        ({slots[0].name: torch.ones(3)}, "shape"),
        ({slots[0].name: torch.full(slots[0].shape, float("nan"))}, "finite"),
        ({"weight:" + slots[0].name.removeprefix("ia3:out:"): torch.ones(4)}, "slot"),
    ):
        with pytest.raises(Rejected) as caught:
            runner.load(handle, pack(state))
        assert caught.value.reason == reason
    with pytest.raises(NotFound):
        runner.backward(handle, 7, body)
    assert not isinstance(runner.step([(handle, 7, meta, body)])[0], Exception)
    with pytest.raises(Rejected):
        runner.backward(handle, 7, body[:100])
