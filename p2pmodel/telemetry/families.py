"""Makes metrics, and knows what was made: their documentation is written from it.

Names are `p2pmodel_…` in base units; counters end in `_total`. A label's values are listed, or what bounds them
is said.
"""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from p2pmodel import __version__
from p2pmodel.domain.tally import Tally

Labels = Mapping[str, Sequence[str] | str]
"""Of each label its values, or in words what bounds them."""
NO_LABELS: Labels = {}


@dataclass(frozen=True)
class Family:
    """name: as a scrape shows it; kind: counter, gauge, histogram or info."""

    name: str
    kind: str
    help: str
    labels: Labels


class TallyHistogram(Collector):
    """A histogram of what others tally, by the values of one label, or of none."""

    def __init__(self, name: str, help: str, bounds: Sequence[float], label: str, values: Sequence[str]) -> None:
        self._name, self._help, self._label = name, help, label
        self._tallies = {value: Tally(bounds) for value in values or ("",)}

    def follow(self, tallies: Mapping[str, Tally]) -> None:
        """From now on these are shown; the key is the label's value, "" without a label."""
        self._tallies.update(tallies)

    def collect(self) -> Iterable[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._help, labels=[self._label] if self._label else None)
        for value, tally in self._tallies.items():
            bounds = [*(floatToGoString(bound) for bound in tally.bounds), "+Inf"]
            buckets = list(zip(bounds, map(float, accumulate(tuple(tally.counts))), strict=True))
            family.add_metric([value] if self._label else [], buckets, tally.total)
        yield family


class Families:
    """Of one process, in a registry of its own. Where a label's values are listed they are there, at 0, from the start,
    so that a rate never misses their first increment."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.made: list[Family] = []
        ProcessCollector(registry=self.registry)
        self.info(
            "p2pmodel_build", "Version of p2pmodel and of Python.", {"version": "of p2pmodel", "python": "its version"}
        ).info({"version": __version__, "python": platform.python_version()})

    def counter(self, name: str, help: str, labels: Labels = NO_LABELS) -> Counter:
        """name: without `_total`."""
        self._note(f"{name}_total", "counter", help, labels)
        counter = Counter(name, help, tuple(labels), registry=self.registry)
        for values in _listed(labels):
            counter.labels(*values)
        return counter

    def gauge(self, name: str, help: str, labels: Labels = NO_LABELS) -> Gauge:
        self._note(name, "gauge", help, labels)
        return Gauge(name, help, tuple(labels), registry=self.registry)

    def info(self, name: str, help: str, labels: Labels) -> Info:
        """name: without `_info`; the labels' values are set together."""
        self._note(f"{name}_info", "info", help, labels)
        return Info(name, help, registry=self.registry)

    def histogram(self, name: str, help: str, bounds: Sequence[float], labels: Labels = NO_LABELS) -> Histogram:
        self._note(name, "histogram", help, labels)
        return Histogram(name, help, tuple(labels), buckets=tuple(bounds), registry=self.registry)

    def tallied(
        self, name: str, help: str, bounds: Sequence[float], label: str = "", values: Sequence[str] = ()
    ) -> TallyHistogram:
        self._note(name, "histogram", help, {label: values} if label else NO_LABELS)
        histogram = TallyHistogram(name, help, bounds, label, values)
        self.registry.register(histogram)
        return histogram

    def exposition(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return bytes(generate_latest(self.registry))

    def _note(self, name: str, kind: str, help: str, labels: Labels) -> None:
        self.made.append(Family(name, kind, help, labels))


class Growth:
    """Carries totals that others keep into counters, which only take what was added."""

    def __init__(self) -> None:
        self._shown: dict[Counter, float] = {}

    def carry(self, counter: Counter, total: float) -> None:
        """A total that is less than before is of something that began anew: it counts from 0."""
        before = self._shown.get(counter, 0.0)
        self._shown[counter] = total
        counter.inc(total - before if total >= before else total)


def _listed(labels: Labels) -> Iterable[tuple[str, ...]]:
    lists = [values for values in labels.values() if not isinstance(values, str)]
    return product(*lists) if lists and len(lists) == len(labels) else ()
