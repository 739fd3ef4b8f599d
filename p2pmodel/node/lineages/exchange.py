"""Brings in the records of a lineage that this node hears of, by gossip or by asking peers what they have.

What to fetch next, and from whom, is `p2pmodel.logic.propagation`'s to say.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection
from typing import Protocol, TypeVar

from p2pmodel.domain.announcement import RECORD_KINDS
from p2pmodel.domain.errors import P2PModelError, PeerFailed, Rejected, StorageError, Unreachable
from p2pmodel.domain.ids import Digest, PeerId, short
from p2pmodel.domain.model import BlobRef
from p2pmodel.logic import propagation
from p2pmodel.logic.propagation import Backlog, Fetch
from p2pmodel.node.lineages import intake
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.swarm.blobs import BlobFetcher
from p2pmodel.swarm.host import PeerHost
from p2pmodel.swarm.sync import missing

T = TypeVar("T")
log = logging.getLogger(__name__)

PARALLEL_FETCHES = 8
MAX_REFUSED = 10_000
IDLE_SECONDS = 1.0
ORPHAN_TRIES = 5
"""After so many, half a minute or more, a record whose parent has not come counts as refused; it is still tried."""


class Observer(Protocol):
    """Who wants to know what comes in and what does not."""

    async def on_record(self, kind: str, digest: Digest) -> None: ...

    def on_refused(self, kind: str, reason: str) -> None: ...


class Exchange:
    def __init__(
        self, host: PeerHost, lineage: Lineage, observer: Observer, *, kinds: Collection[str] = RECORD_KINDS
    ) -> None:
        """kinds: the kinds of records that this peer has a use for."""
        self._host, self._lineage, self._observer, self._kinds = host, lineage, observer, kinds
        self._fetcher = BlobFetcher(host, lineage.home.objects.sink)
        self._backlog = Backlog()
        self._refused: dict[Digest, None] = {}
        self._misnamed: dict[tuple[str, Digest], None] = {}
        self._brought: dict[Digest, set[Digest]] = {}
        self._needed: dict[Digest, frozenset[Digest]] = {}
        self._storing = asyncio.Lock()
        self._orphans: set[Digest] = set()
        self._overdue: set[Digest] = set()
        self._changed = asyncio.Event()
        self._fetches: set[asyncio.Task[None]] = set()

    @property
    def bytes_received(self) -> int:
        return self._fetcher.bytes_received

    @property
    def blobs_received(self) -> int:
        return self._fetcher.received

    def hear(self, kind: str, record: BlobRef, holder: PeerId) -> None:
        """A peer says that it has a record."""
        if kind not in self._kinds or self._lineage.knows(record.digest):
            return
        if record.digest in self._refused or (kind, record.digest) in self._misnamed:
            return
        if record.size > intake.record_limit(self._lineage, kind):
            self._observer.on_refused(kind, "size")
            return
        self._backlog = propagation.want(self._backlog, record.digest, kind, holder, record.size, time.monotonic())
        self._changed.set()

    async def ask(self, peer: PeerId) -> int:
        """Asks a peer for all that is not here; returns how many records it named. Raises PeerFailed."""
        known = [*self._lineage.known_records(), *self._refused]
        try:
            named = await missing(self._host, peer, self._lineage.model, known)
        except Rejected as error:
            raise PeerFailed(error.message, peer) from None
        for kind, ref in named:
            self.hear(kind, ref, peer)
        return len(named)

    async def run(self) -> None:
        """Fetches, until cancelled."""
        while True:
            self._changed.clear()
            self._begin_fetches()
            wake = propagation.next_due(self._backlog)
            patience = IDLE_SECONDS if wake is None else min(IDLE_SECONDS, max(0.02, wake - time.monotonic()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):  # wait_for of Python 3.11 may swallow that the task is cancelled
                    await self._changed.wait()

    async def settle(self, seconds: float) -> None:
        """Fetches until nothing is left to fetch at once, or time is up."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._begin_fetches()
            if not self._fetches:
                return
            await asyncio.wait(self._fetches, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)

    def _begin_fetches(self) -> None:
        self._backlog, fetches = propagation.due(self._backlog, time.monotonic(), PARALLEL_FETCHES)
        for fetch in fetches:
            task = asyncio.create_task(self._fetch(fetch))
            self._fetches.add(task)
            task.add_done_callback(self._fetches.discard)

    async def _fetch(self, fetch: Fetch) -> None:
        try:
            await self._take_in(fetch)
        except Rejected as error:
            if error.reason == "parent":
                return self._put_off(fetch, error)  # what it stands on may still come
            log.warning("%s %s is refused: %s", fetch.kind, short(fetch.digest), error.message)
            self._observer.on_refused(fetch.kind, error.reason)
            self._refuse(fetch)
        except StorageError as error:
            log.error("%s", error)
            self._fail(fetch)
        except Unreachable as error:
            log.info("%s %s: %s", fetch.kind, short(fetch.digest), error.message)
            self._fail(fetch, has_not=True)  # whoever has it will name it again
        except P2PModelError as error:
            log.info("%s %s can't be fetched: %s", fetch.kind, short(fetch.digest), error.message)
            self._fail(fetch)
        except Exception:  # nobody awaits the task, and the place has to be free again
            log.exception("%s %s could not be taken in", fetch.kind, short(fetch.digest))
            self._fail(fetch)
        finally:
            self._needed.pop(fetch.digest, None)
            self._discard_given_up()
            self._changed.set()

    async def _take_in(self, fetch: Fetch) -> None:
        await self._bring(BlobRef(fetch.digest, fetch.size), fetch)
        record = self._lineage.home.objects.load(fetch.digest, intake.record_limit(self._lineage, fetch.kind))
        refs = intake.needed_blobs(self._lineage, fetch.kind, record)
        self._needed[fetch.digest] = frozenset(ref.digest for ref in refs)
        for ref in refs:
            await self._bring(ref, fetch)
        async with self._storing:
            intake.needed_blobs(self._lineage, fetch.kind, record)  # once more, with what has come in since
            await asyncio.to_thread(intake.store, self._lineage, fetch.kind, record, refs)
            self._lineage.refresh()
        self._brought.pop(fetch.digest, None)
        self._backlog = propagation.done(self._backlog, fetch.digest)
        if fetch.kind != "patch":  # which nothing stands on
            self._backlog = propagation.stir(self._backlog, self._orphans, time.monotonic())
            self._orphans.clear()
        if fetch.kind == "candidate":
            self._reconsider(intake.named_patches(record))
        await self._observer.on_record(fetch.kind, fetch.digest)

    async def _bring(self, ref: BlobRef, fetch: Fetch) -> None:
        if not self._lineage.home.objects.has(ref.digest):
            await self._fetcher.fetch(ref, propagation.sources(self._backlog, fetch))
            self._brought.setdefault(fetch.digest, set()).add(ref.digest)

    def _put_off(self, fetch: Fetch, error: Rejected) -> None:
        if len(self._orphans) < MAX_REFUSED:
            self._orphans.add(fetch.digest)
        entry = self._backlog.entries.get(fetch.digest)
        overdue = entry is not None and entry.failures >= ORPHAN_TRIES
        if overdue and fetch.digest not in self._overdue and len(self._overdue) < MAX_REFUSED:
            self._overdue.add(fetch.digest)
            log.warning("%s %s goes on waiting: %s", fetch.kind, short(fetch.digest), error.message)
            self._observer.on_refused(fetch.kind, error.reason)
        self._fail(fetch)

    def _fail(self, fetch: Fetch, *, has_not: bool = False) -> None:
        self._backlog = propagation.failed(self._backlog, fetch.digest, fetch.holder, time.monotonic(), has_not=has_not)

    def _refuse(self, fetch: Fetch) -> None:
        """Remembered, so that it is not fetched again from everybody who has it. What was called something else than it
        is, by whoever named it first, is refused under that name alone."""
        if intake.is_of_kind(self._lineage, fetch.kind, fetch.digest):
            _remember(self._refused, fetch.digest)
        else:
            _remember(self._misnamed, (fetch.kind, fetch.digest))
        self._backlog = propagation.done(self._backlog, fetch.digest)

    def _reconsider(self, patches: Collection[Digest]) -> None:
        """Of a patch that a maintainer's candidate names, it no longer matters whether its contributor has another one,
        or whether it came too late for the round's room here."""
        for patch in patches:
            self._refused.pop(patch, None)

    def _discard_given_up(self) -> None:
        """Removes what was brought in for records that are refused, or that nobody has any more: never what was here
        before, or belongs to a record that is."""
        given_up = [record for record in self._brought if record not in self._backlog]
        if not given_up:
            return
        kept = {ref.digest for ref in self._lineage.blobs()}.union(*self._needed.values())
        for record in given_up:
            for digest in self._brought.pop(record) - kept:
                if not self._lineage.knows(digest):
                    self._lineage.home.objects.remove(digest)


def _remember(known: dict[T, None], new: T) -> None:
    known[new] = None
    if len(known) > MAX_REFUSED:
        del known[next(iter(known))]
