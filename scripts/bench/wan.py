"""A wide-area network on one machine: hosts in network namespaces, joined by links with a delay, a rate and losses.

    python scripts/bench/wan.py [--hosts 2] [--delay 50] [--rate 20] [--loss 0]      (as root: measures itself)

Every host has a TUN device, whose packets this module's child process reads, holds back and hands on, so that neither
netem nor a bridge has to be in the kernel. A packet waits for its sender's uplink, then for the delay, then for its
receiver's downlink; what would wait for more than QUEUE_SECONDS is dropped, as routers do.
"""

import argparse
import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

QUEUE_SECONDS = 0.4
MTU = 1400
SUBNET = "10.77.0"
READS_A_TURN = 64

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_DESTINATION = 19
"""Of an IPv4 packet: the last byte of the receiver's address."""

_libc = ctypes.CDLL(None, use_errno=True)


def missing() -> str:
    """Why there can be no such network here; empty when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    if subprocess.run(["ip", "netns", "list"], capture_output=True, check=False).returncode:
        return "the command ip is missing, or knows no network namespaces"
    return ""


class Network:
    """A context manager. Hosts count from 0, are `delay` seconds apart, one way, and have `rate` bits a second."""

    def __init__(self, hosts: int, delay: float, rate: float, loss: float = 0.0) -> None:
        self.delay, self.rate, self.loss = delay, rate, loss
        self._names = [f"p2pmodel-{os.getpid()}-{host}" for host in range(hosts)]
        self._relay: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Network":
        try:
            for name in self._names:
                _ip("netns", "add", name)
            command = [sys.executable, __file__, "--relay", *self._names]
            options = ["--delay", str(self.delay * 1e3), "--rate", str(self.rate / 1e6), "--loss", str(self.loss)]
            self._relay = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
            assert self._relay.stdout is not None
            if not self._relay.stdout.readline():
                raise OSError("the relay of the emulated network did not start")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait()
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)

    def address(self, host: int) -> str:
        return f"{SUBNET}.{host + 1}"

    @contextlib.contextmanager
    def inside(self, host: int) -> Iterator[None]:
        """What this thread opens and starts meanwhile, processes and threads too, is in the host's network."""
        with open("/proc/self/ns/net") as here, open(f"/run/netns/{self._names[host]}") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(here.fileno())


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _open_tun(name: str, namespace: str, address: str) -> int:
    """The descriptor stays ours when the device goes to its namespace."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    _ip("link", "set", name, "netns", namespace)
    _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", name)
    _ip("-n", namespace, "link", "set", name, "mtu", str(MTU), "up")
    _ip("-n", namespace, "link", "set", "lo", "up")
    return descriptor


class _Link:
    """One direction of a host's access. A packet leaves it when those before it have."""

    def __init__(self, rate: float) -> None:
        self._rate, self._free_at = rate, 0.0

    def leaves(self, now: float, size: int) -> float | None:
        """When; None for a packet that is dropped."""
        begins = max(now, self._free_at)
        if begins - now > QUEUE_SECONDS:
            return None
        self._free_at = begins + 8 * size / self._rate
        return self._free_at


def relay(namespaces: list[str], delay: float, rate: float, loss: float) -> None:
    """Until killed."""
    prefix = f"pm{os.getpid() % 100000}n"
    hosts = {
        _open_tun(f"{prefix}{number}", name, f"{SUBNET}.{number}"): number
        for number, name in enumerate(namespaces, start=1)
    }
    devices = {number: descriptor for descriptor, number in hosts.items()}
    up, down = ({number: _Link(rate) for number in devices} for _ in range(2))
    chance = random.Random(0)
    waiting: list[tuple[float, int, int, bool, bytes]] = []
    count = 0
    print("ready", flush=True)
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select(list(hosts), [], [], pause)
        now = time.monotonic()
        for descriptor in ready:
            for packet in _packets(descriptor):
                receiver = packet[_DESTINATION] if packet[0] >> 4 == 4 else 0
                leaves = up[hosts[descriptor]].leaves(now, len(packet))
                if receiver in devices and leaves is not None and chance.random() >= loss:
                    count += 1
                    heapq.heappush(waiting, (leaves + delay, count, receiver, False, packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            due, number, receiver, received, packet = heapq.heappop(waiting)
            if received:
                with contextlib.suppress(BlockingIOError):
                    os.write(devices[receiver], packet)
            elif (arrives := down[receiver].leaves(due, len(packet))) is not None:
                heapq.heappush(waiting, (arrives, number, receiver, True, packet))


def _packets(descriptor: int) -> Iterator[bytes]:
    for _ in range(READS_A_TURN):
        try:
            yield os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return


def measure_itself(hosts: int, delay: float, rate: float, loss: float) -> None:
    """Round trips and throughput over TCP between the first two hosts."""
    with (
        Network(max(2, hosts), delay, rate, loss) as network,
        network.inside(1),
        socket.create_server((network.address(1), 4000)) as server,
    ):
        accepted = threading.Thread(target=_serve, args=(server,))
        accepted.start()
        with network.inside(0):
            stream = socket.create_connection((network.address(1), 4000), 10)
        with stream:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            trips = []
            for _ in range(20):
                began = time.perf_counter()
                stream.sendall(b"?")
                stream.recv(1)
                trips.append(time.perf_counter() - began)
            size = int(rate / 8 * 3)
            began = time.perf_counter()
            stream.sendall(b"x" * size + b"!")
            stream.recv(1)
            took = time.perf_counter() - began
        accepted.join()
    print(f"round trip {1e3 * statistics.median(trips):.1f} ms, of which the delays are {2e3 * delay:.1f}")
    print(f"{8 * size / took / 1e6:.1f} Mbit/s of {rate / 1e6:.1f}, handshakes and slow start included")


def _serve(server: socket.socket) -> None:
    """Answers a byte to every read that ends a message."""
    stream, _ = server.accept()
    with stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := stream.recv(1 << 16):
            if data[-1:] in (b"?", b"!"):
                stream.sendall(b".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--delay", type=float, default=50.0, help="milliseconds, one way")
    parser.add_argument("--rate", type=float, default=20.0, help="Mbit/s, of each host, in each direction")
    parser.add_argument("--loss", type=float, default=0.0, help="share of packets that are lost")
    parser.add_argument("--relay", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.relay:
        relay(asked.relay, asked.delay / 1e3, asked.rate * 1e6, asked.loss)
    elif reason := missing():
        raise SystemExit(f"No network can be emulated here: {reason}.")
    else:
        measure_itself(asked.hosts, asked.delay / 1e3, asked.rate * 1e6, asked.loss)


if __name__ == "__main__":
    main()
