"""docs/metrics.md, from the metrics themselves.

Beside it docs/metrics-released.txt has what was ever released, a line a metric: name, type, labels. A line may be
added; one that is changed or taken out has to be named in DEPRECATED first.
"""

from collections.abc import Sequence

from p2pmodel.telemetry.families import Family
from p2pmodel.telemetry.gateway import GatewayMetrics
from p2pmodel.telemetry.metrics import Metrics
from p2pmodel.telemetry.swarm_view import SwarmView
from scripts.generate import ROOT

RELEASED = "docs/metrics-released.txt"

DEPRECATED: dict[str, str] = {}
"""Released lines that hold no longer, and since which version, with what to use instead."""

_HEAD = """\
# Metrics

<!-- Written by `python -m scripts.generate`; a test fails when it is out of date. -->

`p2pmodel join --http 9100` and `p2pmodel serve` have `/metrics`, in Prometheus' text format, on 127.0.0.1 unless told
otherwise ([monitoring.md](monitoring.md)). Names, units and meanings stay as they are once released
([metrics-released.txt](metrics-released.txt)): what goes is deprecated first. No label holds the id of a peer, a
request or a patch. Histograms have `_bucket`, `_sum` and `_count`. A label's values that are listed are there from the
start, at 0.
"""

_TAIL = """
`process_cpu_seconds_total`, `process_resident_memory_bytes`, `process_open_fds` and the others of that family are the
Prometheus client's own, of the node or gateway itself; its two child processes are in `p2pmodel_child_…`. The share of
the time that this node's own forwards take is `rate(p2pmodel_step_seconds_total[1m])`; how busy its GPU is takes the
library nvidia-ml-py (`pip install '.[gpu]'`), which asks the driver.
"""


def files() -> dict[str, str]:
    before = (ROOT / RELEASED).read_text(encoding="utf-8").splitlines()
    return {"docs/metrics.md": document(), RELEASED: "".join(f"{line}\n" for line in released(before))}


def document() -> str:
    """The page."""
    common, node, gateway = SwarmView().made, Metrics().made, GatewayMetrics().made
    names = {family.name for family in common}
    sections = (
        ("Of nodes and gateways", common),
        ("Of nodes", [family for family in node if family.name not in names]),
        ("Of gateways", [family for family in gateway if family.name not in names]),
    )
    parts = [_HEAD]
    for title, families in sections:
        parts.append(f"\n## {title}\n\n| Metric | Type | Labels | What it tells |\n|---|---|---|---|\n")
        parts += [f"| `{x.name}` | {x.kind} | {_labels(x)} | {x.help} |\n" for x in families]
    if DEPRECATED:
        parts.append("\n## Deprecated\n\n" + "".join(f"- `{name}`: {why}\n" for name, why in DEPRECATED.items()))
    return "".join([*parts, _TAIL])


def current() -> list[str]:
    """A line a metric, sorted: name, type, labels."""
    made = (family for families in (Metrics(), GatewayMetrics()) for family in families.made)
    return sorted({" ".join((family.name, family.kind, *sorted(family.labels))) for family in made})


def released(before: Sequence[str]) -> list[str]:
    """What was ever released, with what there is now. Ends the program where a line of before holds no longer, and is
    not deprecated."""
    if broken := sorted(set(before) - set(current()) - set(DEPRECATED)):
        raise SystemExit(f"Released metrics are changed or gone: {'; '.join(broken)}. Deprecate them first.")
    return sorted({*before, *current()})


def _labels(family: Family) -> str:
    def values(given: Sequence[str] | str) -> str:
        return given if isinstance(given, str) else ", ".join(f"`{value}`" for value in given)

    return "; ".join(f"`{label}`: {values(given)}" for label, given in family.labels.items())
