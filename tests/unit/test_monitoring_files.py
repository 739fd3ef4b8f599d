"""Rules, dashboards, runbooks and containers: checked by the tools that read them, where these are installed."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from p2pmodel.domain.errors import Busy, NotFound, UsageError
from p2pmodel.telemetry import stack
from p2pmodel.telemetry.stack import Stack, StackOptions
from scripts.generate import outdated
from scripts.generate.metrics import current

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"
SUFFIXES = ("_bucket", "_sum", "_count")

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def check(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_rules_are_valid_and_do_what_their_tests_say() -> None:
    check("promtool", "check", "rules", *stack.RULES.glob("*.yml"))
    check("promtool", "test", "rules", "monitoring/rules.test.yml")


@needs_promtool
def test_configurations_are_valid(tmp_path: Path) -> None:
    options = StackOptions(tmp_path, ("127.0.0.1:9100",))
    stack.write_targets(tmp_path / stack.TARGETS_FILE, options.targets, options.swarm)
    config = tmp_path / "prometheus.yml"
    config.write_text(json.dumps(stack.prometheus_config(options, alerting=True)))
    check("promtool", "check", "config", config)
    check("promtool", "check", "config", "--syntax-only", DOCKER / "prometheus.yml")
    if shutil.which("amtool"):
        alertmanager = tmp_path / "alertmanager.yml"
        alertmanager.write_text(json.dumps(stack.alertmanager_config("http://127.0.0.1:1/")))
        check("amtool", "check-config", alertmanager, DOCKER / "alertmanager.yml")


def test_every_alert_has_a_test_and_a_runbook() -> None:
    tests = (REPOSITORY / "monitoring" / "rules.test.yml").read_text()
    groups = yaml.safe_load((stack.RULES / "alerts.yml").read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"]]
    assert len(alerts) >= 8
    for alert in alerts:
        page = REPOSITORY / alert["annotations"]["runbook_url"]
        assert f"`{alert['alert']}`" in page.read_text()
        assert f"alertname: {alert['alert']}" in tests
    pages = {path.name for path in (REPOSITORY / "docs" / "runbooks").glob("*.md")}
    assert pages == {Path(alert["annotations"]["runbook_url"]).name for alert in alerts}


def test_rules_and_dashboards_name_only_metrics_that_exist() -> None:
    known = {line.split()[0] for line in current()}
    texts = [*stack.RULES.glob("*.yml"), *(stack.GRAFANA / "dashboards").glob("*.json")]
    assert len(texts) == 5
    for path in texts:
        for name in set(re.findall(r"(?<![:\w])p2pmodel_\w+(?!:)\b", path.read_text())):
            bare = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
            assert name in known or bare in known, f"{path.name}: {name}"


@pytest.mark.skipif(
    importlib.util.find_spec("grafana_foundation_sdk") is None, reason="grafana-foundation-sdk is not installed"
)
def test_dashboards_are_what_their_code_writes() -> None:
    assert not [*outdated("dashboards")]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_the_dockerfile_is_clean() -> None:
    check("hadolint", "docker/Dockerfile")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_shell_scripts_are_clean() -> None:
    scripts = [
        path
        for folder in (REPOSITORY / "scripts", DOCKER)
        for path in sorted(folder.iterdir())
        if path.is_file() and (path.suffix == ".sh" or path.read_bytes().startswith(b"#!/usr/bin/env bash"))
    ]
    assert len(scripts) >= 8
    check("shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *scripts)


def test_the_containers_are_bounded_and_refer_to_what_is_there() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    assert {"bootstrap", "maintainer", "host-1", "host-2", "host-3", "gateway", "prometheus", "grafana"} <= set(
        services
    )
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert set(service.get("depends_on", {})) <= set(services), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in compose["volumes"], volume
        if service["image"].startswith("p2pmodel"):
            assert service["cap_drop"] == ["ALL"], name
        else:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "a version that is pinned"
    check("bash", "-n", "docker/entrypoint.sh")


def test_docker_takes_the_compose_file() -> None:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker compose is not installed")
    check("docker", "compose", "--file", "docker/compose.yaml", "config", "--quiet")


def test_the_stack_says_in_one_sentence_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotFound, match="Prometheus is not installed"):
        Stack(StackOptions(tmp_path, ("127.0.0.1:9100",)))


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_a_wrong_target_and_a_port_in_use_are_said(tmp_path: Path) -> None:
    import socket

    with pytest.raises(UsageError, match="HOST:PORT"):
        Stack(StackOptions(tmp_path, ("here",)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(Busy, match=f"Port {port} is in use"),
            Stack(StackOptions(tmp_path, ("127.0.0.1:9100",), port=port, alertmanager_port=port)),
        ):
            pass
