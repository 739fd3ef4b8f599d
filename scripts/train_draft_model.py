#!/usr/bin/env python
"""Train the draft of the starter model: what proposes tokens in speculative decoding, distilled from the starter.

    python scripts/train_draft_model.py all --work DIR --data DIR       # speech, training, card
    python scripts/train_draft_model.py speak|train|card --work DIR --data DIR

--data is the folder that `train_starter_model.py data` wrote its token streams to. `speak` lets the starter continue
pieces of them and writes DIR/speech.npy: a draft is asked about the starter's own text. `train` resumes from
DIR/checkpoint.safetensors when it exists; `card` measures and writes the model card.
The data order depends on the seed and the step alone, so an interrupted run ends where an undisturbed one does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from train_starter_model import (
    DECAY,
    HELD_OUT,
    LR_ADAM,
    LR_MUON,
    MIXTURE,
    SEED,
    SEQUENCE,
    STARTER,
    VOCAB,
    WARMUP,
    Muon,
    exam_texts,
    keep,
    nats_per_byte,
    rate,
    restore,
    write_model,
)
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = STARTER / "draft"
WIDTH = 128
BATCH = 4
STEPS = 900

# Speech: batches of rows, each a piece of a stream and the starter's continuation; greedy and sampled in turn.
SPEECH_BATCHES, SPEECH_ROWS, SPEECH_PROMPT, SPEECH_TOKENS = 40, 128, 64, 128
SPEECH_TEMPERATURE = 0.7
SPEECH_SHARE = 0.35  # of the rows of a training batch

# The target is a mixture: the starter's distribution (which is KL), its greedy choice, and the text's next token.
WEIGHT_GREEDY, WEIGHT_TEXT = 0.25, 0.05

PROMPT_TOKENS, ANSWER_TOKENS = 48, 128  # of each exam text, for the card
PROPOSALS = (2, 4, 6)


def starter() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(STARTER / "model", dtype=torch.float32).eval()


def new_draft(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    """Its embeddings begin as the best approximation of the starter's of rank WIDTH."""
    torch.manual_seed(SEED)
    end = teacher.config.eos_token_id
    draft = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=teacher.config.max_position_embeddings,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    with torch.no_grad():
        vectors, sizes, _ = torch.linalg.svd(teacher.get_input_embeddings().weight.float(), full_matrices=False)
        draft.get_input_embeddings().weight.copy_(vectors[:, :WIDTH] * sizes[:WIDTH])
    return draft


# ---------------------------------------------------------------------------------------------------- data
def pieces(streams: dict[str, np.ndarray], names: np.ndarray, length: int, rng: np.random.Generator) -> Tensor:
    """[len(names), length] int64, each from its stream."""
    rows = []
    for name in names:
        at = int(rng.integers(len(streams[name]) - length))
        rows.append(streams[name][at : at + length].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def load_streams(data: Path) -> dict[str, np.ndarray]:
    return {name: np.load(data / f"{name}.npy", mmap_mode="r") for name in MIXTURE}


@torch.inference_mode()
def speak(work: Path, data: Path) -> None:
    streams, model = load_streams(data), starter()
    spoken = []
    began = time.monotonic()
    for number in range(SPEECH_BATCHES):
        rng = np.random.default_rng([SEED, 1, number])
        torch.manual_seed(SEED + number)
        names = rng.choice(list(MIXTURE), size=SPEECH_ROWS, p=list(MIXTURE.values()))
        prompt = pieces(streams, names, SPEECH_PROMPT, rng)
        spoken.append(continued(model, prompt, SPEECH_TOKENS, SPEECH_TEMPERATURE if number % 2 else None))
        speed = (number + 1) * SPEECH_ROWS * SPEECH_TOKENS / (time.monotonic() - began)
        print(f"batch {number + 1}/{SPEECH_BATCHES} {speed:.0f} tokens/s", flush=True)
    work.mkdir(parents=True, exist_ok=True)
    np.save(work / "speech.npy", torch.cat(spoken).flatten().numpy().astype(np.uint16))


def continued(model: LlamaForCausalLM, prompt: Tensor, tokens: int, temperature: float | None = None) -> Tensor:
    """[B, T] -> [B, T + tokens]: greedy, or sampled at a temperature. An end of text does not end it."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    return model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=model.config.eos_token_id,
        **sampling,
    )


def batch_at(step: int, streams: dict[str, np.ndarray]) -> Tensor:
    """[BATCH, SEQUENCE + 1] int64, a function of the seed and the step alone."""
    rng = np.random.default_rng([SEED, 2, step])
    shares = [*(share * (1 - SPEECH_SHARE) for share in MIXTURE.values()), SPEECH_SHARE]
    return pieces(streams, rng.choice([*MIXTURE, "speech"], size=BATCH, p=shares), SEQUENCE + 1, rng)


# ---------------------------------------------------------------------------------------------------- training
def target(logits: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """The starter's logits [N, V] and the text's next tokens [N] -> the mixture to learn [N, V], greedy choices [N]."""
    mixture = logits.softmax(-1).mul_(1 - WEIGHT_GREEDY - WEIGHT_TEXT)
    choices = logits.argmax(-1)
    for tokens, weight in ((choices, WEIGHT_GREEDY), (following, WEIGHT_TEXT)):
        mixture.scatter_add_(1, tokens[:, None], torch.full((len(tokens), 1), weight))
    return mixture, choices


def train(work: Path, data: Path, steps: int) -> None:
    streams = load_streams(data) | {"speech": np.load(work / "speech.npy", mmap_mode="r")}
    teacher = starter().requires_grad_(False)
    draft = new_draft(teacher)
    matrices = [p for n, p in draft.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in draft.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (Muon(matrices, LR_MUON), LR_MUON),
        (torch.optim.AdamW(others, LR_ADAM, betas=(0.9, 0.95), weight_decay=0.0), LR_ADAM),
    ]
    checkpoint, start = work / "checkpoint.safetensors", 0
    if checkpoint.exists():
        start = restore(checkpoint, draft, [o for o, _ in optimizers])
        print(f"resumed at step {start}")
    teach, learn = torch.compile(teacher), torch.compile(draft)
    began, smooth = time.monotonic(), np.zeros(0)
    for step in range(start, steps):
        ids = batch_at(step, streams)
        with torch.no_grad():
            mixture, choices = target(teach(input_ids=ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        logits = learn(input_ids=ids[:, :-1]).logits.flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, mixture)
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, base in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = base * rate(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        agreement = (logits.detach().argmax(-1) == choices).float().mean()
        now = np.asarray([loss.item(), agreement.item()])
        smooth = 0.95 * smooth + 0.05 * now if smooth.size else now
        if step % 10 == 0:
            speed = (step - start + 1) * BATCH * SEQUENCE / (time.monotonic() - began)
            print(
                f"step {step}/{steps} loss {smooth[0]:.4f} agreement {smooth[1]:.4f} {speed:.0f} tokens/s", flush=True
            )
        if step % 50 == 49 or step == steps - 1:
            keep(checkpoint, step + 1, draft, [o for o, _ in optimizers])
    write_model(draft, FOLDER)


# ---------------------------------------------------------------------------------------------------- card
@torch.inference_mode()
def agreements(draft: LlamaForCausalLM, teacher: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """[B, T] -> [B, T] bool: whether the two would choose the same token next."""
    return draft(input_ids=ids).logits.argmax(-1) == teacher(input_ids=ids).logits.argmax(-1)


def tokens_a_step(agreed: Tensor, proposals: int) -> float:
    """Tokens that one step of the starter yields when the draft proposes `proposals` each time; agreed: [T] bool."""
    position, steps = 0, 0
    while position < len(agreed):
        run = agreed[position : position + proposals].tolist()
        position += (run.index(False) if False in run else len(run)) + 1
        steps += 1
    return position / steps


def rows_of(draft: LlamaForCausalLM, teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    totals = np.zeros(3 + len(PROPOSALS))
    for name in (*HELD_OUT, "general"):
        texts = exam_texts(name)
        all_ids = [torch.tensor([tokenizer(text).input_ids]) for text in texts]
        on_text = torch.cat([agreements(draft, teacher, ids)[0] for ids in all_ids])
        prompts = torch.cat([ids[:, :PROMPT_TOKENS] for ids in all_ids])
        answers = continued(teacher, prompts, ANSWER_TOKENS)
        agreed = agreements(draft, teacher, answers[:, :-1])[:, PROMPT_TOKENS - 1 :]
        values = [
            nats_per_byte(draft, tokenizer, texts),
            on_text.float().mean().item(),
            agreed.float().mean().item(),
            *(float(np.mean([tokens_a_step(row, k) for row in agreed])) for k in PROPOSALS),
        ]
        totals += values
        yield row(name, values)
    yield row("mean", list(totals / (len(HELD_OUT) + 1)))


def row(name: str, values: list[float]) -> str:
    loss, on_text, on_speech, *yields = values
    cells = [name, f"{loss:.4f}", f"{on_text:.1%}", f"{on_speech:.1%}", *(f"{v:.2f}" for v in yields)]
    return f"| {' | '.join(cells)} |"


def write_card(work: Path, steps: int) -> None:
    draft = LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    rows = []
    for line in rows_of(draft, starter(), AutoTokenizer.from_pretrained(STARTER / "model")):
        print(line)
        rows.append(line)
    (FOLDER / "README.md").write_text(
        CARD.format(
            parameters=sum(p.numel() for p in draft.parameters()) / 1e6,
            size=(FOLDER / "model.safetensors").stat().st_size / 1e6,
            layers=draft.config.num_hidden_layers,
            width=WIDTH,
            mixture=", ".join(f"{name} {share * (1 - SPEECH_SHARE):.0%}" for name, share in MIXTURE.items()),
            speech_share=SPEECH_SHARE,
            speech=len(np.load(work / "speech.npy", mmap_mode="r")) / 1e6,
            speech_prompt=SPEECH_PROMPT,
            speech_tokens=SPEECH_TOKENS,
            temperature=SPEECH_TEMPERATURE,
            steps=steps,
            batch=BATCH,
            sequence=SEQUENCE,
            seen=steps * BATCH * SEQUENCE / 1e6,
            distribution=1 - WEIGHT_GREEDY - WEIGHT_TEXT,
            greedy=WEIGHT_GREEDY,
            text=WEIGHT_TEXT,
            lr_muon=LR_MUON,
            lr_adam=LR_ADAM,
            warmup=WARMUP,
            decay=DECAY,
            seed=SEED,
            torch=torch.__version__,
            prompt=PROMPT_TOKENS,
            answer=ANSWER_TOKENS,
            proposals=" | ".join(f"tokens a step, {k} proposed" for k in PROPOSALS),
            rule="|".join("---" for _ in range(4 + len(PROPOSALS))),
            rows="\n".join(rows),
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
# p2pmodel starter, draft

A Llama-style causal language model of {parameters:.2f} million parameters ({layers} layers of width {width},
{size:.1f} MB in float16) that guesses what the starter model (`../model`) will say. It is there for speculative
decoding: it proposes tokens, the starter checks them in one pass. Its tokenizer is the starter's.

## Data
The streams of the starter's own training, with the same domains held out, and text that the starter wrote: {mixture},
speech {speech_share:.0%}. Speech is {speech:.2f} M tokens: pieces of the streams of {speech_prompt} tokens, each with
the starter's continuation of {speech_tokens}, half of them greedy, half at temperature {temperature}.

## Recipe
`python scripts/train_draft_model.py all --work DIR --data DIR` reproduces it: {steps} steps of {batch} × {sequence}
tokens ({seen:.1f} M tokens), float32 on the CPU. The target is a mixture: the starter's distribution
({distribution:.2f}, the Kullback-Leibler divergence to it), its greedy choice ({greedy:.2f}) and the text's next
token ({text:.2f}). The embeddings begin as the starter's, reduced to rank {width}. Muon on the matrices (rate
{lr_muon}) and AdamW on the rest (rate {lr_adam}), warm-up {warmup} steps, then stable, then linear decay over the
last {decay:.0%}. Seed {seed}, torch {torch}.

## How often it is right
On the test excerpts of the starter's exam, which neither model has seen. Loss is nats per byte of the excerpt.
Agreement is how often the draft's first choice is the starter's: at every token of the excerpt, and along the
starter's own greedy continuation of its first {prompt} tokens, {answer} tokens long, which is what speculative
decoding meets. Tokens a step: what one pass of the starter yields on that continuation (1 without a draft).

| domain | loss | agreement on text | agreement on speech | {proposals} |
|{rule}|
{rows}

## Licence
The weights: Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speak", "train", "card", "all"])
    parser.add_argument("--work", type=Path, required=True, help="folder for the starter's speech and checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder with the token streams")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    if args.what in ("speak", "all"):
        speak(args.work, args.data)
    if args.what in ("train", "all"):
        train(args.work, args.data, args.steps)
    if args.what in ("card", "all"):
        write_card(args.work, args.steps)


if __name__ == "__main__":
    sys.exit(main())
