"""The gateway over the swarm: a peer that only asks, on behalf of HTTP clients."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from p2pmodel.domain.errors import InvalidInput, NotFound, P2PModelError, UsageError
from p2pmodel.domain.experts import ExpertLease
from p2pmodel.domain.ids import PatchId, VersionId
from p2pmodel.domain.swarm import Lease, Presence
from p2pmodel.engine.head import NO_VECTORS, load_head
from p2pmodel.gateway.access import Keys, is_loopback
from p2pmodel.gateway.api import Api
from p2pmodel.gateway.feed import Feed
from p2pmodel.gateway.pages import Pages
from p2pmodel.gateway.ports import Answer, Offer, Piece, Prompt, Request, Usage
from p2pmodel.gateway.server import HttpServer
from p2pmodel.gateway.turnstile import Turnstile
from p2pmodel.logic.routing import coverage
from p2pmodel.node.asking.client import SwarmClient
from p2pmodel.node.asking.private import carries, vectors_of_known
from p2pmodel.node.machine.threads import use_threads
from p2pmodel.node.serving.answering import Writer
from p2pmodel.node.serving.metering import metered, request_counter
from p2pmodel.node.watching.expert_view import ExpertView
from p2pmodel.node.watching.gauges import show_swarm
from p2pmodel.node.watching.lookout import Lookout, Sighting, unexpired
from p2pmodel.node.watching.overview import Overview, requests_view
from p2pmodel.telemetry.gateway import GatewayMetrics

log = logging.getLogger(__name__)

LOOK_SECONDS = 4.0
LEARN_SECONDS = 15.0
MOST_PATCHES = 100
"""That are listed as models."""


@dataclass(frozen=True)
class ServeOptions:
    home: Path | None = None
    model: str | None = None
    peers: tuple[str, ...] = ()
    swarm_key: Path | None = None
    base: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    insecure: bool = False
    answers: int = 64
    waiting: int = 256
    codec: str = ""
    threads: int = 1


async def serve(options: ServeOptions, say: Callable[[str], None]) -> None:
    """Runs a gateway until SIGINT or SIGTERM. Raises P2PModelError."""
    keys = Keys.read(options.api_key_file) if options.api_key_file else None
    if keys is None and not options.insecure and not is_loopback(options.host):
        raise UsageError(
            f"On {options.host} everybody who reaches this machine could use the gateway.",
            "Name a file of keys with --api-key-file, or say --insecure.",
        )
    use_threads(options.threads)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with contextlib.AsyncExitStack() as stack:
        feed, metrics = Feed(), GatewayMetrics()
        turnstile = Turnstile(options.answers, options.waiting, metrics.wait_seconds.observe)
        metrics.at_work.set_function(lambda: turnstile.at_work)
        metrics.waiting.set_function(lambda: turnstile.waiting)
        client = await asyncio.to_thread(
            SwarmClient.connect, options.home, options.peers, options.model, options.base, options.swarm_key
        )
        stack.push_async_callback(asyncio.to_thread, client.close)
        gateway = Gateway(client, options.answers, options.codec, metrics)
        stack.push_async_callback(asyncio.to_thread, gateway.close)
        await gateway.look()
        feed.begin(lambda: gateway.status(turnstile))
        routes = [*Api(gateway, turnstile, keys).routes(), *Pages(feed, metrics.exposition, chat=True).routes()]
        server = await HttpServer.start(options.host, options.port, routes, request_counter(metrics))
        stack.push_async_callback(server.stop)
        offer = gateway.offers()[0]
        say(f"serving {offer.name}@{offer.number} at {server.url}/v1, chat at {server.url}/chat")
        if keys is None and not is_loopback(options.host):
            say("anybody who reaches this address can use it")
        keeping, ended = asyncio.ensure_future(gateway.keep_up()), asyncio.ensure_future(client.daemon_ended())
        stopped = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({keeping, ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            raise P2PModelError(
                f"The P2P daemon of this gateway ended with status {ended.result()}.", "Start it again: p2pmodel serve"
            )
        for task in (keeping, ended):
            task.cancel()
        await asyncio.wait({keeping, ended})
        if stopped.done():
            say("leaving")
        else:
            keeping.result()


class Gateway:
    """Implements `gateway.ports.Answerer`."""

    def __init__(self, client: SwarmClient, answers: int, codec: str, metrics: GatewayMetrics) -> None:
        """answers: how many may be at work at once, each in a thread. Raises InvalidInput for an unknown codec."""
        self._client, self._codec, self._metrics = client, codec, metrics
        client.chain(client.lineage.head, codec)
        self._model = load_head(client.checkpoint, client)
        self._vocabulary = int(client.checkpoint.config.get_text_config().vocab_size)
        self._pool = ThreadPoolExecutor(answers, thread_name_prefix="answer")
        self._leases: Sequence[Lease] = ()
        self._presences: Sequence[Presence] = ()
        self._lookout = Lookout(self._read)
        self._overview = Overview(client.lineage)
        self._experts = ExpertView(client.lineage, self._read_experts, self._overview.named)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    async def look(self) -> None:
        """Raises Unreachable, the first time."""
        self._leases, self._presences = await self._lookout.look()
        lineage = self._client.lineage
        show_swarm(self._metrics, lineage, self._leases, lineage.head, len(self._presences))

    async def _read(self) -> Sighting:
        return await asyncio.to_thread(self._client.look)

    async def _read_experts(self) -> list[ExpertLease]:
        return await asyncio.to_thread(self._client.expert_leases)

    async def keep_up(self) -> None:
        """Follows who serves what, and which versions are adopted, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_again(self.look, LOOK_SECONDS))
            tasks.create_task(_again(lambda: asyncio.to_thread(self._client.refresh), LEARN_SECONDS))

    async def status(self, turnstile: Turnstile) -> dict[str, Any]:
        """Implements `gateway.ports.StatusSource`."""
        await self.look()
        return self._overview.view(self._leases, self._presences) | {
            "here": None,
            "round": None,
            "experts": await self._experts.view(),
            "chat": True,
            "requests": requests_view(turnstile.at_work, turnstile.waiting, turnstile.answered),
        }

    def offers(self) -> list[Offer]:
        """The version that the model's name stands for comes first: the newest one whose layers are all served, so that
        a version that was just adopted is asked for when the hosts have it."""
        lineage = self._client.lineage
        known = [*(version.id for version in reversed(lineage.versions)), VersionId(lineage.model)]
        offers = [self._offer(version) for version in known]
        first = next((offer for offer in offers if offer.available), offers[0])
        waiting = [p for p, noun in lineage.patches.items() if noun.parent == lineage.head and carries(noun)]
        patched = [replace(first, patch=patch) for patch in waiting[:MOST_PATCHES]]
        return [replace(first, head=True), *(offer for offer in offers if offer is not first), *patched]

    def find(self, model: str) -> Offer:
        model, plus, patch = model.partition("+")
        name, _, version = model.partition("@")
        lineage = self._client.lineage
        if name != lineage.manifest.name and name != lineage.model:
            raise NotFound(f"There is no model {name[:64]!r} here.", f"There is: {lineage.manifest.name}.")
        if plus:
            if version:
                raise InvalidInput("A patch has a version of its own to begin from.", f"Ask for {name}+{patch[:64]}.")
            found = lineage.find_patch(patch[:64])
            begins, _ = vectors_of_known(lineage, found)
            return replace(self._offer(begins), patch=found)
        if not version or version == "head":
            return self.offers()[0]
        return self._offer(lineage.find_version(version[:64]))

    @contextlib.asynccontextmanager
    async def answer(self, offer: Offer, request: Request) -> AsyncIterator[Answer]:
        prompts = await asyncio.to_thread(self._encode, request)
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Piece | asyncio.Future[None]] = asyncio.Queue()
        usage = Usage(prompt=sum(ids.shape[1] for ids in prompts))
        writers = [
            self._writer(number, ids, request)
            for number, ids in enumerate(ids for ids in prompts for _ in range(request.choices))
        ]

        def show(piece: Piece) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, piece)

        async def pieces() -> AsyncIterator[Piece]:
            for _ in writers:
                while isinstance(item := await queue.get(), Piece):
                    yield item
                item.result()
            usage.completion = sum(writer.tokens for writer in writers)
            usage.cached = sum(writer.reused for writer in writers[:: request.choices])

        works = [loop.run_in_executor(self._pool, self._write, writer, offer, show) for writer in writers]

        def ended(work: asyncio.Future[None]) -> None:
            if not work.cancelled():
                work.exception()  # looked at, even when whoever waits for it is cancelled twice
            queue.put_nowait(work)

        for work in works:
            work.add_done_callback(ended)
        try:
            yield Answer(pieces(), usage)
        finally:
            if not all(work.done() for work in works):
                cancelling = [asyncio.ensure_future(asyncio.to_thread(writer.cancel)) for writer in writers]
                await asyncio.wait([*works, *cancelling])
            for work in works:
                if not work.cancelled() and (error := work.exception()) is not None:
                    log.info("an answer ended: %s", error)

    def _write(self, writer: Writer, offer: Offer, show: Callable[[Piece], None]) -> None:
        vectors = vectors_of_known(self._client.lineage, PatchId(offer.patch))[1] if offer.patch else NO_VECTORS
        chain = self._client.chain(VersionId(offer.version), self._codec)
        with metered(writer, self._metrics):
            writer.run(self._model, self._client.tokenizer, chain, vectors, show)

    def _writer(self, number: int, ids: Tensor, request: Request) -> Writer:
        room = self._client.room(ids)
        most = room if request.max_tokens is None else min(room, request.max_tokens)
        return Writer(number, ids, most, request.sampling, request.stop, request.top_logprobs)

    def _encode(self, request: Request) -> list[Tensor]:
        """int64 [1, T] each. Raises InvalidInput."""
        for token, _ in request.sampling.logit_bias:
            self._demand_token(token)
        if request.messages is not None:
            encoded = [self._client.encode_chat(request.messages)]
        else:
            encoded = [self._prompt(prompt) for prompt in request.prompts]
        for ids in encoded:
            self._client.room(ids)
        return encoded

    def _prompt(self, prompt: Prompt) -> Tensor:
        if isinstance(prompt, str):
            return self._client.encode(prompt)
        for token in prompt:
            self._demand_token(token)
        return torch.tensor([prompt], dtype=torch.long)

    def _demand_token(self, token: int) -> None:
        if token >= self._vocabulary:
            raise InvalidInput(f"There is no token {token}: this model has {self._vocabulary}.")

    def _offer(self, version: VersionId) -> Offer:
        lineage = self._client.lineage
        return Offer(
            name=lineage.manifest.name,
            version=version,
            number=str(lineage.number(version)),
            head=False,
            created=lineage.manifest.created,
            available=all(coverage(unexpired(self._leases), lineage.manifest.layers, version)),
            chat=self._client.tokenizer.chat_template is not None,
            context=self._client.checkpoint.context,
        )


async def _again(work: Callable[[], Awaitable[None]], seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except P2PModelError as error:
            log.warning("%s", error)
