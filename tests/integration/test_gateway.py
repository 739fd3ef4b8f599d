"""`p2pmodel serve` over real nodes, asked with OpenAI's own client: layers 0:3 and 3:6, twice each."""

import asyncio
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai
import pytest
import torch
from transformers import AutoTokenizer

from p2pmodel import starter
from p2pmodel.cli.localswarm import LocalSwarm, NodeProcess
from p2pmodel.engine.checkpoint import load_whole
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(240)
PROMPT = "def read_lines(path):\n    "
SPANS = ("0:3", "3:6")
PATIENCE = 60.0


class Served:
    """The nodes, and a gateway that is a process of its own."""

    def __init__(self, folder: Path, swarm: LocalSwarm) -> None:
        self._swarm, self._count = swarm, itertools.count()
        self.first = swarm.start("first", "--layers", "none", "--http", "0")
        self.first.wait_until_serving(time.monotonic() + PATIENCE)
        self.hosts: dict[str, list[NodeProcess]] = {span: [] for span in SPANS}
        for span in SPANS * 2:
            self.start(span)
        for host in itertools.chain(*self.hosts.values()):
            host.wait_until_serving(time.monotonic() + PATIENCE)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "p2pmodel", "--log-level", "DEBUG", "serve", "--port", "0", "--codec", "fp32"),
                *("--peers", self.first.address, "--home", str(folder / "gateway")),
            ],
            stdout=subprocess.PIPE,
            stderr=(folder / "gateway.log").open("w"),
            text=True,
        )
        self.log = folder / "gateway.log"
        assert self.process.stdout
        line = self.process.stdout.readline()
        self.url = line.split(" at ")[1].split("/v1")[0]

    def start(self, span: str) -> None:
        arguments = ("--layers", span, "--threads", "1", "--peers", self.first.address)
        self.hosts[span].append(self._swarm.start(f"host-{next(self._count)}", *arguments))

    def status(self) -> Any:
        with urlopen(f"{self.url}/status.json") as reply:
            return json.load(reply)

    def complete(self) -> None:
        """With two hosts of every layer, which the gateway knows of."""
        for span, hosts in self.hosts.items():
            hosts[:] = [host for host in hosts if host.process.poll() is None]
            while len(hosts) < 2:
                self.start(span)
            for host in hosts:
                host.wait_until_serving(time.monotonic() + PATIENCE)
        until(lambda: self.status()["coverage"] == [2] * 6)

    def held(self) -> int:
        """Open sessions and promised positions of all caches."""
        total = 0
        for host in itertools.chain(*self.hosts.values()):
            with host.control() as control:
                (model,) = control.status().models
            total += model.sessions + model.cached_tokens
        return total


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("swarm")
    with LocalSwarm(folder) as swarm:
        served = Served(folder, swarm)
        try:
            yield served
        finally:
            served.process.send_signal(signal.SIGINT)
            assert served.process.wait(20) == 0


@pytest.fixture
async def ai(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def ask(ai: openai.AsyncOpenAI, **options: Any) -> Any:
    return await ai.completions.create(**{"model": "starter", "prompt": PROMPT, "temperature": 0, **options})


async def test_the_answer_is_the_whole_models(ai: openai.AsyncOpenAI) -> None:
    whole, tokenizer = load_whole(starter.MODEL), AutoTokenizer.from_pretrained(starter.MODEL)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        out = whole.generate(ids, max_new_tokens=16, do_sample=False)
        scores = whole(out).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    answer = (await ask(ai, logprobs=3)).choices[0]
    assert answer.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    expected = scores.gather(1, out[0, ids.shape[1] :, None])[:, 0].tolist()
    assert answer.logprobs.token_logprobs == pytest.approx(expected, abs=1e-3)
    assert "".join(answer.logprobs.tokens) == answer.text
    assert all(len(best) <= 3 and max(best.values()) <= 0 for best in answer.logprobs.top_logprobs)
    tokens = (await ask(ai, prompt=ids[0].tolist())).choices[0]
    assert tokens.text == answer.text


async def test_seeds_choices_and_stop_sequences(ai: openai.AsyncOpenAI) -> None:
    one, again, other = [
        await ask(ai, temperature=1, seed=seed, n=2, max_tokens=12) for seed in (5, 5, 6)
    ]  # one after another: sums of a batch can differ in their last bits
    texts = [[choice.text for choice in answer.choices] for answer in (one, again, other)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0][0] != texts[0][1]
    whole = (await ask(ai, max_tokens=24)).choices[0].text
    stop = whole[9:14]  # some of a token, and of the next
    cut = (await ask(ai, max_tokens=24, stop=["nowhere", stop], logprobs=0)).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert "".join(cut.logprobs.tokens).startswith(cut.text)
    pieces = [chunk async for chunk in await ask(ai, max_tokens=24, stop=stop, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in pieces) == cut.text


async def test_biases_and_penalties_change_what_is_likely(ai: openai.AsyncOpenAI) -> None:
    first = (await ask(ai, max_tokens=1, logprobs=5)).choices[0].logprobs.tokens[0]
    tokenizer = AutoTokenizer.from_pretrained(starter.MODEL)
    (token,) = tokenizer(first, add_special_tokens=False).input_ids
    assert (await ask(ai, max_tokens=1, logit_bias={str(token): -100})).choices[0].text != first
    forced = (await ask(ai, max_tokens=6, logit_bias={str(token): 100})).choices[0].text
    assert forced == first * 6
    spread = await ask(ai, max_tokens=6, logit_bias={str(token): 20}, presence_penalty=2, frequency_penalty=2)
    assert spread.usage.completion_tokens == 6
    with pytest.raises(openai.BadRequestError, match="no token"):
        await ask(ai, logit_bias={"999999": 1})


async def test_what_the_model_cannot_do_is_said(ai: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="chat template"):
        await ai.chat.completions.create(model="starter", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.NotFoundError):
        await ask(ai, model="starter@9.9.9")
    with pytest.raises(openai.NotFoundError):
        await ask(ai, model="gpt-4o")
    with pytest.raises(openai.BadRequestError, match="1024"):
        await ask(ai, prompt="word " * 5000)
    assert (await ask(ai, model="starter@1.0.0", max_tokens=1)).model == "starter@1.0.0"


async def test_fifty_streams_at_once(served: Served, ai: openai.AsyncOpenAI) -> None:
    served.complete()

    async def stream(number: int) -> tuple[str, int]:
        text, tokens = "", 0
        options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 12}
        async for chunk in await ask(ai, prompt=f"def f{number}(x):", **options):
            text += "".join(choice.text for choice in chunk.choices)
            tokens += chunk.usage.completion_tokens if chunk.usage else 0
        return text, tokens

    answers = await asyncio.gather(*(stream(number) for number in range(50)))
    assert {tokens for _, tokens in answers} == {12}
    assert all(text for text, _ in answers)
    until(lambda: served.held() == 0)


async def test_a_host_that_is_killed_costs_a_moment(served: Served, ai: openai.AsyncOpenAI) -> None:
    served.complete()
    begun = asyncio.Event()

    async def stream() -> tuple[str, str]:
        text, finish = "", ""
        async for chunk in await ask(ai, max_tokens=300, stream=True):
            text += chunk.choices[0].text
            finish = chunk.choices[0].finish_reason or finish
            begun.set()
        return text, finish

    answers = [asyncio.create_task(stream()) for _ in range(3)]
    await begun.wait()
    for hosts in served.hosts.values():
        hosts.pop().kill()
    whole = (await ask(ai, max_tokens=300)).choices[0]
    for text, finish in [await answer for answer in answers]:
        # What follows can differ, since sums of a batch differ in their last bits.
        assert (text[:60], finish) == (whole.text[:60], whole.finish_reason)
        assert len(text) > 100


async def test_a_client_that_hangs_up_leaves_no_session_behind(served: Served, ai: openai.AsyncOpenAI) -> None:
    served.complete()
    await asyncio.to_thread(until, lambda: served.held() == 0)
    stream = await ask(ai, max_tokens=900, stream=True)
    await anext(stream)
    assert served.held() > 0
    await stream.close()
    await asyncio.to_thread(until, lambda: served.held() == 0)
    whole = asyncio.create_task(ask(ai, max_tokens=900))
    await asyncio.to_thread(until, lambda: served.held() > 0)
    whole.cancel()
    await asyncio.to_thread(until, lambda: served.held() == 0)
    assert served.status()["requests"]["at_work"] == 0


async def test_layers_that_nobody_serves_are_a_503_that_names_them(served: Served, ai: openai.AsyncOpenAI) -> None:
    served.complete()
    for host in served.hosts[SPANS[1]]:
        host.kill()
    began = time.monotonic()
    with pytest.raises(openai.APIStatusError, match="layers 3:6") as error:
        await ask(ai, max_tokens=1)
    assert error.value.status_code == 503
    assert int(error.value.response.headers["Retry-After"]) >= 1
    await asyncio.to_thread(until, lambda: served.status()["coverage"] == [2, 2, 2, 0, 0, 0])
    assert time.monotonic() - began < 40
    entries = (await ai.models.list()).data
    assert [entry.available for entry in entries] == [False, False]  # type: ignore[attr-defined]
    served.complete()
    assert (await ask(ai, max_tokens=1)).usage.completion_tokens == 1


def test_any_node_serves_the_status_page(served: Served) -> None:
    url = next(line for line in served.first.lines if line.startswith("status at ")).split()[2].rstrip("/,")
    with urlopen(f"{url}/") as reply:
        assert b"<main" in reply.read()
    with urlopen(f"{url}/metrics") as reply:
        assert b"p2pmodel_layers " in reply.read()
    with urlopen(f"{url}/status.json") as reply:
        status = json.load(reply)
    assert status["model"]["name"] == "starter"
    assert status["round"]["phase"] == "open"
    assert status["here"]["peer"] in status["join"]
    with urlopen(f"{url}/events") as reply:
        lines = [reply.readline() for _ in range(4)]
    assert lines[2] == b"event: status\n"
    assert json.loads(lines[3].removeprefix(b"data: "))["model"] == status["model"]


def test_nothing_that_was_asked_is_logged(served: Served) -> None:
    log = served.log.read_text()
    assert "read_lines" not in log
    ours = [entry for entry in re.split(r"^(?=\d{4}-\d\d-\d\d )", log, flags=re.M) if " DEBUG   hivemind" not in entry]
    assert "Traceback" not in "".join(ours)
