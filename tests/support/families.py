"""Every type of causal language model that transformers has, as a small random checkpoint.

Configurations are made by shrinking what a type's own defaults say; `SPECIAL_CASES` has what its validators, or its
dimensions, want beside that.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, WIDTH, LAYERS, CONTEXT = 96, 32, 4, 64
MAX_PARAMETERS = 100_000_000

ALL_TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

REQUIRED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "gpt_neox",
    "gpt2",
    "opt",
    "falcon",
    "bloom",
    "deepseek_v3",
    "gpt_oss",
    "mixtral",
    "mamba2",
    "jamba",
)
"""Those that every change is tried with; `scripts/sweep_families.py` tries all."""

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "is_decoder": True,
    "hidden_size": WIDTH,
    "n_embd": WIDTH,
    "d_model": WIDTH,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "max_position_embeddings": CONTEXT,
    "n_positions": CONTEXT,
    "sliding_window": 4,
    "attention_chunk_size": 8,
    "state_size": 4,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "zero_expert_num": 2,
    "moe_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 48,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "lru_width": WIDTH,
    "embedding_size": WIDTH,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCABULARY,
}
"""Taken over where the type's configuration has a field of that name."""

LATENT = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8} | {
    "num_key_value_heads": 4,
    "head_dim": 4,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA2 = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}

SPECIAL_CASES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu", "bailing_hybrid"),
        LATENT,
    ),
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa"), LATENT | {"index_head_dim": 8}),
    "dots3_note_text": LATENT,
    "xmod": {"default_language": "en_XX"},
    "kimi_linear": LATENT,
    "hy_v4": LATENT | {"head_dim": 4},
    "mistral": {"sliding_window": 4},
    "bamba": {"mamba_n_groups": 1, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"mamba_n_groups": 1, "layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": MAMBA2,
    "opt": {"word_embed_proj_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4, "num_layers": LAYERS},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "intermediate_size": [48] * LAYERS,
    }
    | {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * LAYERS},
    "gemma4_text": {"global_head_dim": 8},
    "zamba": {"num_hidden_layers": 10, "n_mamba_heads": 2, "attention_head_dim": 16} | {"attention_hidden_size": 64},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "layer_types": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "n_groups": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}
    | {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "xlstm": {"embedding_dim": WIDTH, "num_blocks": LAYERS, "num_heads": 2},
    "reformer": {
        "attention_head_size": 8,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_embds": False,
        "feed_forward_size": 48,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": WIDTH},
    },
    "qwen4_exp_text": {"ngram_vocab_size_base": 50, "hc_lowrank": 8, "ple_embed_dim": 8}
    | {"indexer_budget": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
    | {"indexer_compress_ratio": 2},
    "whisper": {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
    "plbart": {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
}
COMPOSED = ("text_config", "decoder")
"""Fields that hold the configuration of the language model in types that see or hear as well."""


def small_config(kind: str, **changes: Any) -> PreTrainedConfig:
    """A configuration of the type, with LAYERS layers (or as many as its own kinds of layers need)."""
    return CONFIG_MAPPING[kind](**small_fields(kind) | changes)


def small_fields(kind: str) -> dict[str, Any]:
    special = SPECIAL_CASES.get(kind, {})
    kind_class = CONFIG_MAPPING[kind]
    try:
        default: Any = kind_class()
    except Exception:  # whose defaults do not pass its own validators
        default = None
    known = {*vars(default or object), *getattr(kind_class, "__dataclass_fields__", {}), *kind_class.attribute_map}
    fields = {name: value for name, value in SMALL.items() if name in known}
    for name, target in kind_class.attribute_map.items():
        if target in fields:
            fields.pop(name, None)
    for name in ("layer_types", "mlp_layer_types", "indexer_types"):
        types = getattr(default, name, None)
        is_field = name not in kind_class.attribute_map and not isinstance(getattr(kind_class, name, None), property)
        if is_field and isinstance(types, list | tuple) and types:
            distinct = list(dict.fromkeys(types))[:LAYERS]
            fields[name] = [distinct[index % len(distinct)] for index in range(LAYERS)]
    sub_configs = getattr(kind_class, "sub_configs", {})
    for name in COMPOSED:
        inner = getattr(default, name, None)
        if name in sub_configs and inner is not None and inner.model_type in CONFIG_MAPPING:
            fields[name] = small_fields(inner.model_type) | {"model_type": inner.model_type}
    return fields | special


def save_small(kind: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """Writes a random checkpoint; changes: of its configuration. Raises what transformers raises of a type that cannot
    be made small this way."""
    config = small_config(kind, **changes)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"it has {size} parameters when it is small")
    torch.manual_seed(7)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # as they come, weights are so small that every token is like the next
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model
