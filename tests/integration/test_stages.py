"""Stages and head against the whole model, family by family, bit by bit; and what is refused.

The chain runs in this process, but through the runners' bytes: what a stream would carry is what is computed with.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from p2pmodel.domain.errors import Busy, InvalidInput, NotFound, PeerFailed, Rejected, UsageError
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.swarm import SessionRequest, Span
from p2pmodel.engine.checkpoint import Checkpoint, load_whole, read_checkpoint
from p2pmodel.engine.head import NO_VECTORS, RemoteCache, RemoteTape, load_head, using_vectors
from p2pmodel.engine.runner import InferenceSession, Runner
from p2pmodel.engine.stage import Stage, load_stage
from p2pmodel.engine.steps import Note
from p2pmodel.engine.versions import VersionTable, slot_layer
from p2pmodel.tensors import ia3
from p2pmodel.tensors.blob import pack
from p2pmodel.tensors.codecs import get_codec
from p2pmodel.wire import canonical

MODEL = BASE = canonical.digest(b"model")
TUNED = canonical.digest(b"tuned")
VOCABULARY, WIDTH, LAYERS = 96, 32, 3

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON = SPECIAL | {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT = SPECIAL | {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
BLOOM = SPECIAL | {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4}
WINDOWS = {
    "head_dim": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "mistral": COMMON | {"sliding_window": 4},
    "qwen2": COMMON,
    "qwen3": COMMON | {"head_dim": 8},
    "gemma": COMMON | {"head_dim": 8},
    "gemma2": COMMON | WINDOWS,
    "gemma3_text": COMMON | WINDOWS,
    "phi3": COMMON,
    "olmo2": COMMON,
    "granite": COMMON,
    "cohere": COMMON,
    "stablelm": COMMON,
    "gpt_neox": COMMON,
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "codegen": GPT | {"rotary_dim": 4, "n_head": 4},
    "opt": COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "falcon": COMMON,
    "bloom": BLOOM,
    "mpt": {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": 4},
    "mixtral": COMMON | EXPERTS,
    "qwen3_moe": COMMON | EXPERTS | {"head_dim": 8},
    "deepseek_v3": COMMON | EXPERTS | LATENT,
    "mamba": COMMON | {"state_size": 4},
}
TUNABLE = ("llama", "gemma2", "gpt_neox", "gpt2", "opt", "falcon", "bloom", "mixtral")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"": tmp_path_factory.mktemp("checkpoints")}


@pytest.fixture
def llama(folders: dict[str, Path]) -> Path:
    return saved("llama", folders)


def saved(family: str, folders: dict[str, Path]) -> Path:
    """A random checkpoint of the family, made once."""
    if family not in folders:
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
        for parameter in model.parameters():
            if parameter.ndim > 1:  # as they come, weights are so small that every token is like the next
                torch.nn.init.normal_(parameter, std=0.2)
        folders[family] = folders[""] / family
        model.save_pretrained(folders[family])
    return folders[family]


@dataclass
class LocalChain:
    """Stages in this process, each behind its runner."""

    runners: list[Runner]
    spans: list[Span]
    version: Digest = BASE
    codec: str = "fp32"
    open_sessions: list["LocalSession"] = field(default_factory=list)

    def open(
        self, max_tokens: int, rows: int = 1, rewinds: bool = False, vectors: Mapping[str, Tensor] = NO_VECTORS
    ) -> "LocalSession":
        handles: list[Any] = [
            runner.open(request(span, max_tokens, self.version, self.codec, rows=rows, rewinds=rewinds))
            for runner, span in zip(self.runners, self.spans, strict=True)
        ]
        if vectors:
            for runner, handle in zip(self.runners, handles, strict=True):
                runner.load(handle, pack(vectors))
        session = LocalSession(self, handles, rows)
        self.open_sessions.append(session)
        return session

    def tape(self) -> RemoteTape:
        raise AssertionError("nothing is trained here")

    def close(self) -> None:
        assert not self.open_sessions


@dataclass
class LocalSession:
    chain: LocalChain
    handles: list[InferenceSession]
    rows: int

    def forward(self, hidden: Tensor, position: int, note: Note) -> Tensor:
        codec, width = get_codec(self.chain.codec), hidden.shape[-1]
        body: Any = codec.encode(hidden.reshape(1, -1, width))
        for runner, handle in zip(self.chain.runners, self.handles, strict=True):
            (body,) = runner.step([(handle, position, note.encode(), body)])
            if isinstance(body, Exception):
                raise body
        count = memoryview(body).nbytes // codec.size(1, width)
        return codec.decode(body, count, width).float().view(self.rows, -1, width)

    def close(self) -> None:
        self.chain.open_sessions.remove(self)
        for runner, handle in zip(self.chain.runners, self.handles, strict=True):
            runner.close(handle)


def request(
    span: Span,
    max_tokens: int = 32,
    version: Digest = BASE,
    codec: str = "fp32",
    model: Digest = MODEL,
    *,
    rows: int = 1,
    rewinds: bool = False,
) -> SessionRequest:
    return SessionRequest("0" * 32, model, version, codec, span, max_tokens, rows, rewinds)


def runner_of(stage: Stage, state: dict[str, Tensor] | None = None, room: int = 256) -> Runner:
    versions = VersionTable(stage)
    versions.put(BASE, {})
    versions.put(TUNED, state or {})
    return Runner(stage, MODEL, versions, max_cached_tokens=room)


def chain_of(checkpoint: Checkpoint, *cuts: int, state: dict[str, Tensor] | None = None, **options: Any) -> LocalChain:
    ends = [*cuts, checkpoint.layers]
    spans = [Span(start, end) for start, end in zip([0, *cuts], ends, strict=True)]
    return LocalChain([runner_of(load_stage(checkpoint, span), state) for span in spans], spans, **options)


def prompt(length: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))


def logits(model: PreTrainedModel, cache: Any, name: str = "past_key_values") -> list[Tensor]:
    """Of a prompt, of single tokens after it, and of several at once after those."""
    parts = [prompt(7), prompt(1), prompt(1) + 1, prompt(5), prompt(1)]
    with torch.inference_mode():
        return [model(input_ids=part, use_cache=True, **{name: cache}).logits for part in parts]


def generated(model: PreTrainedModel) -> list[int]:
    tokens: Tensor = model.generate(prompt(), max_new_tokens=16, min_new_tokens=16, do_sample=False)
    return tokens[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_compute_what_the_whole_model_computes(family: str, folders: dict[str, Path]) -> None:
    checkpoint = read_checkpoint(saved(family, folders))
    whole = load_whole(checkpoint.path)
    name = "cache_params" if family == "mamba" else "past_key_values"
    expected, tokens = logits(whole, DynamicCache(config=whole.config), name), generated(whole)
    with torch.inference_mode():
        stateless = whole(input_ids=prompt()).logits
    for cuts in ((1,), (1, 2)):
        chain = chain_of(checkpoint, *cuts)
        head = load_head(checkpoint, chain)
        cache = RemoteCache(chain, 32)
        for ours, theirs in zip(logits(head, cache, name), expected, strict=True):
            assert torch.equal(ours, theirs)
        cache.close()
        with torch.inference_mode():
            assert torch.equal(head(input_ids=prompt()).logits, stateless)
        assert generated(head) == tokens
        assert not chain.open_sessions
        assert all(runner.cached_tokens == 0 for runner in chain.runners)


@pytest.mark.parametrize("family", TUNABLE)
def test_a_version_of_vectors_is_applied_by_the_stages(family: str, folders: dict[str, Path]) -> None:
    checkpoint = read_checkpoint(saved(family, folders))
    whole = load_whole(checkpoint.path)
    slots = ia3.find_slots(whole.base_model)
    generator = torch.Generator().manual_seed(1)
    state = {slot.name: torch.rand(slot.shape, generator=generator) + 0.5 for slot in slots}
    assert {slot_layer(slot.name, checkpoint.stack) for slot in slots} == set(range(LAYERS))
    plain = logits(whole, DynamicCache(config=whole.config))
    with ia3.Applier(whole.base_model, [slot.name for slot in slots]).use(state):
        tuned = logits(whole, DynamicCache(config=whole.config))
    assert not torch.equal(plain[0], tuned[0])
    chain = chain_of(checkpoint, 1, 2, state=state)
    head = load_head(checkpoint, chain)
    for version, expected in ((TUNED, tuned), (BASE, plain)):
        chain.version = version
        for ours, theirs in zip(logits(head, RemoteCache(chain, 32)), expected, strict=True):
            assert torch.equal(ours, theirs)
    # The same vectors, brought along by a session that nobody else has to have a version for.
    for ours, theirs in zip(logits(head, RemoteCache(chain, 32, vectors=state)), tuned, strict=True):
        assert torch.equal(ours, theirs)
    with torch.inference_mode(), using_vectors(state):
        assert torch.equal(head(input_ids=prompt(7)).logits, tuned[0])


def test_a_session_may_run_a_part_of_what_is_hosted(llama: Path) -> None:
    checkpoint = read_checkpoint(llama)
    whole, runner = load_whole(llama), runner_of(load_stage(checkpoint, Span(0, LAYERS)))
    expected = logits(whole, DynamicCache(config=whole.config))
    spans = [Span(0, 1), Span(1, 3)]
    chains = [LocalChain([runner, runner], spans), LocalChain([runner], [Span(0, LAYERS)])]
    head = load_head(checkpoint, chains[0])
    caches = [RemoteCache(chain, 32) for chain in chains]
    for part, theirs in zip([prompt(7), prompt(1), prompt(1) + 1, prompt(5), prompt(1)], expected, strict=True):
        for cache in caches:  # in turns, so that the stage goes from span to span
            assert torch.equal(head(input_ids=part, past_key_values=cache, use_cache=True).logits, theirs)
    assert runner.cached_tokens == 3 * 32


def test_rows_with_padding_and_vectors_of_their_own_are_computed_together(llama: Path) -> None:
    checkpoint = read_checkpoint(llama)
    whole, stages = load_whole(llama), [load_stage(checkpoint, span) for span in (Span(0, 1), Span(1, LAYERS))]
    tokens = torch.cat([prompt(7), prompt(7) + 1])
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    slots = ia3.find_slots(whole.base_model)
    state = {slot.name: torch.rand(2, *slot.shape, generator=torch.Generator().manual_seed(2)) + 0.5 for slot in slots}
    with torch.inference_mode(), ia3.Applier(whole.base_model, [slot.name for slot in slots]).use(state):
        expected = whole.base_model(input_ids=tokens, attention_mask=mask, position_ids=positions).last_hidden_state
    with torch.inference_mode():
        hidden = whole.get_input_embeddings()(tokens)
        for stage in stages:
            stage.prepare_slots(frozenset(state))
            hidden = stage.forward(hidden, None, stage.span, position_ids=positions, attention_mask=mask, vectors=state)
        assert torch.equal(whole.base_model.norm(hidden), expected)


def test_gradients_flow_through_a_stage(llama: Path) -> None:
    stage = load_stage(read_checkpoint(llama), Span(0, 2))
    slot = "ia3:out:layers.1.self_attn.v_proj"
    stage.prepare_slots(frozenset({slot}))
    hidden = torch.randn(1, 5, WIDTH, requires_grad=True)
    vector = torch.ones(WIDTH // 2, requires_grad=True)
    stage.forward(hidden, None, stage.span, vectors={slot: vector}).square().sum().backward()
    for grad in (hidden.grad, vector.grad):
        assert grad is not None
        assert grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in stage.base.parameters())


@pytest.mark.parametrize("codec", ["bf16", "fp16"])
def test_a_coarser_codec_and_dtype_stay_close(codec: str, llama: Path) -> None:
    checkpoint = read_checkpoint(llama)
    stages = [load_stage(checkpoint, span, torch.bfloat16) for span in (Span(0, 1), Span(1, LAYERS))]
    chain = LocalChain([runner_of(stage) for stage in stages], [stage.span for stage in stages], codec=codec)
    with torch.inference_mode():
        theirs = load_whole(llama)(input_ids=prompt(12)).logits
        ours = load_head(checkpoint, chain)(input_ids=prompt(12)).logits
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.99


def test_a_conversation_goes_on_in_its_session(llama: Path) -> None:
    checkpoint = read_checkpoint(llama)
    whole, chain = load_whole(llama), chain_of(checkpoint, 1)
    head, cache = load_head(checkpoint, chain), RemoteCache(chain, 32)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    first = head.generate(prompt(), past_key_values=cache, **options)
    assert len(chain.open_sessions) == 1
    again = torch.cat([first, prompt(3)], dim=1)
    assert torch.equal(head.generate(again, past_key_values=cache, **options), whole.generate(again, **options))
    cache.close()
    cache.close()
    assert not chain.open_sessions


def test_threads_share_a_head(llama: Path) -> None:
    checkpoint = read_checkpoint(llama)
    chain = chain_of(checkpoint, 1)
    head, expected = load_head(checkpoint, chain), generated(load_whole(llama))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(generated, [head] * 8)) == [expected] * 8
    assert not chain.open_sessions


def test_a_cache_that_is_forgotten_closes_its_session(llama: Path) -> None:
    chain = chain_of(read_checkpoint(llama), 1)
    RemoteCache(chain, 32).forward(torch.zeros(1, 2, WIDTH))
    assert not chain.open_sessions


def test_what_the_swarm_cannot_do_is_refused_before_it_is_wrong(llama: Path) -> None:
    checkpoint = read_checkpoint(llama)
    chain = chain_of(checkpoint, 1)
    head = load_head(checkpoint, chain)
    with pytest.raises(UsageError, match="masks of rows"):
        head(input_ids=prompt(3), attention_mask=torch.ones(1, 1, 3, 3))
    cache = RemoteCache(chain, 8)
    with pytest.raises(UsageError, match="gradients"):
        head(inputs_embeds=torch.zeros(1, 3, WIDTH, requires_grad=True), past_key_values=cache, use_cache=True)
    with pytest.raises(UsageError, match="DynamicCache"):
        head(input_ids=prompt(3), past_key_values=DynamicCache(), use_cache=True)


def test_an_answer_that_is_none_is_the_peers_failure(llama: Path) -> None:
    class Wrong:
        def __init__(self, answer: Tensor) -> None:
            self.answer = answer

        def open(
            self, max_tokens: int, rows: int, rewinds: bool, vectors: Mapping[str, Tensor] = NO_VECTORS
        ) -> "Wrong":
            return self

        def tape(self) -> RemoteTape:
            raise AssertionError("nothing is trained here")

        def forward(self, hidden: Tensor, position: int, note: Note) -> Tensor:
            return self.answer

        def close(self) -> None:
            pass

    for answer in (torch.full((1, 7, WIDTH), torch.nan), torch.zeros(1, 6, WIDTH)):
        head = load_head(read_checkpoint(llama), Wrong(answer))
        with pytest.raises(PeerFailed):
            head(input_ids=prompt(7))


def test_a_runner_refuses_sessions_it_cannot_hold(llama: Path) -> None:
    runner = runner_of(load_stage(read_checkpoint(llama), Span(1, LAYERS)), room=40)
    for refused, error in (
        (request(Span(1, 2), model=canonical.digest(b"other")), NotFound),
        (request(Span(0, 2)), NotFound),
        (request(Span(1, 2), version=canonical.digest(b"unknown")), NotFound),
        (request(Span(1, 2), codec="zip"), InvalidInput),
        (request(Span(1, 2), max_tokens=65), Rejected),
        (request(Span(1, 2), max_tokens=41), Busy),
    ):
        with pytest.raises(error):
            runner.open(refused)
    assert runner.cached_tokens == 0
    first = runner.open(request(Span(1, 2), max_tokens=30))
    with pytest.raises(Busy):
        runner.open(request(Span(1, 2), max_tokens=11))
    runner.close(first)
    runner.close(runner.open(request(Span(1, 2), max_tokens=40)))
    assert runner.cached_tokens == 0


def test_a_bad_step_ends_its_own_session_and_no_other(llama: Path) -> None:
    runner = runner_of(load_stage(read_checkpoint(llama), Span(0, LAYERS)))
    good: Any = runner.open(request(Span(0, LAYERS), max_tokens=8))
    body = torch.ones(2, WIDTH).numpy().tobytes()
    nan = torch.full((1, WIDTH), torch.nan).numpy().tobytes()
    for position, meta, wrong in (
        (0, b"", body[:-1]),
        (0, b"", b""),
        (1, b"", body),
        (0, b"\x80", body),
        (0, b"", nan),
        (0, b"", body * 5),
    ):
        bad = runner.open(request(Span(0, LAYERS), max_tokens=8))
        outputs = runner.step([(bad, position, meta, wrong), (good, good.cache.seen, b"", body[: 4 * WIDTH])])
        assert isinstance(outputs[0], Rejected)
        assert not isinstance(outputs[1], Exception)
        runner.close(bad)
    assert good.cache.seen == 6


def test_a_session_keeps_its_version_to_its_end(llama: Path) -> None:
    stage = load_stage(read_checkpoint(llama), Span(0, 2))
    here, elsewhere = "ia3:in:layers.1.mlp.down_proj", "ia3:in:layers.2.mlp.down_proj"
    versions = VersionTable(stage)
    versions.put(BASE, {})
    versions.put(TUNED, {here: torch.full((48,), 2.0), elsewhere: torch.zeros(48)})
    assert set(versions.get(TUNED)) == {here}
    assert versions.versions == (BASE, TUNED)
    runner = Runner(stage, MODEL, versions, max_cached_tokens=64)
    old, new = (runner.open(request(Span(0, 2), 8, TUNED)) for _ in range(2))
    body = torch.ones(1, WIDTH).numpy().tobytes()
    (before,) = runner.step([(old, 0, b"", body)])
    versions.drop(TUNED)
    (after,) = runner.step([(new, 0, b"", body)])
    assert bytes(before) == bytes(after)  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        runner.open(request(Span(0, 2), 8, TUNED))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("ia3:out:layers.0.self_attn.z_proj", torch.ones(4)),
        ("ia3:out:layers.0.self_attn.k_proj", torch.ones(2, 16)),
        ("fish:layers.0.self_attn.k_proj", torch.ones(16)),
        ("ia3:out:layers.0.self_attn.k_proj", torch.ones(3)),
        ("ia3:out:layers.0.self_attn.k_proj", torch.full((16,), torch.inf)),
        ("ia3:out:layers.0.self_attn.k_proj", torch.ones(16, dtype=torch.long)),
    ],
)
def test_a_version_that_does_not_fit_the_model_is_refused(name: str, tensor: Tensor, llama: Path) -> None:
    versions = VersionTable(load_stage(read_checkpoint(llama), Span(0, 1)))
    with pytest.raises(Rejected):
        versions.put(TUNED, {name: tensor})
    assert versions.versions == ()


def test_a_runner_measures_itself(llama: Path) -> None:
    runner = runner_of(load_stage(read_checkpoint(llama), Span(0, 2)))
    assert 0 < runner.measure() < 1
    assert runner.cached_tokens == 0
