"""A Hugging Face folder: what model is in it, and which files make it up. Nothing in it is executed or unpickled."""

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from p2pmodel.domain.errors import InvalidInput, NotFound
from p2pmodel.domain.swarm import Span
from p2pmodel.engine import family, weights

MAX_LAYERS = 10_000
DEFAULT_CONTEXT = 2048
"""Of families without a limit of their own (ALiBi, recurrent ones)."""

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
CONFIG_ERRORS = (StrictDataclassError, OSError, ArithmeticError, AssertionError, *family.FAMILY_ERRORS)
"""What transformers raises at values of a config.json that make no sense: it has no error of its own for that."""


@dataclass(frozen=True)
class Checkpoint:
    """files: config, weights and tokenizer, sorted; context: the longest sequence, in tokens; stack: module path of the
    layer list below the base model, such as `layers` or `decoder.layers`; other_lists: of lists of the same name;
    provide: brings files of these names, if they are not here yet, before they are read, or raises P2PModelError."""

    path: Path
    config: PreTrainedConfig
    architecture: str
    layers: int
    hidden_size: int
    context: int
    files: tuple[str, ...]
    stack: str
    other_lists: tuple[str, ...] = ()
    provide: Callable[[tuple[str, ...]], None] = field(default=lambda names: None, compare=False)

    def base_class(self) -> type[PreTrainedModel]:
        return _class_for(self.config, MODEL_MAPPING)

    def causal_class(self) -> type[PreTrainedModel]:
        return _class_for(self.config, MODEL_FOR_CAUSAL_LM_MAPPING)

    def in_span(self, tensor: str, span: Span) -> bool:
        """Whether a tensor of the checkpoint, by its name, belongs to a layer of the span."""
        layer = family.layer_of(tensor, self.stack, self.other_lists)
        return layer is not None and layer in span

    def in_head(self, tensor: str) -> bool:
        """Whether it belongs to no layer: embeddings, norms, heads."""
        return family.layer_of(tensor, self.stack, self.other_lists) is None

    def weight_files(self, span: Span | None) -> tuple[str, ...]:
        """Names of the files that hold the weights of the span, or for None those that a client needs."""
        return self.files_with(self.in_head if span is None else partial(self.in_span, span=span))

    def files_with(self, wanted: Callable[[str], bool]) -> tuple[str, ...]:
        """Names of the files that hold the tensors whose names are wanted."""
        return weights.files_with(self.path, wanted)


def read_checkpoint(path: Path, elsewhere: Collection[str] = ()) -> Checkpoint:
    """Reads no weights. Of a checkpoint in several files, those that hold weights may be missing; elsewhere: names of
    files that belong to it, though they are not here.

    Raises InvalidInput when `path` holds no decoder-only language model in safetensors files."""
    config = _read_config(path)
    files = {"config.json", *weights.weight_files(path, elsewhere)}
    optional = (GENERATION, *TOKENIZER_FILES)
    files.update(name for name in optional if name in elsewhere or (path / name).is_file())
    try:
        decoder = config.get_text_config(decoder=True)
        layers, hidden_size = int(decoder.num_hidden_layers), int(decoder.hidden_size)
        context = int(getattr(decoder, "max_position_embeddings", None) or DEFAULT_CONTEXT)
        if not 1 <= layers <= MAX_LAYERS or hidden_size < 1 or context < 1:
            raise ValueError(f"{layers} layers of width {hidden_size} for {context} tokens")
        with torch.device("meta"):
            base = _class_for(config, MODEL_MAPPING)(deepcopy(config))
    except CONFIG_ERRORS as error:
        raise InvalidInput(
            f"{path / 'config.json'} describes no model that can be built: {family.first_line(error)}."
        ) from None
    stack = family.find_stack(base, layers)
    return Checkpoint(
        path,
        config,
        config.model_type,
        layers,
        hidden_size,
        context,
        tuple(sorted(files)),
        stack,
        family.lists_like(base, stack),
    )


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Raises NotFound when the folder has no tokenizer, InvalidInput when it has one that cannot be read."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise NotFound(f"{path} has no tokenizer.")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except CONFIG_ERRORS as error:
        raise InvalidInput(f"The tokenizer in {path} cannot be read: {family.first_line(error)}.") from None
    return tokenizer


def load_whole(path: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The whole model, for evaluation. Raises InvalidInput as `read_checkpoint` does, and when weights are missing."""
    _read_config(path)
    weights.weight_files(path)
    with family.quiet_loading(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, report = loaded
    family.demand_complete(report, path)
    whole: PreTrainedModel = model.to(device).eval()
    return whole


def _read_config(path: Path) -> PreTrainedConfig:
    if not (path / "config.json").is_file():
        raise InvalidInput(f"{path} is no Hugging Face model folder: it has no config.json.")
    raw = weights.read_json(path / "config.json")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise InvalidInput(
                f"The model in {path} needs code of its own, which is never run.",
                "Use a model of a family that transformers has built in.",
            )
        raise InvalidInput(f"{path / 'config.json'} names no model type that is known: {str(kind)[:64]!r}.")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except CONFIG_ERRORS as error:
        raise InvalidInput(f"{path / 'config.json'} cannot be read: {family.first_line(error)}.") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise InvalidInput(f"The model in {path} is of type {kind}, which is no decoder-only language model.")
    causal = _class_for(config, MODEL_FOR_CAUSAL_LM_MAPPING).__name__
    if config.architectures and causal not in config.architectures:
        raise InvalidInput(f"The model in {path} is a {config.architectures[0]}, not a causal language model.")
    return config


def _class_for(config: PreTrainedConfig, mapping: Any) -> type[PreTrainedModel]:
    found = mapping[type(config)]
    chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return chosen
