"""Errors as OpenAI's clients know them: a status, and an object with message, type, param and code."""

import json
from typing import Any

from aiohttp import web

from p2pmodel.domain.errors import Busy, InvalidInput, NotFound, P2PModelError, PeerFailed, Unreachable, UsageError

RETRY_SECONDS = 5


class ApiError(Exception):
    """An answer other than 200. param: the request's field that is at fault."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return web.json_response(self.body(), status=self.status, headers=headers, dumps=dumps)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def translated(error: P2PModelError) -> ApiError:
    """A network's or a user's error, as the client is told it."""
    message = str(error)
    if isinstance(error, InvalidInput | UsageError):
        return bad_request(message)
    if isinstance(error, NotFound):
        return ApiError(404, message, code="model_not_found", param="model")
    if isinstance(error, Busy):
        return ApiError(429, message, code="rate_limit_exceeded", retry=RETRY_SECONDS)
    if isinstance(error, Unreachable):
        return ApiError(503, message, code="layers_not_served", retry=RETRY_SECONDS)
    if isinstance(error, PeerFailed):
        return ApiError(503, message, code="peer_failed", retry=RETRY_SECONDS)
    return ApiError(500, message)


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _type(status: int) -> str:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    return kinds.get(status) or ("invalid_request_error" if status < 500 else "server_error")
