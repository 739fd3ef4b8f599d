"""The families that most models belong to, in two and three stages, bit by bit; and what cannot be split is refused.

`scripts/sweep_families.py` does this with every type that transformers has, and writes docs/models.md.
"""

from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.domain.swarm import Span
from p2pmodel.engine.checkpoint import Checkpoint, load_whole, read_checkpoint
from p2pmodel.engine.head import load_head
from p2pmodel.engine.memory import measure_cache
from p2pmodel.engine.stage import load_stage
from tests.support import stage_checks as checks
from tests.support.families import REQUIRED, save_small

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_small("llama", folder)
    return folder


@pytest.mark.parametrize("kind", REQUIRED)
def test_stages_compute_what_the_whole_model_computes(kind: str, tmp_path: Path) -> None:
    save_small(kind, tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    # Kernels are chosen by whether a gradient may be asked for, and round differently.
    whole = load_whole(tmp_path).requires_grad_(False)
    chains = [checks.load_chain(checkpoint, stages) for stages in (2, 3)]
    heads = [load_head(checkpoint, chain) for chain in chains]
    for chain, head in zip(chains, heads, strict=True):
        checks.check_prefill(whole, head)
        checks.check_cached(whole, head, chain)
        checks.check_rows(whole, chain.stages)
        assert not chain.open_sessions
    checks.check_greedy(whole, heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "mamba2", "gpt_oss"])
def test_spans_are_computed_in_less_than_fp32(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_small(kind, tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    checks.check_half([load_stage(checkpoint, span, dtype) for span in checks.spans_of(checkpoint, 2)])


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("openai-gpt", {}, "keep nothing of the tokens that they have seen"),
        ("cpmant", {}, "cannot be split into stages"),
        ("deepseek_v4", {}, "cannot be split into stages"),
        ("zamba2", {}, "use the embeddings"),
        ("bart", {}, "lack"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, "that is elsewhere"),
        ("gemma4_text", {"num_kv_shared_layers": 2}, "cannot be split into stages"),
        ("recurrent_gemma", {}, "keep nothing of the tokens that they have seen"),
    ],
)
def test_types_that_cannot_be_split_are_refused(
    kind: str, changes: dict[str, int], sentence: str, tmp_path: Path
) -> None:
    save_small(kind, tmp_path, **changes)
    checkpoint = read_checkpoint(tmp_path)
    with pytest.raises(InvalidInput, match=sentence):
        for_each_layer(checkpoint)


def for_each_layer(checkpoint: Checkpoint) -> None:
    """Some layers of a type that cannot be split can be alone."""
    for layer in range(checkpoint.layers):
        load_stage(checkpoint, Span(layer, layer + 1))


class Sharing(LlamaDecoderLayer):
    """Leaves what it got in the cache, for the layer behind it, as families that share keys and values do."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        past_key_values = kwargs["past_key_values"]
        left = getattr(past_key_values, "left", None)
        if past_key_values is not None:
            past_key_values.left = hidden_states
        if left is not None and left.shape == hidden_states.shape:
            hidden_states = hidden_states + left
        output: torch.Tensor = super().forward(hidden_states, **kwargs)
        return output


class Embedded(LlamaDecoderLayer):
    """Adds the token's embedding in every layer, as families with inputs per layer do."""

    embeddings: ClassVar[list[torch.Tensor]] = []

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = super().forward(hidden_states + self.embeddings[-1], *args, **kwargs)
        return output


def test_layers_that_tell_each_other_more_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaDecoderLayer", Sharing)
    with pytest.raises(InvalidInput, match="tell each other more than the hidden states"):
        load_stage(read_checkpoint(llama), Span(0, 3))


def test_layers_that_use_the_embeddings_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remember(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        Embedded.embeddings[:] = [kwargs["inputs_embeds"]]

    plain = LlamaModel.__init__

    def init(self: LlamaModel, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.register_forward_pre_hook(remember, with_kwargs=True)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaDecoderLayer", Embedded)
    monkeypatch.setattr(LlamaModel, "__init__", init)
    with pytest.raises(InvalidInput, match="use the embeddings"):
        load_stage(read_checkpoint(llama), Span(1, 2))


def test_layers_that_run_twice_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LlamaModel.__init__

    def init(self: LlamaModel, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        once = self.forward

        @wraps(once)
        def forward(**inputs: Any) -> Any:
            return once(**inputs | {"inputs_embeds": once(**inputs).last_hidden_state})

        vars(self)["forward"] = forward

    monkeypatch.setattr(LlamaModel, "__init__", init)
    with pytest.raises(InvalidInput, match="once each"):
        load_stage(read_checkpoint(llama), Span(1, 2))


def test_the_memory_of_a_session_is_measured(llama: Path, tmp_path: Path) -> None:
    cost = measure_cache(load_stage(read_checkpoint(llama), Span(1, 3)))
    keys_and_values, heads, width, size = 2, 2, 8, 4
    assert cost.per_token == 2 * keys_and_values * heads * width * size
    assert cost.fixed == 0
    assert cost.tokens_in(1 << 20) == (1 << 20) // int(cost.per_token)
    save_small("mamba2", tmp_path)
    cost = measure_cache(load_stage(read_checkpoint(tmp_path), Span(0, 2)))
    assert cost.per_token == 0
    assert cost.fixed > 0
    assert cost.tokens_in(1) == 1
