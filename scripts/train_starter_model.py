#!/usr/bin/env python
"""Train the starter model that ships with p2pmodel, from nothing but the running Python's standard library.

    python scripts/train_starter_model.py all --work DIR     # data, tokenizer, training, card
    python scripts/train_starter_model.py data|train|card --work DIR

`data` writes the token streams to DIR, and the exam and the contributors' texts to p2pmodel/starter/;
`train` resumes from DIR/checkpoint.safetensors when it exists; `card` evaluates and writes the model card.
The data order depends on the seed and the step alone, so an interrupted run ends where an undisturbed one does.

Five domains are held out of the training, so that patches have something to bring: see HELD_OUT.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import math
import os
import platform
import sys
import sysconfig
import time
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STARTER = Path(__file__).resolve().parent.parent / "p2pmodel" / "starter"
END = "<|endoftext|>"
VOCAB = 4096
SEED = 2026

# A file belongs to a held-out domain when its path below the library's root contains one of these.
HELD_OUT: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio",),
    "email": ("email",),
    "tkinter": ("tkinter", "idlelib", "turtledemo", "test_tcl", "test_ttk"),
    "xml": ("xml", "html", "sax", "pulldom"),
    "distutils": ("distutils",),
}
# Share of the training tokens drawn from each stream; tests are twice the size of the library, and duller.
MIXTURE = {"library": 0.58, "tests": 0.36, "topics": 0.06}

EXCERPT_BYTES = 1024
TUNE_EXCERPTS, TEST_EXCERPTS = 3, 6  # of each domain, each from another file where there are enough
GENERAL_HELD_OUT = 0.04  # of the files outside the held-out domains, for the exam's "general"
CONTRIBUTOR_BYTES = 240_000  # text shipped for the contributor of one domain

SEQUENCE, BATCH = 512, 12
STEPS, WARMUP, DECAY = 1000, 40, 0.3  # a warm-up, stable, decay schedule; DECAY is the last share of the steps
LR_MUON, LR_ADAM, WEIGHT_DECAY = 0.02, 4e-3, 0.05
SAMPLE_PROMPTS = (
    "def read_lines(path):\n    ",
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, ",
    "import os\nimport sys\n\ndef main(argv):\n    ",
    "    try:\n        value = int(text)\n    except ",
    "for i, line in enumerate(",
)


# ---------------------------------------------------------------------------------------------------- data
@dataclass(frozen=True)
class Source:
    name: str  # path below the library's root
    text: str


def _order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _is_prose_or_code(text: str) -> bool:
    """Tables of numbers and escapes teach a small model nothing."""
    return sum(c.isalpha() or c in " \n_" for c in text) >= 0.74 * len(text)


def library_sources() -> Iterator[Source]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "encodings/", "pydoc_data/", "config-")) or "/bad" in name:
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if len(text) > 400 and _is_prose_or_code(text):
            yield Source(name, text)


def topic_sources() -> Iterator[Source]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Source(f"topics/{name}", text)


def domain_of(name: str) -> str | None:
    return next((d for d, marks in HELD_OUT.items() if any(m in name for m in marks)), None)


def excerpts(sources: list[Source], count: int) -> list[Source]:
    """`count` pieces of EXCERPT_BYTES that begin at a line's start, spread over the sources in turn."""
    taken: list[Source] = []
    for turn in range(count):
        source = sources[turn % len(sources)]
        raw = source.text.encode()
        room = max(1, len(raw) - EXCERPT_BYTES)
        at = int(_order(f"{source.name}#{turn}")[:8], 16) % room
        at = raw.find(b"\n", at) + 1 if at else 0
        piece = raw[at : at + EXCERPT_BYTES].decode(errors="ignore")
        taken.append(Source(f"{source.name}@{at}", piece))
    return taken


def make_data(work: Path) -> None:
    streams: dict[str, list[Source]] = {k: [] for k in MIXTURE}
    domains: dict[str, list[Source]] = {k: [] for k in HELD_OUT}
    general: list[Source] = []
    for source in library_sources():
        domain = domain_of(source.name)
        if domain:
            domains[domain].append(source)
        elif int(_order(source.name)[:8], 16) / 2**32 < GENERAL_HELD_OUT:
            general.append(source)
        else:
            streams["tests" if source.name.startswith("test/") or "/test" in source.name else "library"].append(source)
    streams["topics"] = list(topic_sources())

    tune: dict[str, list[Source]] = {}
    test: dict[str, list[Source]] = {}
    for name, sources in {**domains, "general": general}.items():
        ordered = sorted((s for s in sources if len(s.text) > 2 * EXCERPT_BYTES), key=lambda s: _order(s.name))
        test[name] = excerpts(ordered[:TEST_EXCERPTS], TEST_EXCERPTS)
        tune[name] = excerpts(ordered[TEST_EXCERPTS : TEST_EXCERPTS + TUNE_EXCERPTS], TUNE_EXCERPTS)
        if name != "general":
            write_contribution(name, ordered[TEST_EXCERPTS + TUNE_EXCERPTS :])
    write_exam(tune, test)

    tokenizer = train_tokenizer(s.text for stream in streams.values() for s in stream)
    work.mkdir(parents=True, exist_ok=True)
    for name, sources in streams.items():
        ids = [i for s in sorted(sources, key=lambda s: _order(s.name)) for i in tokenizer.encode(s.text).ids]
        np.save(work / f"{name}.npy", np.asarray(ids, dtype=np.uint16))
        size = sum(len(s.text.encode()) for s in sources)
        print(
            f"{name}: {len(sources)} files, {size / 1e6:.1f} MB, {len(ids) / 1e6:.2f} M tokens, "
            f"{size / len(ids):.2f} bytes a token"
        )
    with lzma.open(work / "training-text.xz", "wt", preset=0) as file:
        file.write("".join(s.text for k in ("topics", "library") for s in streams[k]))


def write_contribution(domain: str, sources: list[Source]) -> None:
    folder = STARTER / "domains"
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    for source in sorted(sources, key=lambda s: ("test" in s.name, _order(s.name))):
        if text.tell() + len(source.text) <= CONTRIBUTOR_BYTES:
            text.write(source.text.rstrip() + "\n\n\n")
    (folder / f"{domain}.txt").write_text(text.getvalue(), encoding="utf-8")


def write_exam(tune: dict[str, list[Source]], test: dict[str, list[Source]]) -> None:
    """The exam's format is p2pmodel.engine.exams': exam.toml, and one JSONL file a domain and split."""
    folder = STARTER / "exam"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ['name = "starter"', 'licence = "PSF-2.0"', ""]
    for split, domains in (("tune", tune), ("test", test)):
        for domain, pieces in domains.items():
            name = f"{domain}.{split}.jsonl"
            rows = (json.dumps({"source": p.name, "text": p.text}, ensure_ascii=False) for p in pieces)
            (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    for domain in tune:
        lines += [
            "[[domain]]",
            f'name = "{domain}"',
            f'tune = "{domain}.tune.jsonl"',
            f'test = "{domain}.test.jsonl"',
            "",
        ]
    (folder / "exam.toml").write_text("\n".join(lines), encoding="utf-8")


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # A line's end goes with the indentation of the next line, a word with the blank before it.
    words = Regex(r"\n[ \n]*| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B:1", special_tokens=[(END, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(STARTER / "model")
    return tokenizer


# ---------------------------------------------------------------------------------------------------- training
def orthogonalised(gradient: Tensor) -> Tensor:
    """Newton-Schulz iteration of Muon (Jordan et al., 2024). torch.optim.Muon runs it in bfloat16, which costs
    twenty times as much as float32 on a CPU without bfloat16 units."""
    x = gradient.T if gradient.shape[0] > gradient.shape[1] else gradient
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if gradient.shape[0] > gradient.shape[1] else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalised(p.grad.lerp(m, group["momentum"]))
                p.mul_(1 - group["lr"] * WEIGHT_DECAY)
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    end = AutoTokenizer.from_pretrained(STARTER / "model").eos_token_id
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def batch_at(step: int, streams: dict[str, np.ndarray]) -> Tensor:
    """[BATCH, SEQUENCE + 1] int64, a function of the seed and the step alone."""
    rng = np.random.default_rng([SEED, step])
    names = rng.choice(list(MIXTURE), size=BATCH, p=list(MIXTURE.values()))
    rows = []
    for name in names:
        at = int(rng.integers(len(streams[name]) - SEQUENCE - 1))
        rows.append(streams[name][at : at + SEQUENCE + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def rate(step: int, steps: int) -> float:
    decay = int(steps * DECAY)
    return min((step + 1) / WARMUP, 1.0, max(0.02, (steps - step) / decay))


def train(work: Path, steps: int) -> None:
    streams = {name: np.load(work / f"{name}.npy", mmap_mode="r") for name in MIXTURE}
    model = new_model()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (Muon(matrices, LR_MUON), LR_MUON),
        (torch.optim.AdamW(others, LR_ADAM, betas=(0.9, 0.95), weight_decay=0.0), LR_ADAM),
    ]
    checkpoint, start = work / "checkpoint.safetensors", 0
    if checkpoint.exists():
        start = restore(checkpoint, model, [o for o, _ in optimizers])
        print(f"resumed at step {start}")
    forward = torch.compile(model)
    began, smooth = time.monotonic(), None
    for step in range(start, steps):
        ids = batch_at(step, streams)
        loss = nn.functional.cross_entropy(forward(input_ids=ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, base in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = base * rate(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if step % 10 == 0:
            speed = (step - start + 1) * BATCH * SEQUENCE / (time.monotonic() - began)
            print(f"step {step}/{steps} loss {smooth:.4f} {speed:.0f} tokens/s", flush=True)
        if step % 50 == 49 or step == steps - 1:
            keep(checkpoint, step + 1, model, [o for o, _ in optimizers])
    write_model(model, STARTER / "model")


def keep(path: Path, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for key, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}.{name}": value for name, value in state.items()}
    save_file(tensors, path.with_suffix(".new"), metadata={"step": str(step)})
    os.replace(path.with_suffix(".new"), path)


def restore(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    from safetensors import safe_open

    tensors = load_file(path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{i}."):
                _, _, index, name = key.split(".", 3)
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def write_model(model: LlamaForCausalLM, folder: Path) -> None:
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config.eos_token_id = model.config.eos_token_id
    copy.to(torch.float16).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------- card
@torch.inference_mode()
def nats_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    nats = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        logits = model(input_ids=ids).logits[0, :-1].float()
        nats += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return nats / sum(len(t.encode()) for t in texts)


def exam_texts(domain: str) -> list[str]:
    lines = (STARTER / "exam" / f"{domain}.test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def xz_nats_per_byte(texts: list[str], training: bytes) -> float:
    """What xz needs for the texts once it has seen the library's part of the training text."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 64 << 20}]
    size = lambda raw: len(lzma.compress(raw, format=lzma.FORMAT_RAW, filters=filters))  # noqa: E731
    raw = "".join(texts).encode()
    return (size(training + raw) - size(training)) * 8 * math.log(2) / len(raw)


def write_card(work: Path, steps: int) -> None:
    folder = STARTER / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with lzma.open(work / "training-text.xz") as file:
        training = file.read()
    rows = []
    for name in (*HELD_OUT, "general"):
        texts = exam_texts(name)
        ours, xz = nats_per_byte(model, tokenizer, texts), xz_nats_per_byte(texts, training)
        rows.append(
            f"| {name} | {'no' if name in HELD_OUT else 'yes'} | {ours:.4f} | {ours / math.log(2):.3f} | "
            f"{xz:.4f} | {xz / math.log(2):.3f} |"
        )
        print(rows[-1])
    samples = []
    for prompt in SAMPLE_PROMPTS:
        for label, options in (
            ("greedy", {"do_sample": False}),
            ("temperature 0.7", {"do_sample": True, "temperature": 0.7, "top_k": 0}),
        ):
            torch.manual_seed(SEED)
            ids = torch.tensor([tokenizer(prompt).input_ids])
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=80,
                pad_token_id=tokenizer.eos_token_id,
                **options,
            )
            text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            samples.append(f"{label}:\n\n```python\n{prompt}⟶{text}\n```")
    tokens = {name: len(np.load(work / f"{name}.npy", mmap_mode="r")) for name in MIXTURE}
    (folder / "README.md").write_text(
        CARD.format(
            parameters=sum(p.numel() for p in model.parameters()) / 1e6,
            size=(folder / "model.safetensors").stat().st_size / 1e6,
            python=platform.python_version(),
            torch=torch.__version__,
            held_out=", ".join(HELD_OUT),
            rows="\n".join(rows),
            tokens=", ".join(f"{k} {v / 1e6:.2f} M tokens at {MIXTURE[k]:.0%}" for k, v in tokens.items()),
            steps=steps,
            batch=BATCH,
            sequence=SEQUENCE,
            seen=steps * BATCH * SEQUENCE / 1e6,
            seed=SEED,
            samples="\n\n".join(samples),
            lr_muon=LR_MUON,
            lr_adam=LR_ADAM,
            warmup=WARMUP,
            decay=DECAY,
        ),
        encoding="utf-8",
    )


CARD = """---
license: apache-2.0
language: [code, en]
pipeline_tag: text-generation
library_name: transformers
datasets: [python-standard-library]
---
# p2pmodel starter

A Llama-style causal language model of {parameters:.2f} million parameters ({size:.1f} MB in float16) that continues
Python code. It is there to be hosted, patched and merged on small machines; it is no assistant.

## Data
The standard library of CPython {python}: its sources, its tests and its pydoc topics (PSF-2.0). Files that are mostly
tables of numbers are left out. Mixture: {tokens}.

Held out of the training, with their tests, so that patches have something to bring: **{held_out}**. Excerpts of them
are the exam (`exam/`), other files of them are what the quickstart's contributors train on (`domains/`); no file is in
both.
4 % of the remaining files are held out too, as the exam's domain "general".

## Recipe
`python scripts/train_starter_model.py all --work DIR` reproduces it: {steps} steps of {batch} × {sequence} tokens
({seen:.1f} M tokens), float32 on the CPU, Muon on the matrices (rate {lr_muon}) and AdamW on the rest (rate {lr_adam}),
warm-up {warmup} steps, then stable, then linear decay over the last {decay:.0%}. Seed {seed}, torch {torch}.
Byte-level BPE of 4,096 tokens; a document begins with `<|endoftext|>`.

## Held-out loss
Per byte of the exam's test excerpts. The baseline is xz (preset 9e, 64 MB window) that has read the library's part of
the training text before.

| domain | family of text seen in training | nats per byte | bits per byte | xz, nats per byte | xz, bits per byte |
|---|---|---|---|---|---|
{rows}

## Samples
What follows the arrow is the model's.

{samples}

## Limits
It knows Python's surface and the library's habits, not programming. What it writes may resemble the standard library.

## Licence
The weights: Apache-2.0. The excerpts in `exam/` and `domains/`: PSF-2.0, © Python Software Foundation.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["data", "train", "card", "all"])
    parser.add_argument("--work", type=Path, required=True, help="folder for token streams and checkpoints")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    if args.what in ("data", "all"):
        make_data(args.work)
    if args.what in ("train", "all"):
        train(args.work, args.steps)
    if args.what in ("card", "all"):
        write_card(args.work, args.steps)


if __name__ == "__main__":
    sys.exit(main())
