"""How long an answer pauses when a host is killed, after a history of 200 tokens or another length.

    python scripts/bench/failover.py [--kills 20] [--history 200] [--freeze]

Real nodes of the starter model on loopback, layers 0:3 and 3:6, with one more of each than is used. Each answer has one
kill -9 of a node and its daemon (with --freeze a SIGSTOP), at another position and another hop each time, and has to be
the text of an undisturbed one. The pause is the longest time of one token in the answer; it is compared to the median
token of the same answers.
"""

import argparse
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import START_SECONDS, heading, row

from p2pmodel.cli.localswarm import LocalSwarm, NodeProcess
from p2pmodel.node.asking.client import Answer, Sampling, SwarmClient
from p2pmodel.node.machine.threads import use_threads

SPANS = ("0:3", "3:6")
GOAL_SECONDS = 2.0
TEXT = "def read_lines(path):\n    return open(path).read().splitlines()\n\n\n"
ANSWER_TOKENS = 24


class Bench:
    def __init__(self, swarm: LocalSwarm, freeze: bool) -> None:
        self._swarm, self._freeze = swarm, freeze
        self._nodes: dict[str, tuple[str, NodeProcess]] = {}
        self._count = 0
        self.first = swarm.start("first", "--layers", "none")
        self.first.wait_until_serving(time.monotonic() + START_SECONDS)

    def add(self, span: str) -> None:
        self._count += 1
        arguments = ("--layers", span, "--threads", "1", "--peers", self.first.address)
        node = self._swarm.start(f"host-{self._count}", *arguments)
        node.wait_until_serving(time.monotonic() + START_SECONDS)
        with node.control() as control:
            self._nodes[control.status().peer] = span, node

    def fell(self, peer: str) -> None:
        _, node = self._nodes[peer]
        os.killpg(node.process.pid, signal.SIGSTOP if self._freeze else signal.SIGKILL)

    def replace(self, peer: str) -> None:
        span, node = self._nodes.pop(peer)
        node.kill()
        self.add(span)

    def answer(self, client: SwarmClient, prompt: str, position: int | None, hop: int) -> tuple[Answer, list[float]]:
        """The answer, and the seconds of each of its tokens but the first; at `position` that hop falls."""
        opened = client.open
        times: list[float] = []
        felled: list[str] = []

        def watched(*args: Any, **kwargs: Any) -> Any:
            session = opened(*args, **kwargs)
            forward = session.forward

            def timed(*args: Any, **kwargs: Any) -> Any:
                if len(times) == position:
                    assert client.route is not None
                    felled.append(client.route.hops[hop].peer)
                    self.fell(felled[0])
                began = time.perf_counter()
                output = forward(*args, **kwargs)
                times.append(time.perf_counter() - began)
                return output

            session.forward = timed  # type: ignore[method-assign]
            return session

        client.open = watched  # type: ignore[method-assign]
        try:
            answer = client.generate(prompt, Sampling(ANSWER_TOKENS), "head", "fp32", lambda _: None)
        finally:
            client.open = opened  # type: ignore[method-assign]
        for peer in felled:
            self.replace(peer)
        return answer, times[1:]


def prompt_of(client: SwarmClient, tokens: int) -> str:
    ids = client.tokenizer(TEXT * (tokens // 8)).input_ids[:tokens]
    return str(client.tokenizer.decode(ids, skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--history", type=int, default=200, help="tokens of the prompt")
    parser.add_argument("--freeze", action="store_true", help="stop the node, instead of killing it")
    asked = parser.parse_args()
    use_threads(1)
    pauses: list[float] = []
    tokens: list[float] = []
    with tempfile.TemporaryDirectory() as folder, LocalSwarm(Path(folder)) as swarm:
        bench = Bench(swarm, asked.freeze)
        for span in SPANS * 2:
            bench.add(span)
        with SwarmClient.connect(Path(folder) / "client", (bench.first.address,), None, None) as client:
            prompt = prompt_of(client, asked.history)
            undisturbed, _ = bench.answer(client, prompt, None, 0)
            for kill in range(asked.kills):
                position = 1 + kill * (ANSWER_TOKENS - 2) // max(1, asked.kills - 1)
                answer, seconds = bench.answer(client, prompt, position, kill % len(SPANS))
                assert answer.text == undisturbed.text, "the answer is another one after the kill"
                assert answer.failovers == 1
                pauses.append(max(seconds))
                tokens.append(statistics.median(seconds))
    token = statistics.median(tokens)
    pauses.sort()
    median, late = statistics.median(pauses), pauses[min(len(pauses) - 1, round(0.95 * len(pauses)))]
    heading("hosts felled", "token p50 ms", "pause p50 s", "p95 s", "longest s", "p50 in tokens", "p95 in tokens")
    row(len(pauses), 1e3 * token, median, late, pauses[-1], median / token, late / token)
    if not asked.freeze:
        print(f"goal for p95, {GOAL_SECONDS:g} s: {'reached' if late <= GOAL_SECONDS else 'missed'}")


if __name__ == "__main__":
    main()
