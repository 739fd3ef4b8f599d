#!/usr/bin/env python
"""Modular experts against their alternatives: held-out loss, time and bytes; growing by one and shrinking again.

    python scripts/bench/experts.py [--seeds 3] [--steps 10] [--rank 4] [--section arms|cost] [--json]

The starter model knows Python. The domains are texts that its dependencies bring along: C++ headers, licences,
CMake, and Python that it has not seen; a fifth, protobuf, comes later. All arms train as many values (four experts of
the rank, or one of four times the rank), see as many tokens, and leave the first tokens of a text to the model as is.
Held-out loss is in nats per token, over the domains.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from p2pmodel import starter
from p2pmodel.domain.modular import DOWN, GATE, ROUTER, UP, Expert, place_of, slots_of_expert
from p2pmodel.domain.swarm import Span
from p2pmodel.engine.checkpoint import load_tokenizer, load_whole, read_checkpoint
from p2pmodel.engine.data import Blocks
from p2pmodel.engine.stage import load_stage
from p2pmodel.engine.training.losses import row_nats
from p2pmodel.tensors import gates, smear
from p2pmodel.tensors.experts import find_pools, new_adapter
from p2pmodel.tensors.smear import Adapter, Course, Decide, softmax
from p2pmodel.tensors.smear_hooks import Applier

TOKENS, BATCH, HELD_OUT, TEXT_BYTES = 96, 6, 16, 80_000
RATE, GATE_RATE = 1e-2, 1e-1
OPEN = 30.0
State = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of each domain; joint arms make four times as many")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--section", choices=("arms", "cost"), help="only this one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gates.OWN_EXAMPLES, gates.WRITTEN_EXAMPLES = 128, 96
    found: dict[str, object] = {}
    if options.section != "cost":
        found["arms"] = compare(options.seeds, options.steps, options.rank)
    if options.section != "arms":
        found["cost"] = cost(options.rank)
    if options.json:
        print(json.dumps(found, indent=2))


def texts() -> dict[str, str]:
    """The last one comes later."""
    site = Path(torch.__file__).parents[1]
    globs = {
        "headers": sorted((site / "torch/include/ATen").rglob("*.h"))[::7],
        "licences": sorted(
            {
                Path(str(file.locate()))
                for each in distributions()
                for file in each.files or ()
                if "dist-info" in str(file) and "LICENSE" in file.name
            }
        ),
        "cmake": sorted((site / "torch/share/cmake").rglob("*.cmake")),
        "python": [starter.MODEL.parent / "domains" / "xml.txt"],
        "protobuf": sorted(site.rglob("*.proto")),
    }
    found = {}
    for name, files in globs.items():
        parts: list[str] = []
        for file in files:
            if file.is_file() and sum(map(len, parts)) < TEXT_BYTES:
                parts.append(file.read_text(errors="replace")[: TEXT_BYTES // 8 if len(files) > 1 else TEXT_BYTES])
        found[name] = "\n".join(parts)
    return found


class Bench:
    def __init__(self, rank: int, seed: int) -> None:
        self.model: PreTrainedModel = load_whole(starter.MODEL).requires_grad_(False)
        self.pools = find_pools(self.model.base_model)
        self.layers = [pool.name.removeprefix("expert:").removesuffix(".experts") for pool in self.pools]
        self.rank, self.seed = rank, seed
        tokenizer = load_tokenizer(starter.MODEL)
        self.train: dict[str, Blocks] = {}
        self.held_out: dict[str, Blocks] = {}
        for name, text in texts().items():
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            rows = torch.tensor([[0, *ids[at : at + TOKENS]] for at in range(0, len(ids) - TOKENS, TOKENS)])
            # The end of the text is what is held out: other files, as a rule.
            cut = max(HELD_OUT, len(rows) // 5)
            pick = torch.linspace(len(rows) - cut, len(rows) - 1, HELD_OUT).long()
            self.train[name], self.held_out[name] = Blocks.of_ids(rows[:-cut]), Blocks.of_ids(rows[pick])
        *self.domains, self.late = self.train

    def adapter(self, name: str, rank: int) -> State:
        return new_adapter(self.pools, Expert(name, rank))

    def rows(self, name: str, gate: tuple[float, float], chance: torch.Generator | None = None) -> State:
        found: State = {}
        for pool in self.pools:
            width = pool.shape[1]
            row = torch.zeros(width) if chance is None else torch.randn(width, generator=chance)
            found |= {f"{pool.name}.{name}.{ROUTER}": row, f"{pool.name}.{name}.{GATE}": torch.tensor(gate)}
        return found

    def learn(
        self,
        trained: State,
        still: State,
        domains: Sequence[str],
        steps: int,
        rate: float = RATE,
        decide: Decide = softmax,
        merging: "type[Mixing] | None" = None,
    ) -> State:
        """`trained` after the steps, each on rows of the domains in turn."""
        leaves = {name: tensor.clone().requires_grad_(True) for name, tensor in trained.items()}
        routing = [leaf for name, leaf in leaves.items() if name.endswith((ROUTER, GATE))]
        others = [leaf for name, leaf in leaves.items() if not name.endswith((ROUTER, GATE))]
        groups = [{"params": others, "lr": rate, "top": rate}, {"params": routing, "lr": GATE_RATE, "top": GATE_RATE}]
        optimiser = torch.optim.Adam([group for group in groups if group["params"]])
        chance = torch.Generator().manual_seed(self.seed)
        state = {**still, **leaves}
        with hooked(self.model, state, decide, merging) as applier:
            for step in range(steps):
                share = min(1.0, (step + 1) / 3) * (1 - step / steps)
                for group in optimiser.param_groups:
                    group["lr"] = group["top"] * share
                parts = []
                for index in range(BATCH):
                    blocks = self.train[domains[(step * BATCH + index) % len(domains)]]
                    parts.append(blocks[torch.randint(len(blocks), (1,), generator=chance)])
                batch = Blocks.join(parts)
                with applier.use(state):
                    loss = row_nats(self.model, batch).sum() / batch.tokens
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                optimiser.zero_grad()
        return {name: leaf.detach() for name, leaf in leaves.items()}

    @torch.no_grad()
    def losses(
        self,
        state: State | Mapping[str, State],
        domains: Sequence[str],
        decide: Decide = softmax,
        merging: "type[Mixing] | None" = None,
    ) -> dict[str, float]:
        """state: one for all, or by domain."""
        found = {}
        for domain in domains:
            own = state.get(domain, state)
            with hooked(self.model, own, decide, merging) as applier, applier.use(own):  # type: ignore[arg-type]
                blocks = self.held_out[domain]
                found[domain] = float(row_nats(self.model, blocks).double().sum() / blocks.tokens)
        return found

    @torch.no_grad()
    def seconds(self, state: State, decide: Decide = softmax, merging: "type[Mixing] | None" = None) -> float:
        """Per token of a forward over some rows; the least of a few."""
        blocks = self.held_out[self.domains[0]][slice(0, 8)]
        took = []
        with hooked(self.model, state, decide, merging) as applier, applier.use(state):
            for _ in range(5):
                began = time.perf_counter()
                row_nats(self.model, blocks)
                took.append(time.perf_counter() - began)
        return min(took) / blocks.tokens

    def gates(self, domain: str) -> State:
        """As a contributor finds them."""
        return gates.gate_slots(gates.fit_gates(self.model, self.train[domain].ids, self.layers, self.seed), domain)


class Mixing(Course):
    """Computes every expert, and averages what they say."""

    def _route(self, layer: str, lead: Tensor) -> Adapter:
        pool = self.pools[layer]
        shares = self.decide(pool.scores(smear.seen_by_router(lead)))
        return _All(pool.down, pool.up, shares)


class _All(Adapter):
    def __init__(self, down: Tensor, up: Tensor, shares: Tensor) -> None:
        super().__init__(down, up)
        object.__setattr__(self, "shares", shares)

    def update(self, hidden: Tensor) -> Tensor:
        normed, total = smear.norm(hidden), torch.zeros_like(hidden)
        for index in range(len(self.down)):
            said = torch.nn.functional.gelu(normed @ self.down[index].T) @ self.up[index]
            total = total + self.shares[:, index, None, None] * said  # type: ignore[attr-defined]
        return total


@contextmanager
def hooked(
    model: nn.Module, state: Mapping[str, Tensor], decide: Decide, course: type[Course] | None
) -> Iterator[Applier]:
    applier = Applier(model.base_model, list(state), decide)  # type: ignore[arg-type]
    if course is not None:
        applier.course = course
    try:
        yield applier
    finally:
        applier.remove()


def top_one(scores: Tensor) -> Tensor:
    """Straight through: one expert forward, the softmax's gradient backward."""
    soft = scores.softmax(-1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    return hard + soft - soft.detach()


def experts(state: State, keep: set[str]) -> State:
    return {name: t for name, t in state.items() if (place := place_of(name)) is not None and place.expert in keep}


def compare(seeds: int, steps: int, rank: int) -> dict[str, object]:
    results: dict[str, list[dict[str, float]]] = {}
    seconds: dict[str, list[float]] = {}
    growth: list[dict[str, float]] = []
    for seed in range(seeds):
        began = time.monotonic()
        bench = Bench(rank, seed)
        four = bench.domains

        def note(
            arm: str,
            state: State | Mapping[str, State],
            decide: Decide = softmax,
            merging: type[Mixing] | None = None,
            bench: Bench = bench,
        ) -> dict[str, float]:
            losses = bench.losses(state, bench.domains, decide, merging)
            one = state.get(bench.domains[0], state)
            results.setdefault(arm, []).append(losses)
            seconds.setdefault(arm, []).append(bench.seconds(one, decide, merging))  # type: ignore[arg-type]
            return losses

        def say(text: str, began: float = began) -> None:
            print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

        note("the model as it is", bench.rows("x", (0.0, -OPEN)) | bench.adapter("x", 1))
        opened = bench.rows("shared", (0.0, OPEN))
        shared = bench.learn(bench.adapter("shared", 4 * rank), opened, four, 4 * steps)
        note("one shared adapter", {**shared, **opened})
        say("shared")
        oracle: dict[str, State] = {}
        for domain in four:
            opened = bench.rows(domain, (0.0, OPEN))
            oracle[domain] = {**bench.learn(bench.adapter(domain, rank), opened, [domain], steps), **opened}
        note("an adapter for each domain, known", oracle)
        say("oracle")
        chance = torch.Generator().manual_seed(seed)
        start: State = {}
        for domain in four:
            start |= bench.adapter(domain, rank) | bench.rows(domain, (16.0, 0.0), chance)
        for arm, decide, merging in (
            ("top-1, straight through", top_one, None),
            ("mean of the adapters' outputs", softmax, Mixing),
            ("SMEAR, trained jointly", softmax, None),
        ):
            note(arm, bench.learn(start, {}, four, 4 * steps, RATE, decide, merging), decide, merging)
            say(arm)
        grown: State = {}
        rows_of = {domain: bench.gates(domain) for domain in [*four, bench.late]}
        for domain in four:
            still = {**grown, **rows_of[domain]}
            grown = {**still, **bench.learn(bench.adapter(domain, rank), still, [domain], steps)}
        before = note("SMEAR, grown by one contributor at a time", grown)
        say("grown")
        # Gates by gradient from own data alone: sigmoid gates, since an expert alone competes with none.
        apart: State = {}
        for domain in four:
            adapter = {n: t for n, t in oracle[domain].items() if n.endswith((DOWN, UP))}
            rows = bench.rows(domain, (16.0, 0.0), torch.Generator().manual_seed(seed))
            apart |= adapter | bench.learn(rows, adapter, [domain], max(4, steps // 2))
        note("grown, gates by gradient on own data", apart)
        say("gates by gradient")
        rounds = []
        routing = {name: t for name, t in grown.items() if name.endswith((ROUTER, GATE))}
        rest = {name: t for name, t in grown.items() if name not in routing}
        for domain in four:
            rounds.append(bench.learn(routing, rest, [domain], max(4, steps // 4)))
        mean = {name: torch.stack([each[name] for each in rounds]).mean(0) for name in routing}
        note("grown, and a router round", {**rest, **mean})
        say("router round")
        still = {**grown, **rows_of[bench.late]}
        five = {**still, **bench.learn(bench.adapter(bench.late, rank), still, [bench.late], steps)}
        after = bench.losses(five, [*four, bench.late])
        alone = bench.losses(grown, [bench.late])
        removed = bench.losses(experts(five, set(four)), four)
        assert removed == before, "removing an expert gives back every bit"
        growth.append(
            {
                "own domain": after[bench.late] / alone[bench.late] - 1,
                "others, largest": max((after[d] / before[d] - 1 for d in four), key=abs),
            }
        )
        say(f"a fifth: {growth[-1]}")
        say(json.dumps({arm: statistics.mean(losses[-1].values()) for arm, losses in results.items()}))
        values = sum(t.numel() for t in grown.values())
    table: list[dict[str, Any]] = []
    for arm, per_seed in results.items():
        means = [statistics.mean(each.values()) for each in per_seed]
        table.append(
            {
                "arm": arm,
                "loss": statistics.mean(means),
                "spread": max(means) - min(means),
                **{domain: statistics.mean(each[domain] for each in per_seed) for domain in per_seed[0]},
                "microseconds": min(seconds[arm]) * 1e6,
            }
        )
    print(f"{'arm':45} {'loss':>7} {'spread':>7}  " + " ".join(f"{d:>9}" for d in four) + "  µs a token")
    for row in table:
        figures = " ".join(f"{row[d]:9.4f}" for d in four)
        print(f"{row['arm']:45} {row['loss']:7.4f} {row['spread']:7.4f}  {figures}  {row['microseconds']:10.0f}")
    print(f"bytes of four experts of rank {rank}, rows included: {4 * values:,}")
    for grew in growth:
        print(
            f"a fifth expert: its domain {grew['own domain']:+.2%}, the others {grew['others, largest']:+.3%} at most; "
            "removed: the same bits"
        )
    return {"arms": table, "growth": growth, "bytes": 4 * values}


@torch.inference_mode()
def cost(rank: int) -> list[dict[str, float]]:
    """Of a session on one stage with all layers: a prompt, and each token after it."""
    stage = load_stage(read_checkpoint(starter.MODEL), Span(0, 6))
    pools = find_pools(stage.base)
    chance = torch.Generator().manual_seed(0)
    states = {
        count: {
            slot.name: torch.randn(slot.shape, generator=chance) * 0.02
            for index in range(count)
            for slot in slots_of_expert(pools, Expert(f"e{index}", rank))
        }
        for count in (1, 4, 16, 64)
    }
    prompts: dict[int, list[float]] = {count: [] for count in (0, *states)}
    steps: dict[int, list[float]] = {count: [] for count in (0, *states)}
    hidden = torch.randn(1, TOKENS, stage.width, generator=chance)
    stage.prepare_slots(frozenset(states[1]))
    for _ in range(7):  # in turns, so that whatever else runs meets all of them
        for count in prompts:
            cache = stage.new_cache(stage.span, 2 * TOKENS)
            state = states.get(count)
            began = time.perf_counter()
            stage.forward(hidden, cache, stage.span, vectors=state)
            prompts[count].append(time.perf_counter() - began)
            for _ in range(16):
                began = time.perf_counter()
                stage.forward(hidden[:, :1], cache, stage.span, vectors=state)
                steps[count].append(time.perf_counter() - began)
    found = []
    for count in prompts:
        prompt, token = (statistics.median(each[count]) for each in (prompts, steps))
        one = [statistics.median(each[1]) for each in (prompts, steps)]
        found.append({"experts": count, "prompt": prompt / one[0], "token": token / one[1], "ms": token * 1e3})
        print(
            f"{count:3} experts: {prompt * 1e3:7.2f} ms a prompt of {TOKENS} tokens ({prompt / one[0]:.2f} of one's), "
            f"{token * 1e3:6.3f} ms a token after it ({token / one[1]:.2f})"
        )
    return found


if __name__ == "__main__":
    main()
