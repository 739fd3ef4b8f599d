"""The bodies of requests: from bytes to a `Request`, or a 400 that names the field.

What is not supported is refused rather than ignored, unless leaving it out changes no answer (`IGNORED`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from p2pmodel.gateway.failures import bad_request
from p2pmodel.gateway.ports import Message, Prompt, Request, Sampling

MAX_CHOICES = 16
MAX_PROMPTS = 32
MAX_MESSAGES = 2048
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 1024
CHAT_LOGPROBS, COMPLETION_LOGPROBS = 20, 5
COMPLETION_TOKENS = 16
"""What OpenAI's completions make when they are not told how many."""

IGNORED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"})
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
"""Fields that are taken only at values that ask for nothing."""


@dataclass(frozen=True)
class Call:
    """A request, and how its answer is to be sent. usage: whether a stream ends with a chunk about it."""

    model: str
    request: Request
    stream: bool
    usage: bool


def decode(raw: bytes) -> dict[str, Any]:
    """A body as a JSON object. Raises ApiError 400."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise bad_request("The body is not valid UTF-8.") from None
    try:
        body = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise bad_request("The body is nested too deeply.") from None
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}.") from None
    if not isinstance(body, dict):
        raise bad_request("The body has to be a JSON object.")
    return body


def read_chat(body: dict[str, Any]) -> Call:
    fields = _Fields(body)
    messages = _messages(fields.take("messages"))
    wanted = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", None, 0, CHAT_LOGPROBS)
    if top is not None and not wanted:
        raise bad_request("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")
    limit = fields.integer("max_completion_tokens", None, 1, 1 << 20)
    older = fields.integer("max_tokens", None, 1, 1 << 20)
    return _call(fields, (), messages, limit if limit is not None else older, (top or 0) if wanted else None)


def read_completion(body: dict[str, Any]) -> Call:
    fields = _Fields(body)
    prompts = _prompts(fields.take("prompt"))
    logprobs = fields.integer("logprobs", None, 0, COMPLETION_LOGPROBS)
    limit = fields.integer("max_tokens", COMPLETION_TOKENS, 1, 1 << 20)
    return _call(fields, prompts, None, limit, logprobs)


def _call(
    fields: "_Fields",
    prompts: tuple[Prompt, ...],
    messages: tuple[Message, ...] | None,
    max_tokens: int | None,
    top_logprobs: int | None,
) -> Call:
    model = fields.take("model")
    if not isinstance(model, str) or not model or len(model) > 256:
        raise bad_request("`model` has to be the name of a model: see /v1/models.", "model")
    stream = fields.boolean("stream", False)
    usage = _usage(fields.take("stream_options"), stream)
    sampling = Sampling(
        temperature=fields.number("temperature", 1.0, 0.0, 2.0),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        logit_bias=_biases(fields.take("logit_bias")),
        seed=fields.integer("seed", None, -(1 << 63), (1 << 63) - 1),
    )
    choices = fields.integer("n", 1, 1, MAX_CHOICES)
    request = Request(
        prompts=prompts,
        messages=messages,
        choices=choices or 1,
        sampling=sampling,
        max_tokens=max_tokens,
        stop=_stops(fields.take("stop")),
        top_logprobs=top_logprobs,
    )
    fields.demand_nothing_else()
    return Call(model, request, stream, usage)


class _Fields:
    """The fields of a body that were not looked at yet. `null` is as good as nothing."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str) -> Any:
        return self._left.pop(name, None)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise bad_request(f"`{name}` has to be true or false.", name)
        return value

    def integer(self, name: str, default: int | None, least: int, most: int) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise bad_request(f"`{name}` has to be a whole number from {least} to {most}.", name)
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise bad_request(f"`{name}` has to be a number from {least:g} to {most:g}.", name)
        return float(value)

    def demand_nothing_else(self) -> None:
        for name, value in self._left.items():
            if name in IGNORED or value in NEUTRAL.get(name, ()):
                continue
            raise bad_request(f"`{name[:64]}` is not supported here.", name[:64], "unsupported_parameter")


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (_text(value, "prompt"),)
    if isinstance(value, list) and value:
        if _is_tokens(value):
            return (tuple(value),)
        if len(value) > MAX_PROMPTS:
            raise bad_request(f"`prompt` has more than {MAX_PROMPTS} prompts.", "prompt")
        if all(isinstance(x, str) or (isinstance(x, list) and x and _is_tokens(x)) for x in value):
            return tuple(_text(x, "prompt") if isinstance(x, str) else tuple(x) for x in value)
    raise bad_request("`prompt` has to be a text, a list of token ids, or a list of these.", "prompt")


def _is_tokens(value: list[Any]) -> bool:
    return all(type(x) is int and 0 <= x < 1 << 31 for x in value)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise bad_request(f"`messages` has to be a list of 1 to {MAX_MESSAGES} messages.", "messages")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(value))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str) or len(value["role"]) > 64:
        raise bad_request(f"`{where}` has to be an object with `role` and `content`.", where)
    for name, given in value.items():
        if name not in ("role", "content", "name") and given:
            raise bad_request(f"`{where}.{name[:64]}` is not supported here.", f"{where}.{name[:64]}")
    content = value.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise bad_request("Only parts of type `text` are supported here.", f"{where}.content")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise bad_request(f"`{where}.content` has to be a text.", f"{where}.content")
    message = {"role": value["role"], "content": _text(content, f"{where}.content")}
    if isinstance(value.get("name"), str):
        message["name"] = value["name"]
    return message


def _text(value: str, where: str) -> str:
    """JSON can hold halves of surrogate pairs, which are no text."""
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise bad_request(f"`{where}` is not valid Unicode.", where)
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(s, str) and 1 <= len(s) <= MAX_STOP_CHARACTERS for s in stops)
    ):
        raise bad_request(
            f"`stop` has to be a text, or a list of at most {MAX_STOPS}, of 1 to {MAX_STOP_CHARACTERS} characters.",
            "stop",
        )
    return tuple(stops)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    try:
        if not isinstance(value, dict) or len(value) > MAX_BIASES:
            raise ValueError
        biases = tuple((int(token), float(bias)) for token, bias in value.items())
        if not all(token >= 0 and math.isfinite(bias) and abs(bias) <= 100 for token, bias in biases):
            raise ValueError
    except (ValueError, TypeError):
        raise bad_request(
            f"`logit_bias` has to be a map of at most {MAX_BIASES} token ids to numbers from -100 to 100.", "logit_bias"
        ) from None
    return biases


def _usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise bad_request("`stream_options` needs `stream` to be true.", "stream_options")
    if not isinstance(value, dict) or not set(value) <= {"include_usage", "include_obfuscation"}:
        raise bad_request("`stream_options` takes `include_usage` only.", "stream_options")
    if not isinstance(value.get("include_usage", False), bool):
        raise bad_request("`stream_options.include_usage` has to be true or false.", "stream_options.include_usage")
    return bool(value.get("include_usage"))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
