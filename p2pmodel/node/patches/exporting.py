"""Patches and versions as other programs read them: adapters of peft, and whole checkpoints of transformers."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from p2pmodel.domain.errors import InvalidInput, StorageError, UsageError
from p2pmodel.domain.ids import VersionId, short
from p2pmodel.domain.patch import Patch
from p2pmodel.engine.checkpoint import GENERATION, TOKENIZER_FILES, Checkpoint, load_whole, read_checkpoint
from p2pmodel.engine.family import no_progress_bars
from p2pmodel.engine.interchange import adapters, folding
from p2pmodel.engine.interchange.cards import card
from p2pmodel.engine.weights import read_json
from p2pmodel.node.lineages import hub
from p2pmodel.node.lineages.branches import Family
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.lineages.states import read_change, version_state
from p2pmodel.node.patches.patchbook import OpenedPatch
from p2pmodel.store.disk import storage_error
from p2pmodel.tensors import blob, ia3
from p2pmodel.tensors.kinds import Kinds

MARK = "p2pmodel.json"
"""In an exported checkpoint: which model and version it is."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """difference: of the logits after folding, as a share of their spread; 0 for an adapter."""

    folder: Path
    files: tuple[str, ...]
    difference: float = 0.0


def export_adapter(opened: OpenedPatch, base: Path, folder: Path, onto: Path | None = None) -> Exported:
    """An adapter that `PeftModel.from_pretrained` loads, on the base checkpoint, or on that in `onto`, to which the
    patch's parent was exported. Raises InvalidInput for what peft cannot say."""
    lineage, patch = opened.lineage, opened.patch
    adapter: Mapping[str, Tensor] = blob.unpack(opened.adapter, None, lineage.largest_patch)
    change = read_change(lineage, patch.kind, opened.adapter)
    parent, name = version_state(lineage, patch.parent), _source(lineage) or str(base.resolve())
    if patch.kind == "ia3@1":
        values = change.applied_to(parent)
        adapter = {slot: values[slot] for slot in change.values}
    model = skeleton(read_checkpoint(base))
    if onto is not None:
        _demand_version(onto, lineage, patch.parent)
        name = str(onto)
        if patch.kind == "ia3@1":
            adapter = _relative(adapter, parent)
        elif patch.kind == "lora@1":
            adapter = adapters.through_vectors(adapter, model, parent)
    else:
        others = {n: t for n, t in parent.items() if not (patch.kind == "ia3@1" and n.startswith(ia3.PREFIX))}
        if patch.kind in adapters.KINDS.values() and _differs(others, lineage):
            number = lineage.number(patch.parent)
            raise InvalidInput(
                f"The patch is on {lineage.manifest.name} {number}, which an adapter on the base cannot contain.",
                f"Write it with: p2pmodel version export {number} DIR; then name DIR with --onto.",
            )
        if patch.kind == "ia3@1":
            adapter = {n: t for n, t in parent.items() if n.startswith(ia3.PREFIX)} | dict(adapter)
    files = adapters.write(patch.kind, model, adapter, name)
    usage = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{_source(lineage) or "BASE"}")\n'
        'model = PeftModel.from_pretrained(model, "DIR")'
    )
    files["README.md"] = _card(
        lineage,
        patch,
        opened.id,
        f"{lineage.manifest.name}, adapter",
        "peft",
        usage,
        _source(lineage) or lineage.manifest.name,
    )
    with new_folder(folder) as inside:
        for file, raw in files.items():
            (inside / file).write_bytes(raw)
    return Exported(folder, tuple(sorted(files)))


def export_merged(
    lineage: Lineage,
    base: Path,
    folder: Path,
    version: VersionId,
    opened: OpenedPatch | None = None,
    dtype: str | None = None,
) -> Exported:
    """A whole checkpoint that computes what the version does, with the patch on it where there is one. dtype: of the
    weights; None for that of the base. Raises InvalidInput naming a slot that cannot be folded into weights."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"{dtype!r} is no type of weights.", f"Use {', '.join(DTYPES)}.")
    state = version_state(lineage, version)
    if opened is not None:
        state = read_change(lineage, opened.patch.kind, opened.adapter).applied_to(state)
    model = load_whole(base)
    difference = folding.fold(model, Kinds(lineage.manifest.kinds), state)
    config = read_json(base / "config.json")
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    model.to(DTYPES[dtype] if dtype else getattr(torch, stored, torch.float32))  # type: ignore[arg-type]
    number = str(lineage.number(version))
    mark = {
        "model": lineage.model,
        "name": lineage.manifest.name,
        "version": version,
        "number": number,
        "patch": opened and opened.id,
    }
    usage = 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("DIR")'
    title = f"{lineage.manifest.name} {number}" + (f" with patch {short(opened.id)}" if opened else "")
    with new_folder(folder) as inside:
        with no_progress_bars():
            model.save_pretrained(inside)
        for name in (GENERATION, *TOKENIZER_FILES):
            if (base / name).is_file():
                shutil.copyfile(base / name, inside / name)
        (inside / MARK).write_text(json.dumps(mark, indent=2) + "\n")
        text = _card(
            lineage,
            opened.patch if opened else None,
            opened.id if opened else None,
            title,
            "transformers",
            usage,
            _source(lineage) or lineage.manifest.name,
            version,
        )
        (inside / "README.md").write_bytes(text)
    return Exported(folder, tuple(sorted(path.name for path in folder.iterdir())), difference)


def skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """The causal model without its weights: for the names of its modules."""
    with torch.device("meta"):
        return checkpoint.causal_class()(checkpoint.config)


def marked_version(folder: Path, lineage: Lineage) -> VersionId | None:
    """Of a checkpoint that `export_merged` wrote: which version of the lineage it is, without a patch on it."""
    if not (folder / MARK).is_file():
        return None
    mark = read_json(folder / MARK)
    known = {lineage.model, *(v.id for v in lineage.versions)}
    version = mark.get("version")
    fits = mark.get("model") == lineage.model and not mark.get("patch") and version in known
    return VersionId(version) if fits else None  # type: ignore[arg-type]


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside it to write into, which takes its place at the end, whole or not at all. Raises InvalidInput for
    a folder that holds something, StorageError."""
    target = folder.resolve()
    with _errors_of_disks(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InvalidInput(f"{folder} is not empty.", "Name a folder that is not there yet.")
        target.parent.mkdir(parents=True, exist_ok=True)
        inside = Path(tempfile.mkdtemp(prefix=".p2pmodel-", dir=target.parent))
    try:
        with _errors_of_disks(target):
            yield inside
            inside.chmod(0o755)
            os.replace(inside, target)
    finally:
        shutil.rmtree(inside, ignore_errors=True)


@contextmanager
def _errors_of_disks(folder: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        told = OSError(int(number[1]) if number else 0, str(error))
        raise StorageError(storage_error(told, folder).message, "Name another folder.") from error
    except OSError as error:
        raise StorageError(storage_error(error, folder).message, "Name another folder.") from error


def _demand_version(folder: Path, lineage: Lineage, version: VersionId) -> None:
    if marked_version(folder, lineage) != version:
        number = lineage.number(version)
        raise InvalidInput(
            f"{folder} is no export of {lineage.manifest.name} {number}, which the patch is on.",
            f"Write one with: p2pmodel version export {number} DIR",
        )


def _relative(adapter: Mapping[str, Tensor], parent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """To vectors that are in the weights already."""
    if zero := next((name for name in adapter if bool((parent[name] == 0).any())), None):
        raise InvalidInput(f"The parent has zeros in {zero[:96]!r}, which nothing can scale.", "Use --merged DIR.")
    return {n: (t.double() / parent[n].double()).float() for n, t in adapter.items()}


def _differs(state: Mapping[str, Tensor], lineage: Lineage) -> bool:
    """From the base."""
    kinds, slots = Kinds(lineage.manifest.kinds), {slot.name: slot for slot in lineage.manifest.slots}
    return any(
        name not in slots or not torch.equal(tensor, kinds.initial([slots[name]])[name])
        for name, tensor in state.items()
    )


def _source(lineage: Lineage) -> str:
    """On a hub, or empty."""
    source = hub.Source.parse(lineage.manifest.source)
    return source.repository if source else ""


def _card(
    lineage: Lineage,
    patch: Patch | None,
    patch_id: str | None,
    title: str,
    library: str,
    usage: str,
    base: str,
    version: VersionId | None = None,
) -> bytes:
    merged = [] if version is None else Family(lineage.home).merged(lineage, version)
    patches = [*merged, *([patch] if patch else [])]
    parent = patch.parent if patch else version
    facts = {"model": f"{lineage.manifest.name} ({lineage.model})"}
    if parent is not None:
        facts["version"] = f"{lineage.number(parent)} ({parent})"
    if patch is not None:
        facts |= {"patch": f"{patch_id}, of kind {patch.kind}", "contributor": patch.contributor}
    files = [file for each in patches for file in each.provenance.data]
    facts |= {
        f"trained on {file.name}": f"SHA-256 {file.digest}, {file.licence or 'licence not stated'}" for file in files
    }
    licence = (patch.licence if patch and patch.licence else "") or lineage.manifest.licence
    return card(
        title,
        base=base,
        licence=licence,
        datasets=[file.name for file in files],
        library=library,
        facts=facts,
        usage=usage,
    )
