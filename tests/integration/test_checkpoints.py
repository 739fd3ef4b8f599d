"""Checkpoint folders: what is read of them, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from p2pmodel.domain.errors import InvalidInput, NotFound
from p2pmodel.domain.swarm import Span
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole, read_checkpoint
from p2pmodel.engine.stage import load_stage

WIDTH, LAYERS = 32, 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_only_the_files_of_the_span_are_opened(llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "full", max_shard_size="20KB")
    index = json.loads((tmp_path / "full" / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if name.startswith("model.layers.1.")}
    assert needed < set(index.values())
    checkpoint = read_checkpoint(tmp_path / "full")
    assert set(index.values()) < set(checkpoint.files)
    expected = load_stage(checkpoint, Span(1, 2))
    for file in set(index.values()) - needed:
        (tmp_path / "full" / file).unlink()
    checkpoint = read_checkpoint(tmp_path / "full")
    stage = load_stage(checkpoint, Span(1, 2))
    hidden = torch.randn(1, 3, WIDTH)
    with torch.inference_mode():
        assert torch.equal(stage.forward(hidden, None, stage.span), expected.forward(hidden, None, stage.span))
    assert 0 < stage.weight_bytes < 4 * sum(parameter.numel() for parameter in load_whole(llama).parameters())
    with pytest.raises(InvalidInput, match=r"lacks model-\d+-of-\d+.safetensors, which holds weights"):
        load_stage(checkpoint, Span(0, 2))


def test_what_a_folder_holds(llama: Path) -> None:
    checkpoint = read_checkpoint(llama)
    assert checkpoint.files == ("config.json", "generation_config.json", "model.safetensors")
    assert (checkpoint.architecture, checkpoint.layers, checkpoint.hidden_size) == ("llama", LAYERS, WIDTH)
    assert (checkpoint.context, checkpoint.stack) == (64, "layers")
    with pytest.raises(NotFound, match="no tokenizer"):
        load_tokenizer(llama)
    with pytest.raises(InvalidInput, match="no span 2:9"):
        load_stage(checkpoint, Span(2, 9))


def changed(config: Path, **values: Any) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
        (lambda d: (d / "config.json").write_text("[1]"), "no JSON object"),
        (lambda d: changed(d / "config.json", model_type="nonsense"), "no model type that is known"),
        (lambda d: changed(d / "config.json", model_type="own", auto_map={"AutoConfig": "evil.py"}), "never run"),
        (lambda d: changed(d / "config.json", model_type="t5", architectures=["T5Model"]), "no decoder-only"),
        (lambda d: changed(d / "config.json", architectures=["LlamaForTokenClassification"]), "not a causal"),
        (lambda d: changed(d / "config.json", num_hidden_layers=-1), "no model that can be built"),
        (lambda d: changed(d / "config.json", num_hidden_layers=10**9), "no model that can be built"),
        (lambda d: changed(d / "config.json", hidden_act="nonsense"), "no model that can be built"),
        (lambda d: (d / "model.safetensors").unlink(), "no weights"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "only pickled weights"),
        (
            lambda d: (
                (d / "model.safetensors").rename(d / "other")
                and (d / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../other"}}')
            ),
            "no safetensors file beside it",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_refused(spoil: Any, sentence: str, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    with pytest.raises(InvalidInput, match=sentence):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 100),
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1]),
        lambda d: changed(d / "config.json", num_hidden_layers=LAYERS + 1),
        lambda d: changed(d / "config.json", intermediate_size=40),
    ],
)
def test_weights_that_do_not_fit_are_refused(spoil: Any, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    with pytest.raises(InvalidInput):
        load_stage(checkpoint, Span(1, checkpoint.layers))
    with pytest.raises(InvalidInput):
        load_whole(tmp_path)
