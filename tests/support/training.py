"""What tests of training start from: a tokenizer of bytes, a small model, and patches trained of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from p2pmodel.engine.data import Parts, load, split
from p2pmodel.engine.training.loop import Trained, train
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.engine.training.trainees import new_trainee
from p2pmodel.tensors.patch_kind import KindOptions

PROSE = "the quick brown fox jumps over the lazy dog and runs away. "
END = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(eos: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte; `<end>`, the 257th, begins and ends texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner, **({"eos_token": "<end>", "bos_token": "<end>"} if eos else {})
    )
    tokenizer.chat_template = template
    return tokenizer


def small_model(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": END,
        "eos_token_id": END,
    }
    return LlamaForCausalLM(LlamaConfig(**fields | changes))


def prose_parts(folder: Path, tokenizer: PreTrainedTokenizerFast, sequence: int = 32) -> Parts:
    file = folder / "prose.txt"
    file.write_text(PROSE * 60)
    return split(load([file], tokenizer), sequence=sequence, seed=0)


def trained_patch(
    model: LlamaForCausalLM,
    parent: Mapping[str, torch.Tensor],
    parts: Parts,
    options: TrainingOptions,
    kind: str = "ia3@1",
    **more: Any,
) -> Trained:
    trainee = new_trainee(model, kind, parent, parts.train, KindOptions(density=0.02, rank=2), options.seed)
    try:
        return train(model, trainee, parts.train, parts.held_out, options, **more)
    finally:
        trainee.remove()
