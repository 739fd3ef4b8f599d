"""How messages of a node and the time until a version is everywhere grow with the swarm, in virtual time.

    python scripts/bench/simulation.py [--nodes 10 30 100 300 1000 3000 10000] [--seeds 3] [--hours 3] [--plot FILE.png]

Every swarm has the same maintainers, contributors and rounds; only the number of the other nodes differs. The seconds
are virtual, so another load on this machine does not change them.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

from measuring import heading, row

from p2pmodel.sim.judge import simulate
from p2pmodel.sim.record import Outcome
from p2pmodel.sim.scenario import Scenario, parse

NODES = (10, 30, 100, 300, 1000, 3000, 10_000)
SCENARIO = """
name = "growth"
about = "rounds of five contributors and three maintainers"
hours = 3.0
settle_minutes = 15.0

[swarm]
nodes = 10
maintainers = 3
contributors = 5
join_seconds = 60.0

[schedule]
min_patches = 5
open_seconds = 1800.0

[work]
train_seconds = [600.0, 1800.0]

[network]
loss = 0.01
failure = 0.01

[limits]
reach_seconds = 300.0
"""


def middle(values: list[float]) -> float:
    return statistics.median(values)


def draw(path: Path, nodes: list[int], found: dict[int, list[Outcome]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    times, messages = figure.subplots(1, 2)
    for name, label in (("half", "half of the nodes"), ("most", "99 %"), ("all", "all")):
        times.plot(
            nodes, [middle([getattr(o.reach_seconds, name) for o in found[n]]) for n in nodes], "o-", label=label
        )
    for name, label in (("half", "half of the nodes"), ("most", "99 %"), ("all", "the busiest")):
        series = [middle([getattr(o.messages_per_minute, name) for o in found[n]]) for n in nodes]
        messages.plot(nodes, series, "o-", label=label)
    for axes, text in ((times, "seconds from a version's proof"), (messages, "messages a minute and node")):
        axes.set(xscale="log", xlabel="nodes", ylabel=text)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=list(NODES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    scenario: Scenario = replace(parse(SCENARIO, "growth"), hours=options.hours)
    found: dict[int, list[Outcome]] = {}
    heading("nodes", "versions", "half, s", "99 %, s", "all, s", "messages/min", "99 %", "busiest", "busy", "CPU s")
    for nodes in options.nodes:
        began = time.process_time()
        found[nodes] = outcomes = [simulate(scenario.changed(nodes), seed) for seed in range(options.seeds)]
        broken = [violation for outcome in outcomes for violation in outcome.violations]
        reach, sent = [o.reach_seconds for o in outcomes], [o.messages_per_minute for o in outcomes]
        row(
            nodes,
            round(middle([o.versions for o in outcomes])),
            *(middle([getattr(x, name) for x in reach]) for name in ("half", "most", "all")),
            *(middle([getattr(x, name) for x in sent]) for name in ("half", "most", "all")),
            f"{middle([o.turned_away / max(1, o.turned_away + o.transfers) for o in outcomes]):.0%}",
            round(time.process_time() - began),
        )
        for violation in broken:
            print(f"{nodes} nodes: {violation}", file=sys.stderr)
    if options.plot:
        draw(options.plot, options.nodes, found)


if __name__ == "__main__":
    main()
