"""The gateway as HTTP clients see it, with an answerer that needs no swarm."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from p2pmodel.domain.errors import Busy, InvalidInput, NotFound, PeerFailed, Unreachable, UsageError
from p2pmodel.gateway import api, server
from p2pmodel.gateway.access import Keys
from tests.support.gateway import WORDS, Parrot, gateway, sample_status
from tests.support.waiting import soon

KEY = "a-key-of-this-test-0001"
COMPLETION: dict[str, Any] = {"model": "parrot", "prompt": "hi"}
CHAT: dict[str, Any] = {"model": "parrot", "messages": [{"role": "user", "content": "hi"}]}
SAID = "".join(WORDS)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def client(url: str, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


async def test_openais_own_client_is_content() -> None:
    async with gateway(Parrot()) as running, client(running.url) as ai:
        assert [model.id for model in (await ai.models.list()).data] == ["parrot", "parrot@1.0.1", "parrot@1.0.0"]
        assert (await ai.models.retrieve("parrot@1.0.0")).id == "parrot@1.0.0"
        whole = await ai.completions.create(model="parrot", prompt=["a", "b"], n=2, logprobs=1)
        assert [choice.text for choice in whole.choices] == [SAID] * 4
        assert whole.model == "parrot@1.0.1"
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 16)
        logprobs = whole.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens == list(WORDS)
        assert logprobs.text_offset == [0, 4, 8, 14]
        spoken = await ai.chat.completions.create(**CHAT, logprobs=True, top_logprobs=1)
        assert spoken.choices[0].message.content == SAID
        assert spoken.choices[0].finish_reason == "stop"
        assert spoken.choices[0].logprobs is not None
        assert spoken.choices[0].logprobs.content is not None
        assert spoken.choices[0].logprobs.content[0].top_logprobs[0].bytes == list(b"one ")


async def test_its_streams_too() -> None:
    async with gateway(Parrot()) as running, client(running.url) as ai:
        texts, usages = ["", ""], []
        options: dict[str, Any] = {"stream_options": {"include_usage": True}}
        async for chunk in await ai.chat.completions.create(**CHAT, n=2, stream=True, **options):
            usages += [chunk.usage] if chunk.usage else []
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == [SAID, SAID]
        assert [usage.completion_tokens for usage in usages] == [8]
        plain = [chunk async for chunk in await ai.completions.create(**COMPLETION, stream=True)]
        assert "".join(chunk.choices[0].text for chunk in plain) == SAID
        assert [chunk.choices[0].finish_reason for chunk in plain] == [None, None, None, "stop"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Unreachable("Nobody serves layers 3:6."), 503),
        (PeerFailed("It broke off."), 503),
        (InvalidInput("Too long."), 400),
        (NotFound("No version."), 404),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_fails_before_the_first_word_has_a_status(
    http: aiohttp.ClientSession, error: Any, status: int, stream: bool
) -> None:
    async with (
        gateway(Parrot(error=error)) as running,
        http.post(f"{running.url}/v1/completions", json={**COMPLETION, "stream": stream}) as reply,
    ):
        assert reply.status == status
        assert (await reply.json())["error"]["message"] == error.message
        assert ("Retry-After" in reply.headers) == (status == 503)


async def test_what_fails_later_is_an_event() -> None:
    parrot = Parrot(error=Unreachable("Nobody serves layers 3:6."), after=2)
    async with gateway(parrot) as running, client(running.url) as ai:
        stream = await ai.completions.create(**COMPLETION, stream=True)
        assert [(await anext(stream)).choices[0].text for _ in range(2)] == ["one ", "two "]
        with pytest.raises(openai.APIError, match="layers 3:6"):
            await anext(stream)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_ends_its_answer(http: aiohttp.ClientSession, stream: bool) -> None:
    parrot, gate = Parrot(), asyncio.Semaphore(2)
    parrot.step = gate.acquire
    async with gateway(parrot, places=1) as running:
        asking = asyncio.create_task(http.post(f"{running.url}/v1/completions", json={**COMPLETION, "stream": stream}))
        await soon(lambda: parrot.open == 1 and gate.locked())
        if stream:
            (await asking).close()
        asking.cancel()
        await asyncio.wait({asking})
        await soon(lambda: parrot.open == 0)
        parrot.step = lambda: asyncio.sleep(0)
        async with http.post(f"{running.url}/v1/completions", json=COMPLETION) as reply:
            assert reply.status == 200


async def test_under_load_clients_are_told_when_to_come_again(http: aiohttp.ClientSession) -> None:
    parrot, gate = Parrot(), asyncio.Semaphore(0)
    parrot.step = gate.acquire
    async with gateway(parrot, places=1, waiting=1) as running:
        url = f"{running.url}/v1/completions"
        asking = [asyncio.create_task(http.post(url, json=COMPLETION)) for _ in range(3)]
        done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        refused = done.pop().result()
        assert refused.status == 429
        assert int(refused.headers["Retry-After"]) >= 1
        for _ in range(8):
            gate.release()
        statuses = sorted([(await task).status for task in asking])
    assert statuses == [200, 200, 429]


async def test_keys(http: aiohttp.ClientSession, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# mine\n{KEY}\n\nanother-key-of-this-test\n")
    async with gateway(Parrot(), keys=Keys.read(file), status=sample_status()) as running:
        for given in (None, "", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", "Bearer ü"):
            headers = {} if given is None else {"Authorization": given}
            for reply in (
                await http.get(f"{running.url}/v1/models", headers=headers),
                await http.post(f"{running.url}/v1/completions", json=COMPLETION, headers=headers),
            ):
                assert reply.status == 401
                assert (await reply.json())["error"]["code"] == "invalid_api_key"
        async with client(running.url, KEY) as ai:
            assert (await ai.completions.create(**COMPLETION)).choices[0].text == SAID
        assert (await http.get(f"{running.url}/status.json")).status == 200


@pytest.mark.parametrize("content", ["short\n", "", "# nothing\n", "ümlaut-key-of-this-test\n"])
def test_a_file_without_good_keys_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(InvalidInput):
        Keys.read(tmp_path / "keys")
    with pytest.raises(NotFound):
        Keys.read(tmp_path / "none")


async def test_bad_requests(http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_BODY_BYTES", 1000)
    json_type = {"Content-Type": "application/json"}
    async with gateway(Parrot(chat=False)) as running:
        url = f"{running.url}/v1/completions"
        for data, headers, status in (
            (b"{", json_type, 400),
            (b"\xff", json_type, 400),
            (b"no gzip", {**json_type, "Content-Encoding": "gzip"}, 400),
            (json.dumps(COMPLETION).encode(), {"Content-Type": "text/plain"}, 415),
            (json.dumps({**COMPLETION, "prompt": "x" * 2000}).encode(), json_type, 413),
            (json.dumps({**COMPLETION, "model": "eagle"}).encode(), json_type, 404),
            (json.dumps({**COMPLETION, "n": 5}).encode(), json_type, 400),
        ):
            async with http.post(url, data=data, headers=headers) as reply:
                assert reply.status == status, data
                assert (await reply.json())["error"]["message"]
        async with http.post(f"{running.url}/v1/chat/completions", json=CHAT) as reply:
            assert reply.status == 400
            assert "chat template" in (await reply.json())["error"]["message"]
        async with http.get(url) as reply:
            assert (reply.status, reply.headers["Allow"]) == (405, "POST")
        async with http.get(f"{running.url}/nothing") as reply:
            assert reply.status == 404


@pytest.mark.parametrize(
    "said",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: br\r\nContent-Length: 1\r\n\r\nx",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["no HTTP", "a long header", "an encoding that is not known", "a broken chunk"],
)
async def test_what_is_no_request_is_refused_and_not_logged(said: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with gateway(Parrot()) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))
        writer.write(said)
        assert b" 400 " in await asyncio.wait_for(reader.readline(), 10)
        writer.close()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_body_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "BODY_SECONDS", 0.1)
    async with gateway(Parrot()) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9"
        writer.write(f"{head}\r\n\r\n{{".encode())
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()


async def test_a_client_that_does_not_read_ends_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "WRITE_SECONDS", 0.2)
    monkeypatch.setattr("tests.support.gateway.WORDS", ("x" * (1 << 20),) * 64)  # more than the kernel keeps for it
    parrot = Parrot()
    async with gateway(parrot) as running:
        _, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]), limit=1024)
        body = json.dumps({**COMPLETION, "stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await soon(lambda: parrot.open == 1)
        await soon(lambda: parrot.open == 0)
        writer.close()


async def test_a_connection_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
    async with gateway(Parrot()) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def test_pages_of_others_cannot_use_it(http: aiohttp.ClientSession) -> None:
    async with gateway(Parrot(), status=sample_status()) as running:
        url = f"{running.url}/v1/completions"
        for headers in (
            {"Host": "evil.example"},
            {"Host": "127.0.0.1.evil.example:1"},
            {"Sec-Fetch-Site": "cross-site"},
        ):
            async with http.post(url, json=COMPLETION, headers=headers) as reply:
                assert reply.status == 403
        async with http.get(
            running.url, headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        ) as reply:
            assert reply.status == 200
        for host in ("localhost:1", "[::1]:2", "127.0.0.1"):
            async with http.post(url, json=COMPLETION, headers={"Host": host}) as reply:
                assert reply.status == 200


async def test_every_answer_has_the_headers_that_keep_strangers_out(http: aiohttp.ClientSession) -> None:
    async with gateway(Parrot(), status=sample_status()) as running:
        for path in ("/", "/chat", "/status.json", "/metrics", "/v1/models", "/nothing", "/events"):
            async with http.get(running.url + path) as reply:
                assert reply.headers["Content-Security-Policy"].startswith("default-src 'self'")
                assert reply.headers["X-Content-Type-Options"] == "nosniff"


async def test_a_port_that_is_taken_is_busy_and_one_that_is_left_is_free() -> None:
    async with gateway(Parrot()) as running:
        port = int(running.url.rpartition(":")[2])
        with pytest.raises(Busy, match=str(port)):
            await server.HttpServer.start("127.0.0.1", port, [])
    await (await server.HttpServer.start("127.0.0.1", port, [])).stop()
    with pytest.raises(UsageError, match="cannot be served"):
        await server.HttpServer.start("192.0.2.1", 0, [])


async def test_a_node_that_starts_says_so(http: aiohttp.ClientSession) -> None:
    async with gateway(Parrot()) as running, http.get(f"{running.url}/status.json") as reply:
        assert reply.status == 503
        assert "starting" in (await reply.json())["error"]["message"]
