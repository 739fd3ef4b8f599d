"""The pages, what they live on, and /metrics. Files come from `static/` and are read once."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from p2pmodel.gateway.api import STREAM_HEADERS, WRITE_SECONDS
from p2pmodel.gateway.failures import dumps
from p2pmodel.gateway.feed import Feed
from p2pmodel.gateway.ports import Exposition

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
STATUS_FILES = {
    "/": "status.html",
    "/status.css": "status.css",
    **{f"/{name}": name for name in ("status.js", "experts.js", "parts.js")},
}
CHAT_FILES = {"/chat": "chat.html", "/chat.css": "chat.css", "/chat.js": "chat.js"}
COMMON_FILES = {"/common.css": "common.css", "/icon.svg": "icon.svg"}
RETRY_MILLISECONDS = 2000

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Pages:
    def __init__(self, feed: Feed, metrics: Exposition | None, *, chat: bool) -> None:
        self._feed, self._metrics = feed, metrics
        self._files = {**COMMON_FILES, **STATUS_FILES, **(CHAT_FILES if chat else {})}

    def routes(self) -> list[web.RouteDef]:
        routes = [web.get(path, _file(STATIC / name)) for path, name in self._files.items()]
        routes += [web.get("/status.json", self._status), web.get("/events", self._events)]
        if self._metrics:
            routes.append(web.get("/metrics", self._exposed))
        return routes

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(await self._feed.status(), dumps=dumps, headers={"Cache-Control": "no-cache"})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        async with self._feed.watching():
            response = web.StreamResponse(headers=STREAM_HEADERS)
            await response.prepare(request)
            await response.write(f"retry: {RETRY_MILLISECONDS}\n\n".encode())
            async for status in self._feed.changes():
                data = f"event: status\ndata: {dumps(status)}\n\n" if status is not None else ": nothing new\n\n"
                async with asyncio.timeout(WRITE_SECONDS):
                    await response.write(data.encode())
        return response

    async def _exposed(self, request: web.Request) -> web.Response:
        assert self._metrics
        return web.Response(body=self._metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def _file(path: Path) -> Handler:
    body = path.read_bytes()

    async def serve(request: web.Request) -> web.StreamResponse:
        return web.Response(
            body=body, content_type=TYPES[path.suffix], charset="utf-8", headers={"Cache-Control": "no-cache"}
        )

    return serve
