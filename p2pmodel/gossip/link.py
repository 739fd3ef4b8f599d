"""The node's side of gossip: a child process that is kept alive, told what to do, and asked again after it died."""

import asyncio
import itertools
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from p2pmodel.domain.announcement import MAX_ANNOUNCEMENT_BYTES
from p2pmodel.domain.errors import Busy, NotRunning, P2PModelError, PeerFailed, Rejected
from p2pmodel.domain.ids import check_digest
from p2pmodel.gossip import frames
from p2pmodel.gossip.limits import PUBLISH_BURST, PUBLISH_RATE, TokenBucket
from p2pmodel.gossip.process import ChildProcess
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key

log = logging.getLogger(__name__)

START_SECONDS = 60.0
FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS = 0.5, 30.0
STEADY_SECONDS = 60.0
"""A child that lived so long is restarted as promptly as the first time."""

SEEN_SECONDS = 120.0
"""As long as a record counts as seen: announced again later, it is delivered again."""

MAX_SEEN = 4096
MAX_ADDRESSES = 512
MAX_ADDRESS_CHARACTERS = 256


@dataclass(frozen=True)
class GossipStats:
    """Since the link was made, over all its children. peers: connected now; sent, received: announcements;
    refused: messages of others by reason; restarts: of the child; pid: of the child, None while there is none."""

    peers: int
    sent: int
    received: int
    refused: Mapping[str, int]
    restarts: int
    pid: int | None


class _Outgoing:
    def __init__(self, frame: frames.Publish, done: "asyncio.Future[None]") -> None:
        self.frame = frame
        self.done = done


class GossipLink:
    """Announcements of others come as bytes, valid, once each, never our own."""

    def __init__(
        self, key: Key, on_message: Callable[[bytes], None], *, listen: str = "/ip4/127.0.0.1/tcp/0", psk: bytes = b""
    ) -> None:
        """key: the node's; gossip's own is derived from it. on_message: called in the event loop, must not block.
        listen: a multiaddr; with port 0, the child keeps the port that it was given first. psk: 32 bytes that every
        connection of a private swarm needs, or none."""
        self._key = key.derive("gossip")
        self._on_message = on_message
        self._listen = listen
        self._psk = psk
        self._topics: dict[str, TokenBucket] = {}
        self._addresses_known: OrderedDict[str, None] = OrderedDict()
        self._unanswered: dict[int, _Outgoing] = {}
        self._numbers = itertools.count(1)
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._child: ChildProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._addresses: tuple[str, ...] = ()
        self._peers = self._sent = self._received = self._restarts = 0
        self._refused_before: Counter[str] = Counter()
        self._refused: Mapping[str, int] = {}

    @property
    def peer(self) -> str:
        """The PeerId of gossip's own key."""
        return self._key.peer

    @property
    def addresses(self) -> tuple[str, ...]:
        """Full multiaddrs that the child listens on; empty before the start."""
        return self._addresses

    def stats(self) -> GossipStats:
        refused = self._refused_before + Counter(self._refused)
        pid = self._child.pid if self._child else None
        return GossipStats(self._peers, self._sent, self._received, dict(refused), self._restarts, pid)

    async def start(self, topics: Sequence[str] = ()) -> None:
        """topics: model ids. Raises Busy when the port is taken, UsageError for an address that is none, PeerFailed
        when the child does not come up within 60 s."""
        for topic in topics:
            self._remember(topic)
        child = await self._spawn(self._listen)
        self._supervisor = asyncio.create_task(self._supervise(child), name="gossip")

    async def stop(self) -> None:
        """Returns when the child is gone. Those who wait in `publish` get NotRunning."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._supervisor = None
        for outgoing in self._unanswered.values():
            if not outgoing.done.done():
                outgoing.done.set_exception(_stopped())
        self._unanswered.clear()

    async def subscribe(self, topic: str) -> None:
        """topic: a model id. Raises ValueError when it is none."""
        if topic not in self._topics:
            self._remember(topic)
            if self._child is not None:
                await self._child.send(frames.Subscribe(topic))

    async def connect(self, addresses: Sequence[str]) -> None:
        """Full multiaddrs of other peers' gossip, to be kept connected to; returns before they are."""
        fresh = [address for address in addresses if len(address) <= MAX_ADDRESS_CHARACTERS]
        for address in fresh:
            self._addresses_known[address] = None
            self._addresses_known.move_to_end(address)
        while len(self._addresses_known) > MAX_ADDRESSES:
            self._addresses_known.popitem(last=False)
        if self._child is not None and fresh:
            await self._child.send(frames.Connect(tuple(fresh[-MAX_ADDRESSES:])))

    async def publish(self, topic: str, data: bytes) -> None:
        """Returns when the child has sent it, after waiting for this peer's turn (20 at once, then 5 a second) and, if
        need be, for a new child. Raises ValueError when `data` is over 4096 bytes, Rejected when it is no announcement
        for that model, NotRunning when the link is stopped."""
        if len(data) > MAX_ANNOUNCEMENT_BYTES:
            raise ValueError(f"an announcement of {len(data)} bytes is over the limit of {MAX_ANNOUNCEMENT_BYTES}")
        if self._supervisor is None:
            raise _stopped()
        await self.subscribe(topic)
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._topics[topic].reserve(loop.time()))
        if self._supervisor is None:
            raise _stopped()
        number = next(self._numbers)
        outgoing = self._unanswered[number] = _Outgoing(frames.Publish(number, topic, data), loop.create_future())
        self._is_new(data, loop.time())
        try:
            if self._child is not None:
                await self._child.send(outgoing.frame)
            await outgoing.done
        finally:
            self._unanswered.pop(number, None)

    def _remember(self, topic: str) -> None:
        check_digest(topic, "gossip topic")
        self._topics.setdefault(topic, TokenBucket(PUBLISH_RATE, PUBLISH_BURST))

    async def _spawn(self, listen: str) -> ChildProcess:
        """A child that listens and knows all that we want of it."""
        child = await ChildProcess.start()
        try:
            async with asyncio.timeout(START_SECONDS):
                await child.send(frames.Start(self._key.to_libp2p(), listen, self._psk))
                ready = await child.ready()
        except TimeoutError:
            await child.close()
            raise PeerFailed(f"The gossip process was not ready within {START_SECONDS:.0f} s.") from None
        except BaseException:
            await child.close()
            raise
        self._child, self._addresses = child, ready.addresses
        for topic in tuple(self._topics):
            await child.send(frames.Subscribe(topic))
        if self._addresses_known:
            await child.send(frames.Connect(tuple(self._addresses_known)))
        for outgoing in tuple(self._unanswered.values()):
            await child.send(outgoing.frame)
        return child

    async def _supervise(self, child: ChildProcess) -> None:
        loop = asyncio.get_running_loop()
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            born = loop.time()
            try:
                while message := await child.next():
                    self._handle(message)
                log.warning("the gossip process has ended; starting another")
            except Exception:
                log.exception("gossip has failed; starting another process")
            finally:
                self._child = None
                self._refused_before.update(self._refused)
                self._peers, self._refused = 0, {}
                await child.close()
            if loop.time() - born > STEADY_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            child, backoff = await self._restart(backoff)
            self._restarts += 1

    async def _restart(self, backoff: float) -> tuple[ChildProcess, float]:
        """The new child, and how long to wait before the next one."""
        listen = self._addresses[0].removesuffix(f"/p2p/{self.peer}")
        while True:
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, LAST_BACKOFF_SECONDS)
            try:
                return await self._spawn(listen), backoff
            except Busy:
                listen = self._listen
            except (P2PModelError, OSError) as error:
                log.warning("gossip cannot be restarted, again in %.1f s: %s", backoff, error)

    def _handle(self, message: frames.FromChild) -> None:
        match message:
            case frames.Received(data):
                if self._is_new(data, asyncio.get_running_loop().time()):
                    self._received += 1
                    self._on_message(data)
            case frames.Published(number, refusal):
                self._answer(number, refusal)
            case frames.Status(peers, refused):
                self._peers, self._refused = peers, refused

    def _answer(self, number: int, refusal: str) -> None:
        outgoing = self._unanswered.get(number)
        if outgoing is None or outgoing.done.done():
            return
        if refusal:
            outgoing.done.set_exception(Rejected(refusal, f"This announcement is not fit for its topic ({refusal})."))
        else:
            self._sent += 1
            outgoing.done.set_result(None)

    def _is_new(self, data: bytes, now: float) -> bool:
        """Whether this record was not here within SEEN_SECONDS; from now on it was."""
        digest = canonical.digest(data)
        while self._seen and (len(self._seen) >= MAX_SEEN or next(iter(self._seen.values())) < now - SEEN_SECONDS):
            self._seen.popitem(last=False)
        if digest in self._seen:
            return False
        self._seen[digest] = now
        return True


def _stopped() -> NotRunning:
    return NotRunning("Gossip is stopped.")
