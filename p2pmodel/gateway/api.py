"""/v1: models, completions and chat completions, whole or as a stream of server-sent events."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import web

from p2pmodel.domain.errors import P2PModelError
from p2pmodel.gateway import requests
from p2pmodel.gateway.access import Keys
from p2pmodel.gateway.failures import ApiError, dumps, translated
from p2pmodel.gateway.ports import Answer, Answerer, Piece
from p2pmodel.gateway.replies import Reply, model_entry, model_list
from p2pmodel.gateway.requests import Call
from p2pmodel.gateway.turnstile import Turnstile

log = logging.getLogger(__name__)

BODY_SECONDS = 20.0
"""For a client to send its body."""
WRITE_SECONDS = 30.0
"""For a client to take what it was sent."""
STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


class Api:
    def __init__(self, answerer: Answerer, turnstile: Turnstile, keys: Keys | None) -> None:
        self._answerer, self._turnstile, self._keys = answerer, turnstile, keys

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self._models),
            web.get("/v1/models/{model}", self._model),
            web.post("/v1/completions", self._completions),
            web.post("/v1/chat/completions", self._chat),
        ]

    async def _models(self, request: web.Request) -> web.Response:
        self._demand_key(request)
        return web.json_response(model_list(self._answerer.offers()), dumps=dumps)

    async def _model(self, request: web.Request) -> web.Response:
        self._demand_key(request)
        name = request.match_info["model"]
        entry = model_entry(self._answerer.find(name))
        return web.json_response({**entry, "id": name}, dumps=dumps)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, requests.read_completion, chat=False)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, requests.read_chat, chat=True)

    async def _answer(
        self, request: web.Request, read: Callable[[dict[str, Any]], Call], *, chat: bool
    ) -> web.StreamResponse:
        self._demand_key(request)
        call = read(requests.decode(await _body(request)))
        offer = self._answerer.find(call.model)
        async with self._turnstile.admitted(call.request.answers), self._answerer.answer(offer, call.request) as answer:
            reply = Reply(offer.title, offer.version, chat=chat, scored=call.request.top_logprobs is not None)
            if call.stream:
                return await self._stream(request, call, answer, reply)
            pieces = [piece async for piece in answer.pieces]
            return web.json_response(reply.whole(pieces, call.request.answers, answer.usage), dumps=dumps)

    async def _stream(self, request: web.Request, call: Call, answer: Answer, reply: Reply) -> web.StreamResponse:
        """The status is sent with the first piece, so that what fails before it has a status of its own."""
        first = await anext(answer.pieces, None)
        response = web.StreamResponse(headers=STREAM_HEADERS)
        await response.prepare(request)
        try:
            if first is not None:
                async for piece in _chained(first, answer.pieces):
                    await _send(response, reply.chunk(piece))
            if call.usage:
                await _send(response, reply.usage_chunk(answer.usage))
        except P2PModelError as error:
            await _send(response, translated(error).body())
        await _write(response, b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _demand_key(self, request: web.Request) -> None:
        if self._keys is not None:
            self._keys.demand(request)


async def _body(request: web.Request) -> bytes:
    if request.content_type != "application/json":
        raise ApiError(415, "The body has to be JSON: Content-Type: application/json")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.read()
    except TimeoutError:
        raise ApiError(408, f"The body did not come within {BODY_SECONDS:.0f} seconds.") from None


async def _chained(first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    yield first
    async for piece in rest:
        yield piece


async def _send(response: web.StreamResponse, body: dict[str, Any]) -> None:
    await _write(response, f"data: {dumps(body)}\n\n".encode())


async def _write(response: web.StreamResponse, data: bytes) -> None:
    """Raises ConnectionResetError when the client is gone, or does not read."""
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await response.write(data)
    except TimeoutError:
        raise ConnectionResetError("The client does not read.") from None
