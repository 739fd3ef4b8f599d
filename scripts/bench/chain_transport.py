"""What a chain's transport costs: the time of a token around a ring of empty stages, each a process with its daemon.

    python scripts/bench/chain_transport.py [--tokens 300] [--rounds 5] [--bytes 4096] [--stages 3]

The baseline, taken in the same run and interleaved with the others, is an echo of the same bytes over a Unix socket
pair between two processes. CPU is that of all processes, daemons included. With other load on the machine, compare CPU
and p10.
"""

import argparse
import asyncio
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hivemind.p2p import P2P, PeerID
from hivemind.utils.multiaddr import Multiaddr

from p2pmodel.domain.ids import PeerId
from p2pmodel.domain.ports import Buffer
from p2pmodel.domain.swarm import Hop, Route, SessionRequest, Span
from p2pmodel.swarm.chain_client import ChainClient
from p2pmodel.swarm.chain_server import ChainServer
from p2pmodel.swarm.membership import Membership
from p2pmodel.wire import canonical
from p2pmodel.wire.signing import Key

MODEL = canonical.digest(b"model")


@dataclass(frozen=True)
class Host:
    p2p: Any
    peer: PeerId
    addresses: list[str]

    @classmethod
    async def start(cls) -> "Host":
        key = Key.generate()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "key"
            file.write_bytes(key.to_libp2p())
            p2p = await P2P.create(identity_path=str(file), check_if_identity_free=False, startup_timeout=60)
        return cls(p2p, key.peer, [str(address) for address in await p2p.get_visible_maddrs()])

    @property
    def membership(self) -> Membership:
        return Membership(None, self.peer)

    async def meet(self, peer: str, addresses: Sequence[str]) -> None:
        ways = [Multiaddr(address.split("/p2p/")[0]) for address in addresses]
        await self.p2p._client.connect(PeerID.from_base58(peer), ways)

    @property
    def processes(self) -> list[int]:
        return [os.getpid(), self.p2p._child.pid]


class Empty:
    def open(self, request: SessionRequest) -> None:
        return None

    def known(self, handle: Any) -> tuple[bytes, ...]:
        return ()

    def step(self, batch: Sequence[tuple[Any, int, bytes, Buffer]]) -> Sequence[Buffer | Exception]:
        return [body for _, _, _, body in batch]

    def load(self, handle: Any, body: Buffer) -> None:
        raise NotImplementedError

    def backward(self, handle: Any, position: int, body: Buffer) -> Buffer:
        raise NotImplementedError

    def close(self, handle: None) -> None:
        return None


@dataclass
class Result:
    seconds: list[float] = field(default_factory=list)
    cpu: float = 0.0

    def measure(self, step: Callable[[], object], tokens: int, processes: Sequence[int]) -> None:
        before = cpu_seconds(processes)
        for _ in range(tokens):
            began = time.perf_counter()
            step()
            self.seconds.append(time.perf_counter() - began)
        self.cpu += cpu_seconds(processes) - before

    def row(self, name: str, links: int) -> str:
        tenths = [1000 * s for s in statistics.quantiles(self.seconds, n=10)]
        cpu = 1000 * self.cpu / len(self.seconds)
        return f"{name:<14} {tenths[0]:9.3f} {tenths[4]:9.3f} {tenths[4] / links:13.3f} {cpu:13.3f}"


def cpu_seconds(processes: Sequence[int]) -> float:
    total = 0
    for process in processes:
        for task in Path(f"/proc/{process}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def receive(stream: socket.socket, data: bytearray) -> bool:
    view = memoryview(data)
    while view:
        count = stream.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True


def echo(descriptor: int, size: int) -> None:
    data = bytearray(size)
    with socket.socket(fileno=descriptor) as stream:
        while receive(stream, data):
            stream.sendall(data)


async def serve() -> None:
    host = await Host.start()
    server = ChainServer(host, Empty())
    server.start()
    print(json.dumps({"peer": host.peer, "addresses": host.addresses, "processes": host.processes}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        other = json.loads(line)
        await host.meet(other["peer"], other["addresses"])
        print(flush=True)
    server.stop()
    await host.p2p.shutdown()


def start_stages(count: int) -> tuple[list[subprocess.Popen[str]], list[dict[str, Any]]]:
    """The stages, each connected to those before it, and what they say of themselves."""
    command = [sys.executable, __file__, "--serve"]
    stages = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    told: list[dict[str, Any]] = []
    for stage in stages:
        assert stage.stdin is not None
        assert stage.stdout is not None
        me = json.loads(stage.stdout.readline())
        for other in told:
            stage.stdin.write(json.dumps(other) + "\n")
            stage.stdin.flush()
            stage.stdout.readline()
        told.append(me)
    return stages, told


def measure(client: ChainClient, host: Host, told: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, __file__, "--echo", str(theirs.fileno()), "--bytes", str(options.bytes)]
    echoing = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    body, answer = bytearray(options.bytes), bytearray(options.bytes)

    def pair() -> None:
        ours.sendall(body)
        receive(ours, answer)

    hops = [Hop(stage["peer"], Span(n, n + 1)) for n, stage in enumerate(told)]
    request = partial(SessionRequest, model=MODEL, version=MODEL, codec="none", span=hops[0].span, max_tokens=1)
    sessions = [client.open(Route(tuple(hops[:n])), request(secrets.token_hex(16))) for n in range(1, len(hops) + 1)]
    names = ["socket pair", *(f"{n} stage{'s' * (n > 1)}" for n in range(1, len(hops) + 1))]
    steps: list[Callable[[], object]] = [pair, *(partial(session.step, body, 0, 1) for session in sessions)]
    used = [[os.getpid(), echoing.pid]] + [
        host.processes + [p for stage in told[:n] for p in stage["processes"]] for n in range(1, len(hops) + 1)
    ]
    results = [Result() for _ in steps]
    for turn in range(options.rounds + 1):
        for result, step, processes in zip(results, steps, used, strict=True):
            (result if turn else Result()).measure(step, options.tokens, processes)  # the first turn warms up
    print(f"{options.bytes} bytes a token, {options.rounds} rounds of {options.tokens} tokens; milliseconds a token\n")
    print(f"{'ring':<14} {'p10':>9} {'p50':>9} {'p50 a link':>13} {'CPU':>13}")
    for links, (name, result) in enumerate(zip(names, results, strict=True), start=1):
        print(result.row(name, max(2, links)))
    for session in sessions:
        session.close()
    ours.close()
    echoing.wait()


def main(options: argparse.Namespace) -> None:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    stages, told = start_stages(options.stages)
    host = run(Host.start())
    for me in told:
        run(host.meet(me["peer"], me["addresses"]))
    client = ChainClient(host)
    client.start()
    measure(client, host, told, options)
    client.stop()
    for stage in stages:
        assert stage.stdin is not None
        stage.stdin.close()
        stage.wait()
    run(host.p2p.shutdown())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=4096)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--echo", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve())
    elif arguments.echo is not None:
        echo(arguments.echo, arguments.bytes)
    else:
        main(arguments)
