"""What has to hold after every history, and the figures of one."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from p2pmodel.domain.ids import PatchId, short
from p2pmodel.domain.patch import Patch
from p2pmodel.domain.version import Candidate, Verdict
from p2pmodel.logic.lineage import forks
from p2pmodel.logic.rounds import KEPT_EACH
from p2pmodel.sim.book import Chain
from p2pmodel.sim.peer import Peer
from p2pmodel.sim.record import Outcome, Spread
from p2pmodel.sim.scenario import Scenario
from p2pmodel.sim.simulation import ASK_SECONDS, Simulation

QUESTION_MESSAGES = 2
"""That a peer sends for one question of its own, and one that it is asked, when nothing is new."""
PROGRESS_SECONDS = 600.0


def simulate(scenario: Scenario, seed: int, progress: Callable[[float], None] = lambda share: None) -> Outcome:
    """The whole history. progress: is told the share of it that has passed."""
    with _no_collection():
        sim = Simulation(scenario, seed)
        while sim.clock.now < sim.seconds:
            sim.run(min(PROGRESS_SECONDS, sim.seconds - sim.clock.now))
            progress(sim.clock.now / sim.seconds)
        sim.finish()
        return judge(sim)


@contextmanager
def _no_collection() -> Iterator[None]:
    """A simulation makes millions of small objects and hardly a cycle; to look for cycles takes half as long again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def judge(sim: Simulation) -> Outcome:
    """Of a simulation that is over."""
    record, scenario = sim.record, sim.scenario
    chain = _proven(sim)
    fates = _fates(sim, chain)
    outcomes = record.outcomes
    parted = _forks(sim)
    per_minute = _messages(sim)
    hosts = sim.hosts
    gap = hosts.record.longest_gap(300.0, sim.clock.now) if hosts else 0.0
    return Outcome(
        scenario=scenario.name,
        seed=sim.seed,
        nodes=scenario.swarm.nodes,
        hours=scenario.hours,
        versions=len(chain.versions),
        head=str(chain.number),
        rejected=outcomes["Reject"],
        abandoned=outcomes["Abandon"],
        forks=parted,
        patches=sum(fates.values()),
        merged=fates["merged"],
        left_out=fates["left out"],
        late=fates["late"],
        waiting=fates["waiting"],
        reach_seconds=Spread.of(record.reached),
        messages_per_minute=Spread.of(per_minute),
        backlog=record.backlog,
        transfers=record.transfers,
        turned_away=record.turned_away,
        questions=record.questions,
        refused=record.refused,
        misbehaved=len(record.misbehaved),
        went=record.went,
        came=record.came,
        moves=len(hosts.moves) if hosts else 0,
        longest_gap=gap,
        happened=sim.clock.happened,
        violations=tuple(_violations(sim, chain, fates, parted, max(per_minute), gap)),
    )


def _violations(
    sim: Simulation, chain: Chain, fates: dict[str, int], parted: int, busiest: float, gap: float
) -> Iterator[str]:
    limits, record = sim.scenario.limits, sim.record
    for round, versions in sorted(record.versions_of.items()):
        if len(versions) > 1:
            yield f"round {round} adopted {len(versions)} versions"
    if parted > limits.forks:
        yield f"{parted} versions have two adopted children, and {limits.forks} may"
    there = [peer for peer in sim.peers if sim.web.up[peer.number] and sim.honest(peer)]
    behind = [peer for peer in there if _lacks_what_it_had_time_for(peer, chain, sim)]
    if behind:
        at = behind[0].chain.number
        yield f"{len(behind)} of {len(there)} honest nodes have not reached {chain.number}; one of them is at {at}"
    if record.slowest[0] > limits.reach_seconds:
        yield f"{record.slowest[1]}, and {limits.reach_seconds:g} s are allowed"
    if len(chain.versions) < limits.versions:
        yield f"there are {len(chain.versions)} versions, and {limits.versions} have to be"
    if record.backlog > limits.backlog:
        yield f"a node had {record.backlog} entries in its backlog, and {limits.backlog} are allowed"
    if busiest > 60 * limits.messages_per_second:
        yield f"a node sent {busiest / 60:.1f} messages a second, and {limits.messages_per_second:g} are allowed"
    yield from _kept(there, len(sim.book.manifest.maintainers))
    yield from _lost(sim, chain, there)
    done = fates["merged"] + fates["left out"] + fates["late"]
    if fates["merged"] < limits.merged * done:
        yield f"{fates['merged']} of {done} honest patches were merged, and {limits.merged:.0%} have to be"
    if sim.scenario.hosting and gap > sim.scenario.hosting.gap_seconds:
        yield f"a layer had no host for {gap:.0f} s, and {sim.scenario.hosting.gap_seconds:g} are allowed"


def _lacks_what_it_had_time_for(peer: Peer, chain: Chain, sim: Simulation) -> bool:
    """A version may have been proven a moment before the end."""
    proofs, latest = sim.record.proofs, sim.clock.now - sim.scenario.limits.reach_seconds
    missing = (version.id for version in chain.versions if version.id not in peer.chain.parents)
    return any(max(proofs.get(version, 0.0), peer.since) < latest for version in missing)


def _kept(there: list[Peer], maintainers: int) -> Iterator[str]:
    most = KEPT_EACH * maintainers
    for peer in there:
        if len(peer.state.votes) > most or len(peer.state.candidates) > most:
            yield f"peer {peer.number} keeps more than {KEPT_EACH} candidates or votes of a maintainer"
            return


def _lost(sim: Simulation, chain: Chain, there: list[Peer]) -> Iterator[str]:
    everywhere, somewhere = ~0, 0
    for peer in there:
        everywhere &= peer.stored
        somewhere |= peer.stored
    authors = {peer.id for peer in there}
    for entry in sim.book.of(sim.book.patches):
        assert isinstance(entry.noun, Patch)
        known = entry.noun.parent in chain.parents
        author = sim.number_of.get(entry.signer)
        if author is None or not sim.honest(sim.peers[author]) or not known:
            continue
        bit = 1 << entry.number
        if somewhere & bit and not everywhere & bit:
            without = sum(not peer.stored & bit for peer in there)
            yield f"patch {short(entry.digest)} is held by some, and {without} of {len(there)} nodes lack it"
        elif not somewhere & bit and entry.signer in authors:
            yield f"patch {short(entry.digest)} is lost, and its author lives"


def _proven(sim: Simulation) -> Chain:
    """By all records that the nodes hold which are there."""
    stored = backed = 0
    for peer in sim.peers:
        if sim.web.up[peer.number] and sim.honest(peer):
            stored |= peer.stored
    for version in sim.book.candidates:
        backed |= sim.book.backed(stored, version)
    return sim.book.chain(backed)


def _forks(sim: Simulation) -> int:
    book = sim.book
    candidates = {
        entry.version: entry.noun for entry in book.entries if isinstance(entry.noun, Candidate) and entry.version
    }
    verdicts = [entry.noun for entry in book.entries if isinstance(entry.noun, Verdict) and not entry.forged]
    return len(forks(book.manifest, book.model, candidates, verdicts))


def _fates(sim: Simulation, chain: Chain) -> dict[str, int]:
    """What became of the honest patches."""
    merged: set[PatchId] = set()
    left_out: set[PatchId] = set()
    for version in chain.versions:
        merged.update(version.candidate.patches)
        left_out.update(entry.patch for entry in version.candidate.left_out)
    fates = dict.fromkeys(("merged", "left out", "late", "waiting"), 0)
    for entry in sim.book.of(sim.book.patches):
        assert isinstance(entry.noun, Patch)
        if entry.good:
            waits = entry.noun.parent == chain.head
            fate = "merged" if entry.digest in merged else "left out" if entry.digest in left_out else "late"
            fates["waiting" if waits else fate] += 1
    return fates


def _messages(sim: Simulation) -> list[float]:
    """A minute, by peer; with the questions that nobody has anything to say to."""
    idle = QUESTION_MESSAGES * 60 / ASK_SECONDS
    sent = sim.web.sent.tolist()
    return [60 * sent[n] / seconds + idle for n, seconds in enumerate(sim.present) if seconds > 0]
