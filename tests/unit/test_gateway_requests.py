"""Bodies of requests: what is taken, and that everything else is a 400 that names the field."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.gateway.failures import ApiError
from p2pmodel.gateway.requests import Call, decode, read_chat, read_completion

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        *("model", "prompt", "messages", "n", "stop", "stream", "stream_options", "seed", "logprobs", "top_logprobs"),
        *("temperature", "top_p", "max_tokens", "logit_bias", "tools", "echo", "frequency_penalty", "user", "nonsense"),
    ]
)


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "p", **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}


def refusal(read: Callable[[dict[str, Any]], Call], body: dict[str, Any]) -> int | None:
    try:
        read(decode(json.dumps(body).encode()))
    except ApiError as error:
        return error.status
    return None


def test_defaults_are_those_of_openai() -> None:
    call = read_completion(completion())
    assert (call.stream, call.usage, call.request.max_tokens, call.request.choices) == (False, False, 16, 1)
    assert (call.request.sampling.temperature, call.request.sampling.top_p) == (1.0, 1.0)
    assert read_chat(chat()).request.max_tokens is None


def test_null_is_as_good_as_nothing() -> None:
    nothing = dict.fromkeys(["n", "stop", "seed", "stream", "stream_options", "logprobs", "tools", "max_tokens"])
    assert read_completion(completion(**nothing)) == read_completion(completion())


def test_prompts_are_texts_or_tokens_or_lists_of_them() -> None:
    for given_prompt, prompts in (
        ("a", ("a",)),
        ([1, 2], ((1, 2),)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ):
        call = read_completion(completion(prompt=given_prompt, n=2))
        assert call.request.prompts == prompts
        assert call.request.answers == 2 * len(prompts)


def test_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = read_chat(chat(messages=[{"role": "user", "content": parts}], max_completion_tokens=7, max_tokens=9))
    assert call.request.messages == ({"role": "user", "content": "ab"},)
    assert call.request.max_tokens == 7


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"n": True}, "n"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"seed": 1 << 64}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 40}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"logprobs": 6}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 200}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"best_of": 4}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_off": 1}, "best_off"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as error:
        read_completion(completion(**fields))
    assert (error.value.status, error.value.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"audio": {}}, "audio"),
    ],
)
def test_so_it_is_with_chats(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as error:
        read_chat(chat(**fields))
    assert (error.value.status, error.value.param) == (400, param)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"\xff\xfe{}", b'{"a": NaN}', b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}", b"null"],
    ids=lambda raw: repr(raw[:12]),
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(ApiError) as error:
        decode(raw)
    assert error.value.status == 400


@given(st.dictionaries(FIELDS, JSON, max_size=6))
def test_no_body_does_worse_than_400(body: dict[str, Any]) -> None:
    for read, whole in ((read_completion, {**completion(), **body}), (read_chat, {**chat(), **body})):
        assert refusal(read, whole) in (None, 400)
