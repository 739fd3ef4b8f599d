"""What peft and transformers make of what is exported, and what becomes of their adapters here."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedModel

from p2pmodel import starter
from p2pmodel.domain.errors import InvalidInput, Rejected, StorageError
from p2pmodel.domain.ids import VersionId
from p2pmodel.domain.patch import Patch, Provenance, Recipe
from p2pmodel.engine.checkpoint import load_whole
from p2pmodel.engine.data import Blocks
from p2pmodel.engine.interchange import adapters
from p2pmodel.engine.interchange.folding import fold
from p2pmodel.engine.training.trainees import new_trainee
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.node.lineages.intake import check_tensors
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import patch_file_state, read_change, version_state
from p2pmodel.node.patches.exporting import MARK, export_adapter, export_merged, new_folder
from p2pmodel.node.patches.importing import FLAT, import_adapter
from p2pmodel.node.patches.patchbook import OpenedPatch, open_patch
from p2pmodel.store.home import Home
from p2pmodel.tensors import blob, lora
from p2pmodel.tensors.kinds import Kinds
from p2pmodel.tensors.patch_kind import KindOptions
from p2pmodel.wire import bundle, canonical
from tests.support.families import save_small
from tests.support.lineages import add_patch_of, adopt
from tests.support.training import PROSE, byte_tokenizer, small_model

TOKENS = torch.arange(3, 27)[None] * 7 % 257
KINDS = ("ia3@1", "lora@1", "fish@1")


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=256, eos_token_id=256
    )
    return GPT2LMHeadModel(config)


def small_opt() -> PreTrainedModel:
    """With biases on everything."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=257, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.2,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


MODELS = {"llama": small_model, "gpt2": small_gpt2, "opt": small_opt}


@pytest.fixture(scope="module", params=sorted(MODELS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    MODELS[request.param]().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "prose.txt").write_text(PROSE * 60)
    return folder / "model"


@pytest.fixture
def lineage(base: Path, tmp_path: Path) -> Lineage:
    home = Home.open(tmp_path / "home")
    founding = Founding("tiny", (home.key.peer,), 1, starter.EXAM, kinds=KINDS, licence="Apache-2.0")
    return found(home, base, founding)


def grown(lineage: Lineage) -> VersionId:
    """A version whose vectors and weights are not the base's."""
    chance = torch.Generator().manual_seed(1)
    state = {
        n: t + 0.02 * torch.randn(t.shape, generator=chance) for n, t in version_state(lineage, lineage.head).items()
    }
    patch = add_patch_of(lineage, lineage.home.key, {n: t for n, t in state.items() if n.startswith("ia3:")})
    return adopt(lineage, [patch], state=state)


def new_patch(lineage: Lineage, kind: str, parent: VersionId) -> OpenedPatch:

    model = AutoModelForCausalLM.from_pretrained(lineage.home.path.parent / "base")
    state = version_state(lineage, parent)
    trainee = new_trainee(model, kind, state, Blocks.of_ids(TOKENS), KindOptions(rank=3, alpha=5.0), 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainee.parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    raw = blob.pack(trainee.adapter())
    trainee.remove()
    ref = canonical.blob_ref(raw)
    recipe = Recipe(seed=0, steps=1, batch=1, sequence=8, optimizer="none", learning_rate=0.0, fisher_examples=1)
    key = lineage.home.key
    patch = Patch(
        key.peer, lineage.model, parent, kind, ref, ref, 1, 2.0, 1.9, "MIT", Provenance((), recipe, (), 1, ())
    )
    record = key.sign("patch", patch)
    return OpenedPatch(canonical.digest(record), patch, lineage, record, raw, b"")


@torch.no_grad()
def logits_at(lineage: Lineage, base: Path, state: dict[str, torch.Tensor]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    applier = Kinds(lineage.manifest.kinds).applier(model.base_model, list(state))
    with applier.use(state):
        logits: torch.Tensor = model(TOKENS).logits
    return logits


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(TOKENS).logits
    return logits


def state_of(opened: OpenedPatch) -> dict[str, torch.Tensor]:
    parent = version_state(opened.lineage, opened.patch.parent)
    return read_change(opened.lineage, opened.patch.kind, opened.adapter).applied_to(parent)


@pytest.fixture
def at_base(lineage: Lineage, base: Path) -> Lineage:
    (lineage.home.path.parent / "base").symlink_to(base)
    return lineage


@pytest.mark.parametrize("kind", ["ia3@1", "lora@1"])
def test_peft_computes_what_the_patch_does(at_base: Lineage, base: Path, tmp_path: Path, kind: str) -> None:
    opened = new_patch(at_base, kind, at_base.head)
    export_adapter(opened, base, tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    wanted = logits_at(at_base, base, state_of(opened))
    assert not torch.allclose(wanted, logits_at(at_base, base, {}), atol=1e-2)
    assert torch.allclose(logits_of(model), wanted, atol=1e-5)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert 'license: "mit"' in card
    assert "library_name" in card


@pytest.mark.parametrize("kind", ["ia3@1", "lora@1"])
def test_an_adapter_on_a_version_goes_onto_its_export(at_base: Lineage, base: Path, tmp_path: Path, kind: str) -> None:
    opened = new_patch(at_base, kind, grown(at_base))
    with pytest.raises(InvalidInput, match=r"is on tiny 1\.0\.1, which an adapter on the base cannot contain"):
        export_adapter(opened, base, tmp_path / "adapter")
    export_merged(at_base, base, tmp_path / "version", opened.patch.parent, dtype="fp32")
    with pytest.raises(InvalidInput, match="is no export of"):
        export_adapter(opened, base, tmp_path / "adapter", onto=base)
    assert not (tmp_path / "adapter").exists()
    export_adapter(opened, base, tmp_path / "adapter", onto=tmp_path / "version")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "version"), tmp_path / "adapter")
    assert torch.allclose(logits_of(model), logits_at(at_base, base, state_of(opened)), atol=2e-4)


@pytest.mark.parametrize("kind", ["ia3@1", "lora@1"])
def test_a_whole_checkpoint_computes_what_the_version_and_the_patch_do(
    at_base: Lineage, base: Path, tmp_path: Path, kind: str
) -> None:
    opened = new_patch(at_base, kind, grown(at_base))
    wanted = logits_at(at_base, base, state_of(opened))
    done = export_merged(at_base, base, tmp_path / "fp32", opened.patch.parent, opened, "fp32")
    assert done.difference < 1e-4
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", MARK} <= set(done.files)
    assert torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "fp32")), wanted, atol=2e-4)
    export_merged(at_base, base, tmp_path / "bf16", opened.patch.parent, opened, "bf16")
    rounded = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)).float()
    assert (rounded - wanted).abs().max() < 0.05 * wanted.abs().max()
    with pytest.raises(InvalidInput, match="is not empty"):
        export_merged(at_base, base, tmp_path / "fp32", opened.patch.parent)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "safetensors"],
)
def test_a_disk_that_is_full_is_one_sentence_and_nothing_is_left(error: Exception, tmp_path: Path) -> None:
    def write() -> None:
        with new_folder(tmp_path / "out") as inside:
            (inside / "config.json").write_text("{}")
            raise error

    with pytest.raises(StorageError, match="is full") as refused:
        write()
    assert refused.value.hint == "Name another folder."
    assert not list(tmp_path.iterdir())


def test_what_peft_has_no_place_for_is_said() -> None:
    for kind in ("dense@1", "fish@1"):
        with pytest.raises(InvalidInput, match=f"no adapter for patches of kind {kind}"):
            adapters.write(kind, small_model(), {}, "base")


def some_state(model: PreTrainedModel, kinds: Kinds) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    state = kinds.initial(kinds.find_slots(model.base_model))
    return {name: t + 0.02 * torch.randn(t.shape, generator=chance) for name, t in state.items()}


@pytest.mark.parametrize(
    "family", ["qwen2", "gemma2", "phi3", "gpt_neox", "bloom", "deepseek_v3", "gpt_oss", "mixtral"]
)
def test_vectors_and_weights_fold_in_many_families(family: str, tmp_path: Path) -> None:
    save_small(family, tmp_path)
    kinds, model = Kinds(("ia3@1", "dense@1")), load_whole(tmp_path)
    state = some_state(model, kinds)
    tokens = TOKENS % 96
    with torch.no_grad():
        before = model(tokens).logits
        assert fold(model, kinds, state) < 1e-4
        assert not torch.allclose(model(tokens).logits, before, atol=1e-3)


def test_a_vector_over_a_weight_that_layers_share_is_not_folded() -> None:
    kinds, model = Kinds(("ia3@1",)), small_model()
    layers: Any = model.model.layers
    layers[1].self_attn.k_proj.weight = layers[0].self_attn.k_proj.weight
    with pytest.raises(InvalidInput, match="other layers of the model use the same weight"):
        fold(model, kinds, some_state(model, kinds))


def test_a_lora_with_a_control_variate_is_refused(at_base: Lineage) -> None:
    opened = new_patch(at_base, "lora@1", at_base.head)
    with pytest.raises(Rejected, match="have no control variate"):
        check_tensors(at_base, opened.patch, opened.adapter, opened.adapter, b"control")


def trained(config: Any, base: Path, folder: Path) -> torch.Tensor:
    """An adapter of peft with values drawn by chance; its logits."""
    torch.manual_seed(5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name or "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return logits_of(model)


def targets(base: Path) -> dict[str, Any]:
    names = {
        "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
        "opt": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    }
    family = next(name for name in names if name in base.parent.name)
    return {"target_modules": names[family][0], "feedforward_modules": names[family][1], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("rank_pattern", [False, True])
def test_a_lora_of_peft_becomes_a_patch(at_base: Lineage, base: Path, tmp_path: Path, rank_pattern: bool) -> None:
    chosen = targets(base)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=chosen["target_modules"], use_rslora=rank_pattern, task_type="CAUSAL_LM",
        rank_pattern={chosen["feedforward_modules"][0]: 2} if rank_pattern else {},
        alpha_pattern={chosen["feedforward_modules"][0]: 9} if rank_pattern else {},
    )  # fmt: skip
    wanted = trained(config, base, tmp_path / "adapter")
    patch = import_adapter(at_base, base, tmp_path / "adapter", tmp_path / "a.p2patch", licence="MIT")
    assert patch.fisher == FLAT
    state = patch_file_state(at_base, tmp_path / "a.p2patch")
    assert torch.allclose(logits_at(at_base, base, state), wanted, atol=1e-5)


def test_an_ia3_of_peft_becomes_a_patch_and_comes_back(at_base: Lineage, base: Path, tmp_path: Path) -> None:
    wanted = trained(IA3Config(**targets(base)), base, tmp_path / "adapter")
    prose = base.parent / "prose.txt"
    done = import_adapter(at_base, base, tmp_path / "adapter", tmp_path / "a.p2patch", files=(prose,))
    assert done.fisher == "model"
    assert done.patch.provenance.data[0].name == "prose.txt"
    opened = open_patch(at_base.home.path, str(tmp_path / "a.p2patch"))
    assert torch.allclose(logits_at(at_base, base, state_of(opened)), wanted, atol=1e-5)
    bundle.open_bundle((tmp_path / "a.p2patch").read_bytes())
    export_adapter(opened, base, tmp_path / "back")
    there = blob.unpack((tmp_path / "adapter" / adapters.WEIGHTS).read_bytes(), None, 1 << 30)
    back = blob.unpack((tmp_path / "back" / adapters.WEIGHTS).read_bytes(), None, 1 << 30)
    assert all(torch.equal(there[name], back[name]) for name in there)


@pytest.mark.parametrize("kind", ["ia3", "lora"])
def test_an_adapter_trained_on_an_export_becomes_a_patch_on_that_version(
    at_base: Lineage, base: Path, tmp_path: Path, kind: str
) -> None:
    version = grown(at_base)
    export_merged(at_base, base, tmp_path / "version", version, dtype="fp32")
    chosen = targets(base)
    config = IA3Config(**chosen) if kind == "ia3" else LoraConfig(r=2, target_modules=chosen["target_modules"])
    wanted = trained(config, tmp_path / "version", tmp_path / "adapter")
    prose = base.parent / "prose.txt"
    done = import_adapter(at_base, base, tmp_path / "adapter", tmp_path / "a.p2patch", files=(prose,))
    assert done.patch.parent == version
    state = patch_file_state(at_base, tmp_path / "a.p2patch")
    assert torch.allclose(logits_at(at_base, base, state), wanted, atol=2e-4)


def edited(folder: Path, **changes: Any) -> None:
    path = folder / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_adapters_that_cannot_be_patches_are_refused_in_one_sentence(
    at_base: Lineage, base: Path, tmp_path: Path
) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(InvalidInput, match=match):
            import_adapter(at_base, base, tmp_path / "adapter", tmp_path / "a.p2patch", **options)

    adapter = tmp_path / "adapter"
    refused("has no adapter_config.json")
    trained(LoraConfig(r=2, target_modules=targets(base)["target_modules"]), base, adapter)
    edited(adapter, base_model_name_or_path="somebody/else")
    refused("names 'somebody/else' as its base, and nothing shows that this is tiny")
    import_adapter(at_base, base, adapter, tmp_path / "a.p2patch", assume_base=True)
    edited(adapter, base_model_name_or_path=str(base), use_dora=True)
    refused("DoRA")
    edited(adapter, use_dora=False, peft_type="VERA")
    refused("type 'VERA' cannot be imported")
    edited(adapter, peft_type="LORA", bias="all")
    refused("trained biases")
    edited(adapter, bias="none")
    held = blob.unpack((adapter / adapters.WEIGHTS).read_bytes(), None, 1 << 30)
    renamed = {name.replace("layers.0", "layers.9").replace("h.0.", "h.9."): t for name, t in held.items()}
    (adapter / adapters.WEIGHTS).write_bytes(blob.pack(renamed))
    refused("no linear layer with a slot")
    (adapter / adapters.WEIGHTS).write_bytes(blob.pack({**held, "base_model.model.lm_head.weight": torch.ones(2, 2)}))
    refused("nothing of a patch")
    (adapter / adapters.WEIGHTS).write_bytes(b"\x1f\x8b" + bytes(100))
    refused("cannot be used")
    (adapter / adapters.WEIGHTS).rename(adapter / adapters.PICKLED)
    refused("pickled")
    assert lora.SCALE not in held
