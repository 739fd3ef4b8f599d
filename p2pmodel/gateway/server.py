"""The HTTP server: what is the same for every request, starting and stopping."""

import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError

from p2pmodel.domain.errors import Busy, NotRunning, P2PModelError, UsageError
from p2pmodel.gateway.access import HEADERS, demand_own_page
from p2pmodel.gateway.failures import ApiError, bad_request, translated

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 << 20
HEADER_SECONDS = 30.0
"""For a client to say what it wants, and between two requests on one connection."""
STOP_SECONDS = 2.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Answered = Callable[[str, int], None]


class _NotOfClients(logging.Filter):
    """What is no HTTP, or cannot be decoded, is its sender's fault: it gets an answer, and the log no traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


_http_log = logging.getLogger(f"{__name__}.http")
_http_log.addFilter(_NotOfClients())


class HttpServer:
    """Made by `start`; `url` is where it is, with the port that port 0 became."""

    def __init__(self, runner: web.AppRunner, url: str) -> None:
        self._runner, self.url = runner, url

    @classmethod
    async def start(
        cls, host: str, port: int, routes: Sequence[web.RouteDef], answered: Answered = lambda _, __: None
    ) -> "HttpServer":
        """answered: is told route and status of every request, `other` where there is no such route.

        Raises Busy when the port is in use, UsageError when the address cannot be listened on."""
        app = web.Application(middlewares=[_guard(host, answered)], client_max_size=MAX_BODY_BYTES)
        app.add_routes(routes)
        app.on_response_prepare.append(_with_headers)
        runner = web.AppRunner(
            app,
            access_log=None,
            logger=_http_log,
            keepalive_timeout=HEADER_SECONDS,
            handler_cancellation=True,  # a client that hangs up ends its answer
            shutdown_timeout=STOP_SECONDS,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, reuse_address=True).start()
        except (OSError, OverflowError) as error:
            await runner.cleanup()
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise Busy(f"Port {port} is in use.", "Choose another; 0 takes a free one.") from None
            reason = error.strerror if isinstance(error, OSError) else "it is no port"
            raise UsageError(f"HTTP cannot be served on {host}:{port}: {reason}.") from None
        name = f"[{host}]" if ":" in host else host
        return cls(runner, f"http://{name}:{runner.addresses[0][1]}")

    async def stop(self) -> None:
        await self._runner.cleanup()


def _guard(host: str, answered: Answered) -> Any:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            demand_own_page(request, host)
            response = await handler(request)
        except ApiError as error:
            response = error.response()
        except NotRunning as error:
            response = ApiError(503, str(error), retry=1).response()
        except P2PModelError as error:
            response = translated(error).response()
        except web.RequestPayloadError:
            response = bad_request("The body is not as its headers say: it cannot be decoded.").response()
            response.force_close()  # where the next request begins is not known
        except web.HTTPException as error:
            response = _refusal(error).response()
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except (ConnectionResetError, TimeoutError):
            log.debug("a client hung up, or did not read")
            raise
        resource = request.match_info.route.resource
        answered("other" if resource is None else resource.canonical, response.status)
        return response

    return guard


async def _with_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


def _refusal(error: web.HTTPException) -> ApiError:
    said = {
        404: "There is nothing here: the API is at /v1, the status at /.",
        405: "This cannot be done with this method.",
        413: f"The body has more than {MAX_BODY_BYTES} bytes.",
    }
    return ApiError(error.status, said.get(error.status, error.reason))
