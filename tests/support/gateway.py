"""A gateway's HTTP server in the test's own loop, with an answerer and a status that need no swarm."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from p2pmodel.domain.errors import InvalidInput, NotFound, P2PModelError
from p2pmodel.gateway.access import Keys
from p2pmodel.gateway.api import Api
from p2pmodel.gateway.feed import Feed
from p2pmodel.gateway.pages import Pages
from p2pmodel.gateway.ports import Answer, Offer, Piece, Request, TokenScore, Usage
from p2pmodel.gateway.server import HttpServer
from p2pmodel.gateway.turnstile import Turnstile

WORDS = ("one ", "two ", "three ", "four")
HOSTILE = "<img src=x onerror=alert(1)>"


def peer(letter: str) -> str:
    return "12D3KooW" + letter * 44


class Parrot:
    """Implements `Answerer`: says WORDS to everybody, a word each time that `step` lets it. `open` counts the answers
    that were begun and not left."""

    def __init__(self, *, chat: bool = True, error: P2PModelError | None = None, after: int = 0) -> None:
        self.step: Callable[[], Any] = lambda: asyncio.sleep(0)
        self.requests: list[Request] = []
        self.open = 0
        self._chat, self._error, self._after = chat, error, after

    def offers(self) -> Sequence[Offer]:
        return [self._offer("1.0.1", True), self._offer("1.0.1", False), self._offer("1.0.0", False)][::2]

    def find(self, model: str) -> Offer:
        name, _, number = model.partition("@")
        if name != "parrot" or number not in ("", "1.0.0", "1.0.1"):
            raise NotFound(f"There is no model {model} here.")
        return self._offer(number or "1.0.1", not number)

    @contextlib.asynccontextmanager
    async def answer(self, offer: Offer, request: Request) -> AsyncIterator[Answer]:
        if request.messages is not None and not self._chat:
            raise InvalidInput("The tokenizer has no chat template.")
        self.requests.append(request)
        usage = Usage(prompt=3)

        async def pieces() -> AsyncIterator[Piece]:
            for number, word in enumerate(WORDS):
                for index in range(request.answers):
                    await self.step()
                    if self._error is not None and number == self._after:
                        raise self._error
                    last = "stop" if word is WORDS[-1] else None
                    usage.completion += 1
                    yield Piece(index, word, _scores(word, request), last)

        self.open += 1
        try:
            yield Answer(pieces(), usage)
        finally:
            self.open -= 1

    def _offer(self, number: str, head: bool) -> Offer:
        return Offer("parrot", "ab" * 32, number, head, 1, True, self._chat, 128)


def _scores(word: str, request: Request) -> tuple[TokenScore, ...]:
    if request.top_logprobs is None:
        return ()
    return (TokenScore(word, word.encode(), -0.5, ((word, word.encode(), -0.5),)[: request.top_logprobs]),)


@contextlib.asynccontextmanager
async def gateway(
    parrot: Parrot, *, keys: Keys | None = None, places: int = 4, waiting: int = 4, status: dict[str, Any] | None = None
) -> AsyncIterator[HttpServer]:
    feed = Feed()

    async def source() -> dict[str, Any]:
        return dict(status or {})

    if status is not None:
        feed.begin(source)
    routes = [
        *Api(parrot, Turnstile(places, waiting), keys).routes(),
        *Pages(feed, lambda: b"x 1\n", chat=True).routes(),
    ]
    server = await HttpServer.start("127.0.0.1", 0, routes)
    try:
        yield server
    finally:
        await server.stop()


def sample_status() -> dict[str, Any]:
    """A model with a history, whose peers have chosen names that would do harm as HTML."""
    hosts = [("A", 0, 4, 12), ("B", 0, 4, 3), ("C", 4, 8, 7), ("D", 8, 12, 0), ("E", 6, 12, 5)]
    versions = [_version(number) for number in range(1, 7)]
    return {
        "software": "p2pmodel/0.1.0",
        "model": {
            "id": "ff" * 32,
            "name": "starter",
            "architecture": "llama",
            "licence": HOSTILE,
            "layers": 12,
            "maintainers": [peer("A"), peer("B"), peer("C")],
            "threshold": 2,
            "head": {"id": versions[-1]["id"], "number": "1.0.6"},
            "served": {"id": versions[-1]["id"], "number": "1.0.6"},
        },
        "coverage": [2, 2, 2, 2, 1, 1, 2, 2, 2, 2, 2, 2],
        "leases": [
            {
                "peer": peer(letter),
                "start": start,
                "end": end,
                "versions": [{"id": versions[-1]["id"], "number": "1.0.6"}],
                "dtype": "fp32",
                "layer_seconds": 0.0004 * (1 + number),
                "queue": queue,
                "moving": [4, 8] if letter == "E" else None,
            }
            for number, (letter, start, end, queue) in enumerate(hosts)
        ],
        "peers": [{"peer": peer(letter), "roles": ["host"], "software": "p2pmodel/0.1.0"} for letter, *_ in hosts]
        + [{"peer": peer("F"), "roles": [HOSTILE], "software": HOSTILE}],
        "here": {"peer": peer("A"), "began": 1_790_000_000, "sessions": 3, "tokens": 100},
        "requests": {"at_work": 3, "waiting": 0, "answered": 1204},
        "chat": True,
        "join": f"p2pmodel join --peers /ip4/192.0.2.7/tcp/7000/p2p/{peer('A')}",
        "round": {
            "number": 7,
            "phase": "voting",
            "since": 1_790_000_000,
            "threshold": 2,
            "wanted": 3,
            "open_seconds": 3600.0,
            "patches": [_patch(number) for number in range(3)],
            "candidates": [
                {
                    "id": "cc" * 32,
                    "number": "1.0.7",
                    "proposer": peer("B"),
                    "patches": [_patch(0)["id"], _patch(1)["id"]],
                    "left_out": [{"patch": _patch(2)["id"], "reason": "worse on stdlib by 2.1 %"}],
                    "verdicts": [{"maintainer": peer("B"), "accept": True, "reason": ""}],
                }
            ],
        },
        "versions": versions,
    }


def _patch(number: int) -> dict[str, Any]:
    return {
        "id": f"{number:02x}" * 32,
        "contributor": peer("ABC"[number % 3]),
        "kind": "ia3",
        "samples": 120 + 40 * number,
        "licence": HOSTILE if number == 2 else "Apache-2.0",
        "claimed": [2.314, 2.201 - 0.02 * number],
    }


def _version(number: int) -> dict[str, Any]:
    losses = {"stdlib": 0.93, "prose": 1.21, "numbers": 1.08}
    return {
        "id": f"{number + 16:02x}" * 32,
        "number": f"1.0.{number}",
        "round": number,
        "strategy": "fisher@1",
        "alpha": 1.0,
        "patches": [_patch(n) for n in range(3)],
        "left_out": [],
        "verdicts": [{"maintainer": peer(letter), "accept": True, "reason": ""} for letter in "AB"],
        "scores": [
            {
                "domain": name,
                "base": loss,
                "parent": loss * 0.985 ** (number - 1),
                "candidate": loss * 0.985**number * (1.004 if name == "numbers" and number == 3 else 1),
                "mean": loss * 0.987**number,
            }
            for name, loss in losses.items()
        ],
    }
