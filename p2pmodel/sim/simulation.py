"""A swarm in virtual time: peers that decide as real nodes do, in a world in which goes wrong what a scenario says. The
same scenario and seed give the same history.

Simulated are messages, delays, transfers, deaths, partitions, clocks and lies. A peer that lacks nothing asks nobody
here, as nothing would come of it; its questions are counted all the same.
"""

import random

from p2pmodel.domain.ids import Digest, PeerId, VersionId
from p2pmodel.domain.swarm import LEASE_SECONDS
from p2pmodel.logic.propagation import Fetch
from p2pmodel.logic.round_state import Examine, Propose
from p2pmodel.sim.book import Book, Entry, bits, digest
from p2pmodel.sim.clock import Clock
from p2pmodel.sim.liars import LyingMaintainer
from p2pmodel.sim.network import Web
from p2pmodel.sim.peer import Peer
from p2pmodel.sim.record import Record
from p2pmodel.sim.scenario import Partition, Range, Scenario
from p2pmodel.sim.swarm import Conditions, VirtualSwarm

ASK_SECONDS = 4.0
"""Between two questions of a peer to others what they have, as `node.community` asks."""
CONNECT_SECONDS = 5.0
"""Until a peer that does not answer is given up."""
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class Simulation:
    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario, self.seed = scenario, seed
        self.chance = random.Random(seed)
        self.clock, self.record = Clock(), Record()
        swarm = scenario.swarm
        self.web = Web(self.chance, swarm.nodes, scenario.network)
        ids = [self._new_id() for _ in range(swarm.nodes)]
        maintainers = tuple(sorted(ids[: swarm.maintainers]))
        self.book = Book(scenario.name, scenario.schedule, maintainers, swarm.accepting)
        self.peers = [self._make(number, id) for number, id in enumerate(ids)]
        self.number_of = {peer.id: peer.number for peer in self.peers}
        self.worse = {p.number for p in self.trainers[: round(scenario.liars.contributors * swarm.contributors)]}
        self.forgers = [] if not scenario.liars.forgers else [p.number for p in self.peers[-scenario.liars.forgers :]]
        self.seconds = 3600 * scenario.hours
        self.stirs_until = self.seconds - 60 * scenario.settle_minutes
        self._holders: dict[int, list[int]] = {}
        self._there: dict[int, int] = {0: 0}
        self._uploads = [0] * swarm.nodes
        self.present, self._came = [0.0] * swarm.nodes, [0.0] * swarm.nodes
        self.hosts = self._host()
        self._begin()

    @property
    def trainers(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.trains]

    def honest(self, peer: Peer) -> bool:
        return not isinstance(peer, LyingMaintainer) and peer.number not in self.forgers

    def run(self, seconds: float) -> None:
        self.clock.run(seconds)

    def finish(self) -> None:
        """What is counted over the time that peers were there is complete after this."""
        for peer in self.peers:
            if self.web.up[peer.number]:
                self.present[peer.number] += self.clock.now - self._came[peer.number]

    # What peers draw.

    def draw_clock(self) -> tuple[float, float]:
        clocks, uniform = self.scenario.clocks, self.chance.uniform
        return 1 + uniform(-clocks.drift, clocks.drift), uniform(-clocks.skew_seconds, clocks.skew_seconds)

    def draw(self, span: Range) -> float:
        return self.chance.uniform(*span)

    def seconds_of(self, task: Propose | Examine) -> float:
        work = self.scenario.work
        return self.draw(work.propose_seconds if isinstance(task, Propose) else work.examine_seconds)

    def work_fails(self) -> bool:
        failure = self.scenario.work.failure
        return failure > 0 and self.chance.random() < failure

    def doubts(self) -> bool:
        return self.chance.random() < self.scenario.work.doubt

    # What peers do to each other.

    def publish(self, peer: Peer, entry: Entry) -> None:
        if not peer.stored >> entry.number & 1:
            peer.take_in(entry)
            self._announce(peer, entry.number)

    def _announce(self, peer: Peer, number: int) -> None:
        """To all; those whom it does not reach find it when they ask."""
        times, numbers = self.web.spread(peer.number, self.clock.now)
        holder = peer.id
        self.clock.in_turn(times, numbers, lambda to: self._hears(to, number, holder))
        for missed in set(range(len(self.peers))).difference(numbers):
            if self.web.up[missed]:
                self.wake_up(self.peers[missed])

    def _hears(self, to: int, number: int, holder: PeerId) -> None:
        if self.web.up[to]:
            self.peers[to].hear(number, holder)

    def fetch(self, peer: Peer, fetch: Fetch, sources: tuple[PeerId, ...]) -> None:
        """From the first source that has it, and time for it."""
        seconds, number, web, busy = 0.0, self.book.number_of.get(fetch.digest), self.web, False
        for source in sources:
            other = self.number_of.get(source, -1)
            web.sent[peer.number] += 1
            if other < 0 or not web.reach(peer.number, other):
                seconds += CONNECT_SECONDS
                continue
            trip = web.delay(peer.number, other) + web.delay(other, peer.number)
            web.sent[other] += 1
            if self._uploads[other] >= self.scenario.network.uploads:
                self.record.turned_away += 1
                busy = True
            elif number is not None and self.peers[other].stored >> number & 1 and not web.fails():
                entry = self.book.entries[number]
                self._uploads[other] += 1
                web.sent[peer.number] += entry.blobs
                web.sent[other] += entry.blobs
                seconds += trip * (1 + entry.blobs) + entry.size / self.scenario.network.bytes_per_second
                self.clock.after(seconds, self._fetched, peer, peer.lives, fetch, entry, other)
                return
            seconds += trip
        self.clock.after(seconds, self._not_fetched, peer, peer.lives, fetch, busy)

    def _fetched(self, peer: Peer, lives: int, fetch: Fetch, entry: Entry, other: int) -> None:
        self._uploads[other] -= 1
        if lives != peer.lives:
            return
        if self.web.reach(peer.number, other):
            self.record.transfers += 1
            peer.fetched(fetch, entry)
        else:
            peer.not_fetched(fetch, has_not=True)

    def _not_fetched(self, peer: Peer, lives: int, fetch: Fetch, busy: bool) -> None:
        if lives == peer.lives:
            peer.not_fetched(fetch, has_not=not busy)

    def wake_up(self, peer: Peer) -> None:
        """It lacks something: its questions matter, until they have brought all that there is."""
        if not peer.asking and self._lacks(peer):
            peer.asking = True
            self.clock.after(self.chance.uniform(0.0, ASK_SECONDS), self._ask, peer, peer.lives)

    def _lacks(self, peer: Peer) -> bool:
        return bool(self._there.get(int(self.web.side[peer.number]), 0) & ~peer.seen)

    def _ask(self, peer: Peer, lives: int) -> None:
        if lives != peer.lives:
            return
        peer.asking = False
        if not self._lacks(peer):
            return
        self._question(peer, self.chance.randrange(len(self.peers)))
        peer.asking = True
        self.clock.after(ASK_SECONDS * self.chance.uniform(0.75, 1.25), self._ask, peer, lives)

    def _question(self, peer: Peer, other: int) -> None:
        self.record.questions += 1
        if other == peer.number or not self._sees(peer, self.peers[other]):
            return
        if not self.web.reach(peer.number, other) or self.web.fails():
            return
        named = self.peers[other].stored & ~peer.seen
        self.web.sent[peer.number] += bool(named)
        self.web.sent[other] += bool(named)
        if named:
            trip = 2 * (self.web.delay(peer.number, other) + self.web.delay(other, peer.number))
            self.clock.after(trip, self._answered, peer, peer.lives, named, self.peers[other].id)

    def _answered(self, peer: Peer, lives: int, named: int, holder: PeerId) -> None:
        if lives == peer.lives:
            peer.hear_all(named, holder)

    def _sees(self, peer: Peer, other: Peer) -> bool:
        """Whether the other's presence is valid by this peer's clock."""
        age = self.chance.uniform(0.0, LEASE_SECONDS / 3)
        return other.offset + LEASE_SECONDS - age > peer.offset

    def find(self, peer: Peer, wanted: int) -> None:
        """Asks one peer after the other, until these records have been named."""
        for other in self.chance.sample(range(len(self.peers)), len(self.peers)):
            if other != peer.number and self.web.reach(peer.number, other) and self.peers[other].stored & wanted:
                self._question(peer, other)
                return

    # Who holds what.

    def stores(self, peer: Peer, number: int) -> None:
        side = int(self.web.side[peer.number])
        self._holders.setdefault(number, [0, 0])[side] += 1
        self._there[side] = self._there.get(side, 0) | 1 << number

    def _genuine(self, peer: Peer) -> int:
        """What it holds that others take in: nobody lacks a forgery."""
        return peer.stored & ~self.book.forgeries

    def _count_holders(self) -> None:
        """Anew, when sides or lives have changed."""
        self._holders, self._there = {}, {0: 0, 1: 0}
        for peer in self.peers:
            if self.web.up[peer.number]:
                for number in bits(self._genuine(peer)):
                    self.stores(peer, number)

    def moved_head(self, peer: Peer, before: VersionId) -> None:
        now, record, honest = self.clock.now, self.record, self.honest(peer)
        for version in reversed(peer.chain.versions):
            if version.id == before:
                break
            first = record.proofs.setdefault(version.id, now)
            record.versions_of.setdefault(version.candidate.round, set()).add(version.id)
            seconds = now - max(first, peer.since)
            if honest:
                record.reached.append(seconds)
                if seconds > record.slowest[0]:
                    record.slowest = (
                        seconds,
                        f"peer {peer.number} took {seconds:.1f} s to version {version.candidate.number}",
                    )
        if peer.trains:
            self._train(peer)

    # What they do of their own.

    def _train(self, peer: Peer) -> None:
        head = peer.chain.head
        if head not in peer.trained_on and self.clock.now < self.stirs_until:
            self.clock.after(self.draw(self.scenario.work.train_seconds), self._trained, peer, peer.lives, head)

    def _trained(self, peer: Peer, lives: int, parent: VersionId) -> None:
        stale = lives != peer.lives or parent != peer.chain.head or parent in peer.trained_on
        if stale or self.clock.now >= self.stirs_until:
            return
        peer.trained_on.add(parent)
        good, size = peer.number not in self.worse, self.scenario.work.patch_bytes
        self.publish(peer, self.book.patch(peer.id, parent, size, good=good, salt=str(self.seed)))

    def _forge(self, peer: Peer) -> None:
        if self.clock.now >= self.stirs_until:
            return
        if self.web.up[peer.number]:
            salt = f"{peer.id} {self.clock.now}"
            times, numbers = self.web.spread(peer.number, self.clock.now)
            if self.chance.random() < 0.5:
                victim = self.chance.choice(self.book.manifest.maintainers)
                entry = self.book.forgery(peer.id, victim, peer.chain, salt)
                peer.stored |= 1 << entry.number
                self.clock.in_turn(times, numbers, lambda to: self._hears(to, entry.number, peer.id))
            else:
                nothing = digest(salt)
                self.clock.in_turn(times, numbers, lambda to: self._hears_of_nothing(to, nothing, peer.id))
        self.clock.after(self._gap(3600 / self.scenario.liars.forgeries_per_hour), self._forge, peer)

    def _hears_of_nothing(self, to: int, nothing: Digest, holder: PeerId) -> None:
        if self.web.up[to]:
            self.peers[to].hear_of_nothing(nothing, holder)

    # The world.

    def _new_id(self) -> PeerId:
        return PeerId("12D3KooW" + "".join(self.chance.choices(BASE58, k=44)))

    def _make(self, number: int, id: PeerId) -> Peer:
        swarm = self.scenario.swarm
        maintains = number < swarm.maintainers
        trains = not maintains and number < swarm.maintainers + swarm.contributors
        lies = self.scenario.liars
        most = max(lies.maintainers, lies.spoilers, lies.leapers, lies.amenders)
        if swarm.maintainers - most <= number < swarm.maintainers:
            return LyingMaintainer(self, number, id, swarm.maintainers - number)
        return Peer(self, number, id, maintains=maintains, trains=trains)

    def _begin(self) -> None:
        scenario = self.scenario
        for peer in self.peers:
            self.clock.after(self.chance.uniform(0.0, scenario.swarm.join_seconds), self._comes, peer)
        for number in self.forgers:
            self.clock.after(self._gap(3600 / scenario.liars.forgeries_per_hour), self._forge, self.peers[number])
        for partition in scenario.partitions:
            self.clock.after(60 * partition.at_minutes, self._part, partition)
            self.clock.after(60 * (partition.at_minutes + partition.minutes), self._heal)
        if scenario.churn:
            self.clock.after(scenario.swarm.join_seconds + self._gap(self._calm()), self._goes)

    def _host(self) -> VirtualSwarm | None:
        hosting = self.scenario.hosting
        if hosting is None:
            return None
        least, most = hosting.capacity
        conditions = Conditions(layers=hosting.layers, capacity=(int(least), int(most)))
        hosts = VirtualSwarm(self.seed, conditions, self.clock)
        hosts.join(hosting.nodes, over_seconds=60)
        if self.scenario.churn:
            life = 3600 * self.scenario.churn.mean_life_hours
            self.clock.after(180, lambda: hosts.churn(self.stirs_until - 180, life))
        return hosts

    def _gap(self, mean: float) -> float:
        return self.chance.expovariate(1 / mean)

    def _calm(self) -> float:
        """The mean seconds between two deaths."""
        assert self.scenario.churn
        return 3600 * self.scenario.churn.mean_life_hours / len(self.peers)

    def _comes(self, peer: Peer) -> None:
        self.web.up[peer.number] = True
        self.web.disturb()
        peer.since = self.clock.now
        self.record.came += 1
        self._came[peer.number] = self.clock.now
        lost = self._there.get(int(self.web.side[peer.number]), 0)
        for number in bits(self._genuine(peer)):
            self.stores(peer, number)
        peer.start()
        if peer.trains:
            self._train(peer)
        if self._lacks(peer):
            self._catch_up(peer)
        if self._genuine(peer) & ~lost:  # it has what nobody else had
            self._wake_all()

    def _catch_up(self, peer: Peer) -> None:
        """It asks those that it comes in by."""
        there = [n for n in self.chance.sample(range(len(self.peers)), min(3, len(self.peers)))]
        for other in there:
            self._question(peer, other)
        self.wake_up(peer)

    def _goes(self) -> None:
        churn, chance = self.scenario.churn, self.chance
        assert churn
        if self.clock.now >= self.stirs_until:
            return
        peer = self.peers[chance.randrange(len(self.peers))]
        if self.web.up[peer.number] and (churn.maintainers or not peer.maintains):
            self._dies(peer)
            away = min(self.draw(churn.away_seconds), max(0.0, self.stirs_until - self.clock.now))
            anew = not peer.maintains and chance.random() < churn.replaced
            self.clock.after(away, self._returns, peer, anew)
        self.clock.after(self._gap(self._calm()), self._goes)

    def _dies(self, peer: Peer) -> None:
        self.present[peer.number] += self.clock.now - self._came[peer.number]
        self.web.up[peer.number] = False
        self.web.disturb()
        self.record.went += 1
        peer.lives += 1
        side = int(self.web.side[peer.number])
        for number in bits(self._genuine(peer)):
            holders = self._holders[number]
            holders[side] -= 1
            if not holders[side]:
                self._there[side] &= ~(1 << number)

    def _returns(self, peer: Peer, anew: bool) -> None:
        if anew:
            del self.number_of[peer.id]
            peer.id = self._new_id()
            self.number_of[peer.id] = peer.number
            peer.stored = peer.backed = 0
            peer.trained_on.clear()
        self._comes(peer)

    def _part(self, partition: Partition) -> None:
        count = self.scenario.swarm.maintainers
        away = self.chance.sample(range(count), partition.maintainers)
        others = range(count, len(self.peers))
        away += self.chance.sample(others, min(len(others), round(partition.share * len(others))))
        self.web.side[away] = 1
        self._cut()

    def _heal(self) -> None:
        self.web.side[:] = 0
        self._cut()
        for peer in self.peers:
            peer.since = max(peer.since, self.clock.now)

    def _cut(self) -> None:
        self.web.disturb(at_once=True)
        self._count_holders()
        self._wake_all()

    def _wake_all(self) -> None:
        for peer in self.peers:
            if self.web.up[peer.number]:
                self.wake_up(peer)
