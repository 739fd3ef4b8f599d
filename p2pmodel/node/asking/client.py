"""A peer that only asks: it routes a request through the swarm, and holds no more than embeddings and head.

The network runs on a loop in a thread of its own, so that `generate()` can block in the caller's.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from p2pmodel import starter
from p2pmodel.domain.errors import InvalidInput, PeerFailed
from p2pmodel.domain.experts import ExpertLease
from p2pmodel.domain.ids import Digest, VersionId
from p2pmodel.domain.modular import NONE, experts_in, united
from p2pmodel.domain.swarm import Lease, Presence, Route
from p2pmodel.engine.cache import attends_only
from p2pmodel.engine.checkpoint import Checkpoint, load_tokenizer, load_whole
from p2pmodel.engine.data.encoding import encode_prompt
from p2pmodel.engine.family import errors_only, first_line
from p2pmodel.engine.head import NO_VECTORS, load_head, using_vectors
from p2pmodel.node.asking.connecting import Connector
from p2pmodel.node.asking.inference import RoutedChain, RoutedSession
from p2pmodel.node.asking.private import private_vectors
from p2pmodel.node.asking.router import Router
from p2pmodel.node.asking.tape import RoutedTape
from p2pmodel.node.lineages.bases import Part, find_base, open_base
from p2pmodel.node.lineages.contacts import contacts, remember_contacts
from p2pmodel.node.lineages.discovery import bootstrap_peers, swarm_lineage
from p2pmodel.node.lineages.exchange import Exchange
from p2pmodel.node.lineages.lineage import Lineage
from p2pmodel.node.machine.loop_thread import LoopThread
from p2pmodel.store.home import Home
from p2pmodel.swarm.chain_client import ChainClient
from p2pmodel.swarm.directory import Directory
from p2pmodel.swarm.host import PeerHost
from p2pmodel.tensors.codecs import get_codec
from p2pmodel.wire.swarm_key import SwarmKey

log = logging.getLogger(__name__)

REFRESH_SECONDS = 30.0


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; draft: the folder of a small model that guesses ahead, or `auto` for that of the starter
    model, so that several tokens are had in one round trip. The answer is the same (speculative decoding, Leviathan et
    al., 2023)."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    draft: str | None = None


@dataclass(frozen=True)
class Answer:
    """bytes_sent and bytes_received are the client's own activations, beside what stages sent each other;
    reused_tokens: of the prompt, which the stages had computed for an earlier session; spread_gates: how often the
    weight of an expert that nobody hosted went to others. experts: the share of each of the version's modular experts,
    as a mean over the layers, and of none of them by the name `none`; empty where there are none, and for an answer
    that ended before the routers decided."""

    text: str
    tokens: int
    model: str
    version: VersionId
    number: str
    route: Route
    route_text: str
    failovers: int
    bytes_sent: int
    bytes_received: int
    reused_tokens: int
    seconds: float
    spread_gates: int = 0
    experts: tuple[tuple[str, float], ...] = ()


class SwarmClient:
    """A context manager. Made by `connect`."""

    def __init__(
        self, home: Home, peers: tuple[str, ...], model: str | None, base: Path | None, swarm_key: SwarmKey | None
    ) -> None:
        self._loop = LoopThread("swarm")
        self._host: PeerHost | None = None
        self._chain: ChainClient | None = None
        self._router: Router | None = None
        try:
            self._host = self._loop.wait(PeerHost.start(None, bootstrap=peers, client_only=True, swarm_key=swarm_key))
            known = bootstrap_peers(peers)
            self.lineage: Lineage = self._loop.wait(swarm_lineage(home, self._host, known, model))
            # One for good: it knows what is being fetched already, and what was refused.
            self._exchange = Exchange(self._host, self.lineage, _Nobody(), kinds=("candidate", "verdict"))
            self._directory = Directory(self._host, self.lineage.model)
            self._chain = ChainClient(self._host)
            self._chain.start()
            self._router = Router(self._host, self._directory, self._chain, self.lineage.manifest.layers)
            folder_of_base = find_base(home, self.lineage, base, part=Part.HEAD)
            self.checkpoint: Checkpoint = open_base(self.lineage, folder_of_base)
            self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.checkpoint.path)
            self._model: PreTrainedModel | None = None
            self._routed: RoutedChain | None = None
            self._drafts: dict[str, PreTrainedModel] = {}
            self._encoding = threading.Lock()  # tokenizers refuse two threads at once
            self._longest_token = max(map(len, self.tokenizer.get_vocab()))
            self._known = known
            self.refresh()
            remember_contacts(home, peers)
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(
        cls,
        home: Path | None,
        peers: tuple[str, ...],
        model: str | None,
        base: Path | None,
        swarm_key: Path | None = None,
    ) -> "SwarmClient":
        """With no peers named: the node on this home, or else the peers that answered last. swarm_key: see
        `Home.swarm_key`. Raises Unreachable, and NotFound and InvalidInput for the key."""
        folder = Home.open(home)
        key = folder.swarm_key(swarm_key)
        return cls(folder, peers or contacts(folder), model, base, key)

    def __enter__(self) -> "SwarmClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def refresh(self) -> None:
        """Learns the versions that have been adopted since, each with its proof."""

        async def ask() -> None:
            for peer in dict.fromkeys((*self._known, *await self._started.peers())):
                try:
                    await self._exchange.ask(peer)
                    return await self._exchange.settle(REFRESH_SECONDS)
                except PeerFailed as error:
                    log.warning("%s", error)

        self._loop.wait(ask())

    def generate(
        self,
        text: str,
        sampling: Sampling,
        version: str,
        codec: str,
        show: Callable[[str], None],
        patch: str | None = None,
    ) -> Answer:
        """Continues the text; `show` is given the answer piece by piece. patch: see `node.asking.private`; it stands
        for the version.

        Raises InvalidInput for a prompt that leaves no room in the context, Unreachable naming the layers that nobody
        serves.
        """
        wanted, vectors = (
            (self.lineage.find_version(version), NO_VECTORS) if patch is None else private_vectors(self.lineage, patch)
        )
        ids = self.encode(text)
        new_tokens = min(self.room(ids), sampling.max_new_tokens)
        chain = self._routed = self.chain(wanted, codec)
        if self._model is None:
            self._model = load_head(self.checkpoint, self)
        began = time.monotonic()
        torch.manual_seed(sampling.seed)
        options: dict[str, Any] = (
            {"do_sample": False}
            if sampling.temperature == 0
            else {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        )
        with errors_only(), using_vectors(vectors):
            out = self._model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                streamer=_Pieces(self.tokenizer, show),
                assistant_model=self._draft(sampling.draft) if sampling.draft else None,
                **options,
            )
        session = chain.last
        assert session is not None
        assert session.route is not None
        sent, received = session.traffic
        session.close()
        answer = out[0, ids.shape[1] :]
        return Answer(
            text=str(self.tokenizer.decode(answer, skip_special_tokens=True)),
            tokens=len(answer),
            model=self.lineage.manifest.name,
            version=wanted,
            number=str(self.lineage.number(wanted)),
            route=session.route,
            failovers=session.failovers,
            route_text=" → ".join(f"{h.span} at {h.peer[-8:]}" for h in session.route.hops),
            bytes_sent=sent,
            bytes_received=received,
            reused_tokens=session.reused_tokens,
            seconds=time.monotonic() - began,
            spread_gates=session.spread_gates,
            experts=self._shares(wanted, vectors, session),
        )

    def _shares(
        self, version: VersionId, own: Mapping[str, Tensor], session: RoutedSession
    ) -> tuple[tuple[str, float], ...]:
        experts = united(self.lineage.experts(version), experts_in({name: tuple(t.shape) for name, t in own.items()}))
        names = [*(expert.name for expert in experts), NONE]
        if session.shares is None or session.shares.shape[1] != len(names):
            return ()
        return tuple(zip(names, session.shares[0].tolist(), strict=True))

    def encode(self, text: str) -> Tensor:
        """[1, T] of token ids. Raises InvalidInput when there are more characters than the context has room for,
        whatever they say."""
        self._check_length(text)
        with self._encoding:
            return torch.tensor([encode_prompt(self.tokenizer, text)], dtype=torch.long)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> Tensor:
        """[1, T] of a conversation, by the tokenizer's chat template. Raises InvalidInput."""
        if self.tokenizer.chat_template is None:
            raise InvalidInput(
                f"The tokenizer of {self.lineage.manifest.name} has no chat template.", "Ask for completions instead."
            )
        try:
            turns = [dict(message) for message in messages]
            text = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidInput(f"The chat template does not take these messages: {first_line(error)}.") from None
        self._check_length(text)
        with self._encoding:
            ids: Tensor = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        return ids.long()

    def _check_length(self, text: str) -> None:
        """Before it is cut into tokens, since that takes seconds a megabyte."""
        longest = self._longest_token
        if len(text) > longest * self.checkpoint.context:
            raise InvalidInput(
                f"The prompt has {len(text)} characters, and {self.lineage.manifest.name} reads "
                f"{self.checkpoint.context} tokens at most, of {longest} characters at most, answer included.",
                "Shorten it.",
            )

    def room(self, ids: Tensor) -> int:
        """How many tokens may follow those of a prompt [1, T]. Raises InvalidInput when it is empty or too long."""
        if ids.shape[1] == 0:
            raise InvalidInput(
                "The prompt is empty, and this model has no token to begin with.", "Write at least one word."
            )
        room = self.checkpoint.context - ids.shape[1]
        if room < 1:
            raise InvalidInput(
                f"The prompt has {ids.shape[1]} tokens, but {self.lineage.manifest.name} "
                f"reads {self.checkpoint.context} "
                "at most, answer included.",
                "Shorten it.",
            )
        return room

    async def daemon_ended(self) -> int:
        """Its status, when this peer's daemon has ended. May be awaited on any loop."""
        return await asyncio.wrap_future(self._loop.submit(self._started.ended()))

    def look(self) -> tuple[list[Lease], list[Presence]]:
        """Who serves what, and who is there, now. Raises Unreachable."""

        async def read() -> tuple[list[Lease], list[Presence]]:
            return await self._directory.leases(), await self._directory.presences()

        return self._loop.wait(read())

    def expert_leases(self) -> list[ExpertLease]:
        """Who serves experts apart from their layers, now. Raises Unreachable."""
        return self._loop.wait(self._directory.expert_leases())

    def chain(self, version: VersionId, codec: str) -> RoutedChain:
        """What the layers of a model at `version` are replaced by. Raises InvalidInput for an unknown codec."""
        router = self._router
        assert router is not None
        return RoutedChain(
            Connector(
                self._chain_client,
                lambda banned, stopped: self._loop.wait(router.find(version, banned), stopped),
                router.suspect,
                self.lineage.model,
                version,
                get_codec(codec),
                chunked=attends_only(self.checkpoint.config),
                stack=self.checkpoint.stack,
            )
        )

    def _draft(self, named: str) -> PreTrainedModel:
        """A causal LM of the same tokens that runs here, ahead of the swarm. Raises InvalidInput when it is not."""
        if named in self._drafts:
            return self._drafts[named]
        if not attends_only(self.checkpoint.config):
            raise InvalidInput(
                f"Layers of type {self.checkpoint.architecture} cannot take back what a draft got wrong.",
                "Leave --draft out.",
            )
        folder = Path(named)
        if named == "auto":
            if self.checkpoint.path != starter.MODEL:
                raise InvalidInput(
                    f"No draft of {self.lineage.manifest.name} is known.",
                    "Name the folder of a small model with the same tokenizer: --draft DIR",
                )
            folder = starter.DRAFT
        draft = load_whole(folder)
        ours, theirs = self.checkpoint.config.get_text_config().vocab_size, draft.config.vocab_size
        if ours != theirs:
            raise InvalidInput(
                f"The draft in {folder} has {theirs} tokens, and {self.lineage.manifest.name} has {ours}.",
                "A draft needs the same tokenizer as the model.",
            )
        self._drafts[named] = draft
        return draft

    @property
    def route(self) -> Route | None:
        """Of the generation under way, or else of the last one; None before the first."""
        session = self._routed.last if self._routed else None
        return session.route if session else None

    def open(
        self, max_tokens: int, rows: int, rewinds: bool, vectors: Mapping[str, Tensor] = NO_VECTORS
    ) -> RoutedSession:
        """Implements `engine.head.RemoteChain`: a session at the version of the generation under way."""
        assert self._routed is not None
        return self._routed.open(max_tokens, rows, rewinds, vectors)

    def tape(self) -> RoutedTape:
        """Implements `engine.head.RemoteChain`."""
        assert self._routed is not None
        return self._routed.tape()

    def close(self) -> None:
        """Closing twice is closing once. In the loop's own thread, which cannot wait for itself, it is left to another
        one."""
        if self._loop.closed:
            return
        if self._loop.is_current:
            threading.Thread(target=self.close, name="closing", daemon=True).start()
            return
        with contextlib.ExitStack() as stack:  # each of them, whatever the others raise
            stack.callback(self._loop.close)
            if self._host is not None:
                stack.callback(lambda: self._loop.wait(self._started.stop()))
            if self._chain is not None:
                stack.callback(self._chain.stop)
            if self._router is not None:
                router = self._router
                stack.callback(lambda: self._loop.wait(router.close()))

    @property
    def _started(self) -> PeerHost:
        assert self._host is not None
        return self._host

    @property
    def _chain_client(self) -> ChainClient:
        assert self._chain is not None
        return self._chain


class _Nobody:
    """Implements `exchange.Observer` for a peer that keeps no rounds."""

    async def on_record(self, kind: str, digest: Digest) -> None:
        log.debug("%s %s came in", kind, digest)

    def on_refused(self, kind: str, reason: str) -> None:
        log.debug("a %s is refused: %s", kind, reason)


class _Pieces(TextStreamer):
    """Hands on text as soon as it can't change any more."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._show(text)
