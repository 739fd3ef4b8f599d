"""A live swarm watched by the real programs: every panel of every dashboard has data, and an alert comes and goes."""

import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

from p2pmodel import starter
from p2pmodel.cli import localswarm
from p2pmodel.cli.localswarm import LocalSwarm, NodeProcess
from p2pmodel.telemetry import stack
from p2pmodel.telemetry.stack import Stack, StackOptions
from tests.support import lineages
from tests.support.waiting import until

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed (apt: prometheus)"),
]
PATIENCE = 60.0
DASHBOARDS = sorted((stack.GRAFANA / "dashboards").glob("*.json"))


class Watched:
    """Layers 0:3 and 3:6 on a node each, a gateway that is asked again and again, and what watches them."""

    def __init__(self, folder: Path, swarm: LocalSwarm) -> None:
        self._swarm = swarm
        lineage = lineages.begin(folder / "first")
        lineages.adopt(lineage, [lineages.add_patch(lineage, lineage.home.key, 1)])
        ports = free_ports(6)
        self.targets = [f"127.0.0.1:{port}" for port in ports[:3]]
        self.first = swarm.start("first", "--layers", "0:3", "--threads", "1", "--http", self.targets[0])
        self.first.wait_until_serving(time.monotonic() + PATIENCE)
        self.lineage, self.second = lineage, self.host("second", "--http", self.targets[1])
        serve = ["serve", "--port", str(ports[2]), "--home", str(folder / "gateway"), "--peers", self.first.address]
        with (folder / "gateway.log").open("wb") as log:
            self.gateway = localswarm.launch(serve, log, False)
        self.second.wait_until_serving(time.monotonic() + PATIENCE)
        assert self.gateway.stdout
        assert "serving" in self.gateway.stdout.readline()
        until(self.is_whole)
        self.alerts = Webhook()
        options = StackOptions(
            folder=folder / "monitoring",
            targets=tuple(self.targets),
            swarm="test",
            port=ports[3],
            alertmanager_port=ports[4],
            grafana_port=ports[5],
            webhook=self.alerts.url,
            rules=hasty(folder / "rules"),
            scrape_seconds=1,
        )
        self.stack = Stack(options)

    def host(self, name: str, *arguments: str) -> NodeProcess:
        """A node of layers 3:6, which begins to start."""
        return self._swarm.start(name, "--layers", "3:6", "--threads", "1", "--peers", self.first.address, *arguments)

    def is_whole(self) -> bool:
        """Whether the gateway knows a host of every layer."""
        with urlopen(f"http://{self.targets[2]}/status.json", timeout=10) as reply:
            return all(json.load(reply)["coverage"])

    def ask(self) -> None:
        body = {"model": starter.NAME, "prompt": "def read", "max_tokens": 8}
        request = Request(
            f"http://{self.targets[2]}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request, timeout=30) as reply:
            assert reply.status == 200

    def samples(self, expr: str) -> list[float]:
        """What Prometheus says to it now, without what is no number."""
        with urlopen(f"{self.stack.url}/api/v1/query?query={quote(expr)}", timeout=10) as reply:
            found = json.load(reply)["data"]["result"]
        return [value for sample in found if math.isfinite(value := float(sample["value"][1]))]

    @property
    def uncovered(self) -> str | None:
        """What was last heard of that alert."""
        return next((status for alert, status in reversed(self.alerts.heard) if alert == "LayerUncovered"), None)

    def close(self) -> None:
        self.stack.stop()
        self.alerts.close()
        self.gateway.send_signal(signal.SIGTERM)
        self.gateway.wait(20)


class Webhook:
    """What Alertmanager posts: (alert, status)."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []
        heard = self.heard

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                heard.extend((alert["labels"]["alertname"], alert["status"]) for alert in body["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    with LocalSwarm(folder) as swarm:
        watched = Watched(folder, swarm)
        try:
            with watched.stack:
                yield watched
        finally:
            watched.close()


def test_every_panel_has_data(watched: Watched) -> None:
    """After answers, and a version that was adopted meanwhile."""
    watched.ask()
    before = lineages.add_patch(watched.lineage, watched.lineage.home.key, 2)
    lineages.adopt(watched.lineage, [before])
    verdict = next(reversed(watched.lineage.verdicts))
    with watched.first.control() as client:
        client.publish(verdict)
    until(lambda: watched.samples('p2pmodel_patches_total{outcome="merged"}') == [1.0, 1.0], meanwhile=watched.ask)
    assert watched.samples("max(p2pmodel_served_round)") == [2.0]
    until(lambda: watched.samples("sum(up)") == [3.0])
    missing = dict(queries())
    assert len(missing) > 60

    def all_there() -> bool:
        for name, expr in list(missing.items()):
            if watched.samples(expr):
                del missing[name]
        return not missing

    until(all_there, meanwhile=watched.ask, otherwise=lambda: str(missing))
    assert watched.samples("swarm:p2pmodel_errors:ratio_rate5m") == [0.0]
    assert watched.samples('ALERTS{alertname="LayerReplicasBelowTarget"}') in ([], [1.0])  # a host each


@pytest.mark.skipif(stack._find(stack._ALERTMANAGER) is None, reason="Alertmanager is not installed")
def test_an_alert_fires_and_resolves_when_a_layers_only_host_is_killed(watched: Watched) -> None:
    until(lambda: watched.samples("swarm:p2pmodel_layers_uncovered:count") == [0.0])  # the head, by now
    until(lambda: watched.uncovered in (None, "resolved") and not watched.samples('ALERTS{alertname="LayerUncovered"}'))
    watched.second.kill()
    until(lambda: watched.samples("swarm:p2pmodel_layers_uncovered:count") == [3.0])
    until(lambda: watched.uncovered == "firing")
    watched.host("third")
    until(lambda: watched.uncovered == "resolved")


def test_monitor_up_runs_them_and_takes_them_along(tmp_path: Path) -> None:
    port, alertmanager, grafana = free_ports(3)
    command = subprocess.Popen(
        [
            *(sys.executable, "-m", "p2pmodel", "monitor", "up", "--folder", str(tmp_path), "--port", str(port)),
            *("--alertmanager-port", str(alertmanager), "--grafana-port", str(grafana), "--target", "127.0.0.1:1"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert command.stdout
    assert command.stdout.readline().startswith(f"Prometheus at http://127.0.0.1:{port}; targets are in ")
    with urlopen(f"http://127.0.0.1:{port}/api/v1/rules", timeout=10) as reply:
        groups = json.load(reply)["data"]["groups"]
    assert {group["name"] for group in groups} == {"p2pmodel-recording", "p2pmodel-alerts"}
    command.terminate()
    assert command.wait(20) == 0
    with pytest.raises(OSError, match="refused"):
        urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=2)


def queries() -> Iterator[tuple[str, str]]:
    """Every panel's, with the dashboard's variables put in."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for number, target in enumerate(panel["targets"]):
                expr = target["expr"].replace("$__rate_interval", "30s")
                yield f"{path.stem}: {panel['title']} {number}", re.sub(r"\$(swarm|instance)", ".*", expr)


def hasty(folder: Path) -> Path:
    """The rules that ship, without their patience."""
    folder.mkdir()
    for path in stack.RULES.glob("*.yml"):
        text = re.sub(r"^( +for): .*$", r"\1: 1s", path.read_text(), flags=re.MULTILINE)
        (folder / path.name).write_text(text.replace("interval: 15s", "interval: 1s"))
    return folder


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
