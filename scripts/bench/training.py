"""What training costs, and what its kinds of patches gain.

    python scripts/bench/training.py --section swarm|sizes|fisher|kinds [--section …] [--turns 3]

swarm: a step of (IA)³ training, forward and backward of 8 × 128 tokens, through 1 and 2 stages with one thread each,
against the whole model in this process with one thread and with as many as there are stages; in fp32 the gradients have
to be the same. A random Llama of 88 million parameters. sizes: of the patches of the starter model, and of (IA)³ and
LoRA patches of an 8B and a 70B Llama by their configurations. fisher: the Fisher of examples, one by one, against an
ordinary forward and backward pass over as many. kinds: the starter model on domains that it has not seen, a domain and
a seed after another: the loss on what is held out after more and more steps.

What is compared takes turns, so that what else the machine does falls on all alike.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from measuring import Shape, cpu_seconds, heading, hosts, random_llama, row
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from p2pmodel import starter
from p2pmodel.engine import data
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole
from p2pmodel.engine.evaluation import attached
from p2pmodel.engine.head import load_head, using_vectors
from p2pmodel.engine.training.loop import train
from p2pmodel.engine.training.losses import row_nats
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.engine.training.sensitivity import fisher_of
from p2pmodel.engine.training.trainees import new_trainee
from p2pmodel.node.asking.client import SwarmClient
from p2pmodel.tensors import blob, compact, fish, ia3, weights
from p2pmodel.tensors.kinds import Kinds, get_kind
from p2pmodel.tensors.patch_kind import KindOptions, Trainee

ROWS, TOKENS = 8, 128
TOLERANCE = 1e-5

Step = Callable[[], list[Tensor]]


def gradients(model: Any, using: Callable[[], Any], state: dict[str, Tensor], ids: Tensor) -> list[Tensor]:
    with using():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return list(torch.autograd.grad(loss, list(state.values())))


def with_threads(threads: int, step: Step) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return step()
    finally:
        torch.set_num_threads(before)


def swarm(asked: argparse.Namespace) -> None:
    shape = Shape()
    with tempfile.TemporaryDirectory() as folder:
        through_stages(random_llama(Path(folder), shape), shape, asked)


def through_stages(checkpoint: Path, shape: Shape, asked: argparse.Namespace) -> None:
    print(f"\n## Training: a step of {ROWS} × {TOKENS} tokens; share is of the local tokens/s with as many threads\n")
    heading("stages", "codec", "local tokens/s", "threads", "swarm tokens/s", "share", "CPU × local", "MB/step")
    kind, ids = get_kind("ia3@1"), torch.randint(10, 1000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    whole = load_whole(checkpoint).requires_grad_(False)
    state = {n: t.clone().requires_grad_(True) for n, t in kind.initial(kind.find_slots(whole.base_model)).items()}
    with attached(whole, kind, state) as applier:
        local = partial(gradients, whole, partial(applier.use, state), state, ids)
        expected = local()
        for stages in asked.stages:
            with (
                tempfile.TemporaryDirectory() as folder,
                hosts(Path(folder), checkpoint, shape.layers, stages) as (_, first),
                SwarmClient.connect(Path(folder) / "client", (first.address,), str(checkpoint), checkpoint) as client,
            ):
                for codec in asked.codecs:
                    chain = client.chain(client.lineage.find_version("head"), codec)
                    model = load_head(client.checkpoint, chain).requires_grad_(False)
                    through = partial(gradients, model, partial(using_vectors, state), state, ids)
                    cases = {
                        "one": partial(with_threads, 1, local),
                        "same": partial(with_threads, stages, local),
                        "swarm": partial(with_threads, 1, through),
                    }
                    compare(cases, stages, codec, expected, chain, asked.turns)
                    chain.close()


def compare(cases: Mapping[str, Step], stages: int, codec: str, expected: list[Tensor], chain: Any, turns: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    traffic = 0
    for turn in range(turns + 1):
        for name, step in cases.items():
            session = chain.tape().session
            sent = session.bytes_sent + session.bytes_received if session else 0
            used, began = cpu_seconds([os.getpid()]), time.perf_counter()
            found = step()
            if turn:
                seconds[name].append(time.perf_counter() - began)
                cpu[name].append(cpu_seconds([os.getpid()]) - used)
            if name == "swarm":
                session = chain.tape().session
                traffic = session.bytes_sent + session.bytes_received - sent
                ours, theirs = torch.cat([g.flatten() for g in found]), torch.cat([g.flatten() for g in expected])
                error = float((ours - theirs).norm() / theirs.norm())
                assert codec != "fp32" or error < TOLERANCE, f"the gradients differ by {error:.1e}"
    rate = {name: ROWS * TOKENS / statistics.median(values) for name, values in seconds.items()}
    used_cpu = {name: statistics.median(values) for name, values in cpu.items()}
    for threads, name in ((1, "one"), (stages, "same")) if stages > 1 else ((1, "one"),):
        row(
            stages, codec, rate[name], threads, rate["swarm"], rate["swarm"] / rate[name],
            used_cpu["swarm"] / used_cpu[name], traffic / 1e6,
        )  # fmt: skip


def starter_parts(domain: str, seed: int, sequence: int) -> data.Parts:
    corpus = data.load([starter.DOMAINS / f"{domain}.txt"], load_tokenizer(starter.MODEL))
    return data.split(corpus, sequence=sequence, seed=seed)


def parent_state(model: PreTrainedModel, kind: str) -> dict[str, Tensor]:
    kinds = Kinds((kind,))
    return kinds.initial(kinds.find_slots(model.base_model))


ARMS: dict[str, tuple[str, float, KindOptions]] = {
    "ia3": ("ia3@1", 1e-2, KindOptions()),
    "fish 0.5 %": ("fish@1", 3e-3, KindOptions(density=0.005)),
    "random 0.5 %": ("fish@1", 3e-3, KindOptions(density=0.005)),
    "fish 2.5 %": ("fish@1", 2e-3, KindOptions(density=0.025)),
    "random 2.5 %": ("fish@1", 2e-3, KindOptions(density=0.025)),
    "lora": ("lora@1", 2e-3, KindOptions()),
    "dense": ("dense@1", 5e-4, KindOptions()),
}
"""Kind, learning rate, options."""


def trainee_of(arm: str, model: PreTrainedModel, blocks: data.Blocks, seed: int) -> Trainee:
    kind, _, options = ARMS[arm]
    parent = parent_state(model, kind)
    if not arm.startswith("random"):
        return new_trainee(model, kind, parent, blocks, options, seed)
    generator = torch.Generator().manual_seed(seed)
    chance = {name: torch.rand(update.shape, generator=generator) for name, update in parent.items()}
    return fish.Trainee(weights.Ground(model.base_model, parent), fish.choose(chance, options.density))


def sizes(asked: argparse.Namespace) -> None:
    print("\n## Sizes of patches, in bytes: adapter, and Fisher\n")
    heading("model", "kind", "values", "adapter", "Fisher")
    options = TrainingOptions(steps=1, batch=1, sequence=64, fisher_examples=2, held_out_blocks=1)
    parts = starter_parts("email", 0, 64)
    for arm in ("ia3", "fish 0.5 %", "fish 2.5 %", "lora", "dense"):
        model = load_whole(starter.MODEL)
        trainee = trainee_of(arm, model, parts.train[torch.arange(16)], 0)
        trained = train(model, trainee, parts.train, parts.held_out, options)
        values = sum(p.numel() for p in trainee.parameters.values())
        row("starter", arm, values, len(blob.pack(trained.adapter)), len(blob.pack(compact.encode(trained.fisher))))
        trainee.remove()
    for name, shape in LLAMAS.items():
        with torch.device("meta"):
            base = LlamaModel(LlamaConfig(**shape))
        vectors = sum(slot.shape[0] for slot in ia3.find_slots(base))
        row(name, "ia3", vectors, 4 * vectors, vectors)
        row(name, "ia3 in fp16", vectors, 2 * vectors, vectors)
        linear = [m for path, m in base.layers.named_modules() if isinstance(m, torch.nn.Linear)]
        factors = sum(8 * (m.in_features + m.out_features) for m in linear)
        row(name, "lora", factors, 4 * factors, sum(m.in_features + m.out_features for m in linear))


LLAMAS: dict[str, dict[str, Any]] = {
    "Llama 8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "Llama 70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip


def fisher(asked: argparse.Namespace) -> None:
    print(
        "\n## Fisher of 16 examples of 256 tokens, one by one: seconds, against a forward and backward pass over them\n"
    )
    heading("kind", "pass", "Fisher", "ratio", "from Adam")
    options = TrainingOptions(batch=4, sequence=256, fisher_examples=16)
    parts = starter_parts("email", 0, 256)
    examples = parts.train[torch.arange(16)]
    for arm in ("ia3", "fish 0.5 %", "lora", "dense"):
        model = load_whole(starter.MODEL).requires_grad_(False)
        trainee = trainee_of(arm, model, examples, 0)
        leaves = list(trainee.parameters.values())
        moments = {name: leaf.detach().square() for name, leaf in trainee.parameters.items()}

        def passing(model: PreTrainedModel = model, trainee: Trainee = trainee, leaves: list[Tensor] = leaves) -> None:
            for at in range(0, len(examples), options.batch):
                with trainee.use():
                    loss = row_nats(model, examples[at : at + options.batch]).sum()
                torch.autograd.grad(loss, leaves, allow_unused=True)

        def taking(how: str, model: PreTrainedModel = model, trainee: Trainee = trainee, m: Any = moments) -> None:
            with trainee.use():
                fisher_of(model, trainee, m, examples, replace(options, fisher=how))

        cases: dict[str, Callable[[], None]] = {
            "pass": passing,
            "fisher": partial(taking, "model"),
            "adam": partial(taking, "adam"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(asked.turns + 1):
            for name, case in cases.items():
                began = time.perf_counter()
                case()
                seconds[name] += [time.perf_counter() - began] if turn else []
        found = {name: statistics.median(values) for name, values in seconds.items()}
        row(arm, found["pass"], found["fisher"], found["fisher"] / found["pass"], found["adam"])
        trainee.remove()


def kinds(asked: argparse.Namespace) -> None:
    print(
        f"\n## Kinds: held-out loss (nats per token) after steps; {len(asked.domains)} domains, {asked.seeds} seeds\n"
    )
    every = asked.steps // 4
    heading("kind", "rate", "values", "0", *(str(every * n) for n in range(1, 5)), "gain", "± over runs")
    for arm, (_, rate, _) in ARMS.items():
        runs, values = [], 0
        for domain in asked.domains:
            for seed in range(asked.seeds):
                parts = starter_parts(domain, seed, 256)
                model = load_whole(starter.MODEL)
                trainee = trainee_of(arm, model, parts.train, seed)
                options = TrainingOptions(
                    steps=4 * every, batch=4, sequence=256, learning_rate=rate, seed=seed, fisher="adam",
                    checkpoint_every=every, held_out_blocks=8,
                )  # fmt: skip
                runs.append(train(model, trainee, parts.train, parts.held_out, options).held_out)
                values = sum(p.numel() for p in trainee.parameters.values())
                trainee.remove()
        means = [statistics.mean(run[at] for run in runs) for at in range(5)]
        gains = [run[0] - run[4] for run in runs]
        cells = (f"{mean:.4f}" for mean in means)
        row(arm, f"{rate:g}", values, *cells, f"{statistics.mean(gains):.4f}", f"{statistics.pstdev(gains):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", choices=list(SECTIONS), default=None)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--codecs", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--domains", nargs="+", default=["email", "tkinter"], help="of kinds")
    parser.add_argument("--seeds", type=int, default=3, help="of kinds")
    parser.add_argument("--steps", type=int, default=120, help="of kinds")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    load = psutil.getloadavg()[0]
    print(f"{psutil.cpu_count()} cores, load {load:.1f} before, torch {torch.__version__}")
    for section in asked.section or list(SECTIONS):
        SECTIONS[section](asked)


SECTIONS = {"swarm": swarm, "sizes": sizes, "fisher": fisher, "kinds": kinds}

if __name__ == "__main__":
    main()
