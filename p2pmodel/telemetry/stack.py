"""Prometheus on this machine, with the rules that ship; Alertmanager and Grafana beside it where they are installed."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from p2pmodel.domain.errors import Busy, NotFound, P2PModelError, UsageError

SHIPPED = Path(__file__).parent / "monitoring"
RULES, GRAFANA = SHIPPED / "rules", SHIPPED / "grafana"
TARGETS_FILE = "targets.json"

START_SECONDS = 30.0
STOP_SECONDS = 10.0
GRAFANA_HOMES = (Path("/usr/share/grafana"), Path("/opt/homebrew/share/grafana"))

_PROMETHEUS = ("prometheus",)
_ALERTMANAGER = ("prometheus-alertmanager", "alertmanager")
_GRAFANA = ("grafana", "grafana-server")
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class StackOptions:
    """folder: for configuration and data; targets: HOST:PORT of nodes and gateways; webhook: where alerts are posted;
    rules: a folder of *.yml; scrape_seconds: between two scrapes, and between two evaluations of the rules."""

    folder: Path
    targets: tuple[str, ...]
    swarm: str = "local"
    port: int = 9090
    alertmanager_port: int = 9093
    grafana_port: int = 3000
    webhook: str | None = None
    rules: Path = RULES
    scrape_seconds: int = 5


class Stack:
    """A context manager: the programs run until it is left, and never longer than this process."""

    def __init__(self, options: StackOptions) -> None:
        """Raises NotFound when Prometheus is not installed, UsageError for a target that is none."""
        self._options = options
        self._prometheus = _find(_PROMETHEUS)
        if self._prometheus is None:
            raise NotFound(
                "Prometheus is not installed.", "On Debian: sudo apt install prometheus; or see docker/compose.yaml."
            )
        self._alertmanager, self._grafana = _find(_ALERTMANAGER), _find(_GRAFANA)
        for target in options.targets:
            host, _, port = target.rpartition(":")
            if not host or not port.isdecimal():
                raise UsageError(f"{target!r} is no target.", "Write it as HOST:PORT, such as 127.0.0.1:9100.")
        self._processes: list[subprocess.Popen[bytes]] = []
        self.url = f"http://127.0.0.1:{options.port}"
        self.targets_file = options.folder / TARGETS_FILE

    @property
    def alertmanager_url(self) -> str | None:
        """None where it is not installed."""
        return f"http://127.0.0.1:{self._options.alertmanager_port}" if self._alertmanager else None

    @property
    def grafana_url(self) -> str | None:
        """None where it is not installed."""
        return f"http://127.0.0.1:{self._options.grafana_port}" if self._grafana else None

    def __enter__(self) -> "Stack":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def wait(self) -> None:
        """Until one of them ends. Raises P2PModelError then: they are not meant to."""
        while all(process.poll() is None for process in self._processes):
            time.sleep(0.5)
        raise P2PModelError("One of the monitoring programs has ended.", f"Its log is in {self._options.folder}.")

    def _start(self) -> None:
        options, folder = self._options, self._options.folder
        folder.mkdir(parents=True, exist_ok=True)
        write_targets(self.targets_file, options.targets, options.swarm)
        _write(folder / "prometheus.yml", prometheus_config(options, alerting=self._alertmanager is not None))
        if self._alertmanager:
            _write(folder / "alertmanager.yml", alertmanager_config(options.webhook))
            self._run(self._alertmanager, options.alertmanager_port, _alertmanager_flags(options))
            _wait_until_ready(f"{self.alertmanager_url}/-/ready", self._processes[-1], folder)
        assert self._prometheus
        self._run(self._prometheus, options.port, _prometheus_flags(options))
        _wait_until_ready(f"{self.url}/-/ready", self._processes[-1], folder)
        if self._grafana:
            command, environment = _grafana_command(self._grafana, options, self.url)
            self._run(self._grafana, options.grafana_port, command, environment)

    def _run(self, program: str, port: int, flags: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        _demand_free(port)
        name = Path(program).name
        with (self._options.folder / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [program, *flags],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **(environment or {})},
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            )


def write_targets(path: Path, targets: Sequence[str], swarm: str) -> None:
    """For Prometheus' file_sd: it reads the file again when it changes."""
    text = json.dumps([{"targets": list(targets), "labels": {"swarm": swarm}}], indent=1)
    new = path.with_suffix(".new")
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(path)


def prometheus_config(options: StackOptions, *, alerting: bool) -> dict[str, object]:
    seconds = f"{options.scrape_seconds}s"
    config: dict[str, object] = {
        "global": {"scrape_interval": seconds, "scrape_timeout": seconds, "evaluation_interval": seconds},
        "rule_files": [str(options.rules.resolve() / "*.yml")],
        "scrape_configs": [
            {
                "job_name": "p2pmodel",
                "file_sd_configs": [
                    {"files": [str((options.folder / TARGETS_FILE).resolve())], "refresh_interval": "30s"}
                ],
            }
        ],
    }
    if alerting:
        manager = {"static_configs": [{"targets": [f"127.0.0.1:{options.alertmanager_port}"]}]}
        config["alerting"] = {"alertmanagers": [manager]}
    return config


def alertmanager_config(webhook: str | None) -> dict[str, object]:
    receiver: dict[str, object] = {"name": "p2pmodel"}
    if webhook:
        receiver["webhook_configs"] = [{"url": webhook, "send_resolved": True}]
    route = {
        "receiver": "p2pmodel",
        "group_by": ["alertname", "swarm"],
        "group_wait": "1s",
        "group_interval": "5s",
        "repeat_interval": "4h",
    }
    return {"route": route, "receivers": [receiver]}


def _prometheus_flags(options: StackOptions) -> list[str]:
    return [
        f"--config.file={options.folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={options.folder / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{options.port}",
    ]


def _alertmanager_flags(options: StackOptions) -> list[str]:
    return [
        f"--config.file={options.folder / 'alertmanager.yml'}",
        f"--storage.path={options.folder / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{options.alertmanager_port}",
        "--cluster.listen-address=",
    ]


def _grafana_command(program: str, options: StackOptions, prometheus: str) -> tuple[list[str], dict[str, str]]:
    home = next((folder for folder in GRAFANA_HOMES if folder.is_dir()), None)
    flags = ["server"] if Path(program).name == "grafana" else []
    environment = {
        "GF_PATHS_DATA": str(options.folder / "grafana"),
        "GF_PATHS_LOGS": str(options.folder / "grafana"),
        "GF_PATHS_PROVISIONING": str(GRAFANA / "provisioning"),
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(options.grafana_port),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "P2PMODEL_PROMETHEUS_URL": prometheus,
        "P2PMODEL_DASHBOARDS": str(GRAFANA / "dashboards"),
    }
    return [*flags, *(["--homepath", str(home)] if home else [])], environment


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(url, timeout=2):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise P2PModelError("A monitoring program did not start.", f"Its log is in {folder}.")


def _write(path: Path, config: Mapping[str, object]) -> None:
    """JSON, which is YAML as well."""
    path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _demand_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise Busy(f"Port {port} is in use.", "Choose another: p2pmodel monitor up --help") from None


def _find(names: Sequence[str]) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
