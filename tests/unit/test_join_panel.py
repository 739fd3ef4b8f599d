"""The panel of `p2pmodel join`, drawn from a glance."""

import io
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console
from rich.logging import RichHandler

from p2pmodel.cli.panel import LivePanel, view
from p2pmodel.domain.ids import Digest, PatchId, VersionId
from p2pmodel.domain.swarm import Lease, Span
from p2pmodel.node.watching.glance import Glance, PatchGlance, PeerGlance, VersionGlance
from p2pmodel.telemetry import logs
from p2pmodel.wire.signing import Key

ME, OTHER = (Key.generate().peer for _ in range(2))
MODEL = Digest("ab" * 32)
LEASE = Lease(ME, MODEL, Span(0, 2), "fp32", (VersionId(MODEL),), 0.00123, 0, False, 1e12)
GLANCE = Glance(
    peer=ME,
    address=f"/ip4/127.0.0.1/tcp/7000/p2p/{ME}",
    uptime=7300,
    model="mine",
    head="1.0.2",
    coverage=(1, 2, 1, 0),
    hosted=LEASE,
    part="no layers",
    sessions=3,
    sessions_total=57,
    failed=1,
    tokens=12345,
    tokens_per_second=23.4,
    round=3,
    phase="voting",
    phase_seconds=40,
    round_patches=1,
    accepts=1,
    threshold=2,
    patches=(
        PatchGlance(PatchId(Digest("cd" * 32)), "waits for its round", 1, 0),
        PatchGlance(PatchId(Digest("ef" * 32)), "left out of 1.0.1: \x1b[2Jworse"),
    ),
    patch_count=9,
    versions=(VersionGlance("1.0.2", VersionId(Digest("12" * 32)), "3 patches", 0.98, 1.0),),
    peers=(PeerGlance(OTHER, ("host", "\x1b]0;x"), "2:4"),),
    peer_count=4,
)


def drawn(glance: Glance, width: int = 120) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(view(glance, width))
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_it_says_what_the_node_does(width: int) -> None:
    text = " ".join(drawn(GLANCE, width).replace("│", " ").split())
    for wanted in (
        "mine 1.0.2",
        "layers 0:2 of 4 in fp32",
        "1.23 ms a layer",
        "3 sessions now, 57 in all; 12,345 tokens, 23.4 a second; 1 failed",
        "1 layer is served by nobody",
        "voting for 40 s: 1 patch, 1 of 2 accepting verdicts",
        f"4: …{OTHER[-8:]} 2:4 (host",
        "and 3 more",
        "9 in all",
        "cdcdcdcdcd waits for its round, 1 accept, 0 reject",
        "0.9800",
        "-2.00%",
        "up 2 h",
    ):
        assert wanted in text, wanted


def test_the_address_can_be_copied() -> None:
    lines = drawn(GLANCE, 60).splitlines()
    below = "".join(lines[next(i for i, line in enumerate(lines) if line.startswith("╰")) + 1 :])
    assert GLANCE.address in below


def test_what_peers_write_does_not_steer_the_terminal() -> None:
    assert "\x1b" not in drawn(GLANCE)


def test_a_node_without_layers_or_company_says_so() -> None:
    alone = replace(GLANCE, hosted=None, coverage=(0,) * 100, patches=(), versions=(), peers=(), peer_count=0)
    text = drawn(alone)
    for wanted in ("no layers; records, patches and rounds", "nobody else yet", "no patches of mine yet"):
        assert wanted in text
    assert "serving" not in text
    assert "100 layers are served by nobody" in text


def test_lines_and_logs_go_above_the_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system=None, width=100)
    monkeypatch.setattr(logging.getLogger(), "handlers", [RichHandler(console=Console(file=io.StringIO()))])
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, RichHandler)
    with LivePanel(console) as panel:
        panel.show(GLANCE)
        assert handler.console is console
        panel.say("adopted mine 1.0.2")
        logging.getLogger("p2pmodel").error("a warning of [red]ours[/]")
    assert handler.console is not console
    text = screen.getvalue()
    assert text.index("adopted mine 1.0.2") > text.index("3 sessions")
    assert "a warning of [red]ours[/]" in text
    assert text.rstrip().endswith("\x1b[2K")  # the panel is gone
    assert "\x1b[?25h" in text  # and the cursor is back


@pytest.mark.usefixtures("restored_logging")
def test_a_panel_has_no_place_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    logs.configure("INFO", io.StringIO())
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert not LivePanel.has_place()


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
