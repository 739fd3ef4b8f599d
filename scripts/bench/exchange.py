"""Whether every node comes to hold every patch when packets are lost, and after how long.

    python scripts/bench/exchange.py [--nodes 12] [--loss 0.1] [--delay 5] [--rate 100] [--seconds 180]     (as root)

Every node is a process of its own in its own network namespace (`wan.py`), so gossip, anti-entropy and transfers all
lose packets alike. Each publishes one patch, all at the same time. A node holds a patch when its home has the record
and both blobs, checked. Without losses the same is measured first.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
import wan

from p2pmodel.cli.localswarm import LocalSwarm, NodeProcess
from p2pmodel.domain.ids import Digest
from p2pmodel.domain.patch import Patch, Provenance, Recipe
from p2pmodel.node.lineages.intake import take_in
from p2pmodel.node.lineages.lineage import Lineage, known_lineages
from p2pmodel.node.lineages.states import version_state
from p2pmodel.store.home import Home
from p2pmodel.tensors import blob, compact
from p2pmodel.wire import bundle, canonical

START_SECONDS = 240.0
POLL_SECONDS = 0.2
RECIPE = Recipe(seed=0, steps=1, batch=1, sequence=8, optimizer="none", learning_rate=0.0, fisher_examples=1)


def new_patch(lineage: Lineage, seed: int) -> bytes:
    """A patch file of this home's key, whose values are drawn by chance."""
    chance, key = torch.Generator().manual_seed(seed), lineage.home.key
    state = version_state(lineage, lineage.head)
    adapter = blob.pack({n: t + 0.01 * torch.randn(t.shape, generator=chance) for n, t in state.items()})
    fisher = blob.pack(compact.encode({n: torch.rand(t.shape, generator=chance) for n, t in state.items()}))
    refs = (canonical.blob_ref(adapter), canonical.blob_ref(fisher))
    patch = Patch(
        key.peer, lineage.model, lineage.head, "ia3@1", *refs, 1, 1.0, 1.0, "", Provenance((), RECIPE, (), 1, ())
    )
    return bundle.pack(key.sign("patch", patch), adapter, fisher)


def lineage_of(home: Home) -> Lineage:
    (lineage,) = known_lineages(home)
    return lineage


def holds(home: Home, patch: Digest, model: Digest) -> bool:
    return any(row.record.digest == patch for row in home.index.records(model, "patch"))


def measure(nodes: int, delay: float, rate: float, loss: float, seconds: float) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        wan.Network(nodes, delay, rate, loss) as network,
        LocalSwarm(Path(folder)) as swarm,
    ):
        began = time.monotonic()
        started: list[NodeProcess] = []
        for number in range(nodes):
            peers = ("--peers", started[0].address) if started else ()
            with network.inside(number):
                node = swarm.start(
                    f"node-{number}", "--layers", "none", "--threads", "1", "--host", network.address(number), *peers
                )
            started.append(node)
            if number == 0:
                node.wait_until_serving(began + START_SECONDS)
        for node in started:
            node.wait_until_serving(began + START_SECONDS)
        print(f"{nodes} nodes, {loss:.0%} of packets lost: started after {time.monotonic() - began:.0f} s", flush=True)
        homes = [Home.open(node.home) for node in started]
        model = lineage_of(homes[0]).model
        files = [new_patch(lineage_of(home), number) for number, home in enumerate(homes)]
        patches = [take_in(lineage_of(home), raw).digest for home, raw in zip(homes, files, strict=True)]
        began = time.monotonic()
        for node, patch in zip(started, patches, strict=True):
            with node.control() as client:
                client.publish(patch)
        missing = {(number, patch) for number in range(nodes) for patch in patches}
        times: list[float] = []
        while missing and time.monotonic() - began < seconds:
            here = {(number, patch) for number, patch in missing if holds(homes[number], patch, model)}
            times += [time.monotonic() - began] * len(here)
            missing -= here
            time.sleep(POLL_SECONDS)
        of_others = sorted(times)[nodes:] or [0.0]
        print(
            f"  {len(times)} of {nodes * nodes} are held; half of what came from others after "
            f"{statistics.median(of_others):.1f} s, 95 % after {of_others[int(0.95 * (len(of_others) - 1))]:.1f} s, "
            f"all after {of_others[-1]:.1f} s" + (f"; {len(missing)} still missing" if missing else ""),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=12)
    parser.add_argument("--loss", type=float, default=0.1, help="share of packets that are lost")
    parser.add_argument("--delay", type=float, default=5.0, help="milliseconds, one way")
    parser.add_argument("--rate", type=float, default=100.0, help="Mbit/s, of each node, in each direction")
    parser.add_argument("--seconds", type=float, default=180.0, help="to wait for all patches")
    asked = parser.parse_args()
    if reason := wan.missing():
        raise SystemExit(f"No network can be emulated here: {reason}.")
    for loss in dict.fromkeys((0.0, asked.loss)):
        measure(asked.nodes, asked.delay / 1e3, asked.rate * 1e6, loss, asked.seconds)


if __name__ == "__main__":
    main()
