"""The Grafana dashboards that ship with p2pmodel.

Needs grafana-foundation-sdk (`pip install '.[dev]'`). Every panel's query has to give data on a live swarm:
tests/integration/test_monitoring.py asks each of them.
"""

import json
from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import bargauge, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FOLDER = "p2pmodel/telemetry/monitoring/grafana/dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="p2pmodel")
WIDE, HALF, THIRD, QUARTER = 24, 12, 8, 6

S = '{swarm=~"$swarm"}'
N = '{swarm=~"$swarm", instance=~"$instance"}'
WINDOW = "[$__rate_interval]"
Target = tuple[str, str]
"""A query, and how its series are called."""


def query(expr: str, legend: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expr).legend_format(legend).datasource(SOURCE)


def lines(title: str, unit: str, targets: Sequence[Target], span: int = HALF, about: str = "") -> timeseries.Panel:
    panel = timeseries.Panel().title(title).description(about).unit(unit).min(0).height(8).span(span).datasource(SOURCE)
    for expr, legend in targets:
        panel = panel.with_target(query(expr, legend))
    return panel.fill_opacity(8)


def figure(title: str, unit: str, expr: str, about: str = "") -> stat.Panel:
    panel = stat.Panel().title(title).description(about).unit(unit).height(4).span(QUARTER).datasource(SOURCE)
    return panel.with_target(query(expr, ""))


def bars(title: str, unit: str, expr: str, legend: str, span: int = HALF, about: str = "") -> bargauge.Panel:
    panel = bargauge.Panel().title(title).description(about).unit(unit).min(0).height(8).span(span).datasource(SOURCE)
    return panel.with_target(query(expr, legend).instant())


def rows(title: str, targets: Sequence[Target], span: int = HALF, about: str = "") -> table.Panel:
    """A table of what series there are now; each target is a column."""
    panel = table.Panel().title(title).description(about).height(8).span(span).datasource(SOURCE)
    for expr, legend in targets:
        panel = panel.with_target(query(expr, legend).instant().format(PromQueryFormat.TABLE))
    return panel


def board(name: str, about: str, panels: Sequence[Any], *, by_instance: bool = False) -> dashboard.Dashboard:
    made = dashboard.Dashboard(f"p2pmodel: {name}").uid(f"p2pmodel-{name.lower()}").description(about)
    made = made.tags(["p2pmodel"]).refresh("10s").time("now-30m", "now").timezone("browser")
    made = made.with_variable(_variable("swarm", "label_values(p2pmodel_layers, swarm)"))
    if by_instance:
        made = made.with_variable(_variable("instance", 'label_values(p2pmodel_layers{swarm=~"$swarm"}, instance)'))
    for panel in panels:
        made = made.with_panel(panel)
    return made


def _variable(name: str, values: str) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).query(values).datasource(SOURCE).multi(True).include_all(True)
    return variable.all_value(".*")


def quantiles(metric: str, labels: str = S) -> list[Target]:
    buckets = f"sum by (le) (rate({metric}_bucket{labels}{WINDOW}))"
    return [(f"histogram_quantile({q}, {buckets})", f"p{round(100 * q)}") for q in (0.5, 0.95, 0.99)]


def rate(metric: str, by: str = "", labels: str = S) -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({metric}{labels}{WINDOW}))"


SWARM = board(
    "Swarm",
    "Who serves what, and what those who ask get of it.",
    [
        figure("Layers served by nobody", "none", f"sum(swarm:p2pmodel_layers_uncovered:count{S})"),
        figure("Fewest replicas of a layer", "none", f"min(swarm:p2pmodel_layer_replicas:min{S})", "Target: two."),
        figure("Peers", "none", f"max(p2pmodel_peers_present{S})"),
        figure("Tokens generated", "short", f"sum(swarm:p2pmodel_generated_tokens:rate1m{S})", "A second."),
        bars(
            "Coverage by layer",
            "none",
            f"max by (layer) (swarm_layer:p2pmodel_layer_replicas:median{S})",
            "{{layer}}",
            about="How many nodes serve each layer at the head version.",
        ),
        rows(
            "Who serves what",
            [
                ('max by (instance) (p2pmodel_hosted_span{swarm=~"$swarm", end="first"})', "first layer"),
                ('max by (instance) (p2pmodel_hosted_span{swarm=~"$swarm", end="behind"})', "behind the last"),
                (f"max by (instance) (p2pmodel_sessions_open{S})", "sessions"),
            ],
        ),
        lines(
            "Tokens",
            "short",
            [
                (rate("p2pmodel_generated_tokens_total"), "generated a second"),
                (rate("p2pmodel_prompt_tokens_total"), "of prompts a second"),
                (rate("p2pmodel_reused_tokens_total"), "of these, known to the stages"),
            ],
        ),
        lines("Requests", "reqps", [(rate("p2pmodel_answers_total", "outcome"), "{{outcome}}")]),
        lines("Time to first token", "s", quantiles("p2pmodel_first_token_seconds")),
        lines("Time of one output token", "s", quantiles("p2pmodel_output_token_seconds")),
        lines("Wait for a turn at the gateways", "s", quantiles("p2pmodel_wait_seconds")),
        lines(
            "Failovers and failed sessions",
            "short",
            [
                (rate("p2pmodel_failovers_total"), "answers that went on elsewhere, a second"),
                (rate("p2pmodel_sessions_failed_total"), "sessions refused or broken off, a second"),
            ],
        ),
        lines("Link delay", "s", [(f"max by (statistic) (p2pmodel_link_delay_seconds{S})", "{{statistic}}")]),
        lines(
            "Compression of activations",
            "none",
            [(f"swarm_codec:p2pmodel_compression:ratio{S}", "{{codec}}")],
            about="Bytes in fp32 for each byte that travels.",
        ),
    ],
)

HEAD_SCORE = 'p2pmodel_exam_score{swarm=~"$swarm", of="head"}'
GAIN = '(avg(p2pmodel_exam_score{swarm=~"$swarm", of="base"}) - avg(p2pmodel_exam_score{swarm=~"$swarm", of="head"}))'

PATCHES_REFUSED = 'p2pmodel_records_refused_total{swarm=~"$swarm", kind="patch"}'

COLLECTIVE = board(
    "Collective",
    "How the model gets better: rounds, patches, exams.",
    [
        figure("Round of the head", "none", f"max(p2pmodel_head_round{S})"),
        figure(
            "Nodes behind the head",
            "none",
            f"count(p2pmodel_served_round{S} < scalar(max(p2pmodel_head_round{S}))) or vector(0)",
        ),
        figure("Better than the base by", "none", GAIN, "Mean over the sections: nats per byte, or share of cases."),
        figure(
            "Bytes per improvement",
            "bytes",
            f'sum(p2pmodel_blob_bytes_total{{swarm=~"$swarm", direction="sent"}}) / clamp_min({GAIN}, 1e-9)',
            "Records and blobs sent by the nodes as they run now, for each unit that the exam fell by.",
        ),
        lines(
            "Rounds by outcome",
            "none",
            [(f"max by (outcome) (p2pmodel_rounds_total{S})", "{{outcome}}")],
            about="Since the oldest node that runs began.",
        ),
        lines(
            "Patches by outcome",
            "none",
            [
                (f"max by (outcome) (p2pmodel_patches_total{S})", "{{outcome}}"),
                (f"max(sum by (instance) ({PATCHES_REFUSED})) or vector(0)", "refused"),
            ],
        ),
        lines("Exam of the head", "none", [(f"avg by (section) ({HEAD_SCORE})", "{{section}}")], about="Low is good."),
        lines(
            "Exam: head, parent, plain mean, base",
            "none",
            [(f"avg by (of) (p2pmodel_exam_score{S})", "{{of}}")],
            about="Mean over the sections.",
        ),
        bars(
            "Exam by version",
            "none",
            f"avg by (number) ({HEAD_SCORE} * on (swarm, instance) group_left (number) p2pmodel_head_version_info{S})",
            "{{number}}",
        ),
        lines(
            "Refused records",
            "none",
            [
                (
                    f"sum by (kind, reason) (increase(p2pmodel_records_refused_total{S}[5m])) or vector(0)",
                    "{{kind}} {{reason}}",
                )
            ],
            about="In five minutes, by all nodes.",
        ),
        lines(
            "Seconds of a merge",
            "s",
            [(f"sum(p2pmodel_merge_seconds_sum{S}) / clamp_min(sum(p2pmodel_merge_seconds_count{S}), 1)", "mean")],
        ),
        lines(
            "Gossip",
            "short",
            [
                (rate("p2pmodel_announcements_total", "direction"), "{{direction}} a second"),
                (rate("p2pmodel_records_repaired_total"), "found by asking, a second"),
            ],
        ),
        lines("Blobs", "Bps", [(rate("p2pmodel_blob_bytes_total", "direction"), "{{direction}}")]),
        lines("Gradients answered", "short", [(rate("p2pmodel_gradients_total"), "micro-batches a second")]),
    ],
)

NODE = board(
    "Node",
    "One node, or a few beside each other.",
    [
        figure("Layers hosted", "none", f"sum(p2pmodel_layers_hosted{N})"),
        figure("Sessions", "none", f"sum(p2pmodel_sessions_open{N})"),
        figure("Busy", "percentunit", f"max(instance:p2pmodel_busy:ratio_rate1m{N})", "Time in forwards."),
        figure("Connected peers", "none", f"max(p2pmodel_peers_connected{N})"),
        lines("Positions", "short", [(rate("p2pmodel_tokens_processed_total", "instance", N), "{{instance}}")]),
        lines(
            "Time of a forward, p95",
            "s",
            [
                (
                    f"histogram_quantile(0.95, sum by (phase, le) (rate(p2pmodel_forward_seconds_bucket{N}{WINDOW})))",
                    "{{phase}}",
                )
            ],
        ),
        lines("Queue time of a step", "s", quantiles("p2pmodel_queue_seconds", N)),
        lines(
            "Sessions in a forward",
            "none",
            [
                (
                    f"{rate('p2pmodel_batch_sessions_sum', 'instance', N)} / "
                    f"{rate('p2pmodel_batch_sessions_count', 'instance', N)}",
                    "{{instance}}",
                )
            ],
        ),
        lines("Time of one layer", "s", [(f"p2pmodel_layer_seconds{N}", "{{instance}}")]),
        lines("Memory of caches", "bytes", [(f"sum by (state) (p2pmodel_cache_bytes{N})", "{{state}}")]),
        lines("Memory of gradients' graphs", "bytes", [(f"p2pmodel_graph_bytes{N}", "{{instance}}")]),
        lines(
            "Activations",
            "Bps",
            [(rate("p2pmodel_codec_bytes_total", "codec, direction", N), "{{codec}} {{direction}}")],
        ),
        lines(
            "Resident memory",
            "bytes",
            [
                (f"process_resident_memory_bytes{N}", "{{instance}}"),
                (f"p2pmodel_child_resident_memory_bytes{N}", "{{instance}} {{process}}"),
            ],
        ),
        lines(
            "CPU",
            "none",
            [
                (f"rate(process_cpu_seconds_total{N}{WINDOW})", "{{instance}}"),
                (f"rate(p2pmodel_child_cpu_seconds_total{N}{WINDOW})", "{{instance}} {{process}}"),
            ],
            about="Cores.",
        ),
        lines(
            "Memory of the GPU",
            "bytes",
            [(f"sum by (state) (p2pmodel_gpu_memory_bytes{N}) or vector(0)", "{{state}}")],
            about="0 where no node computes on one.",
        ),
        lines(
            "GPU at work",
            "percentunit",
            [(f"p2pmodel_gpu_busy_ratio{N} or vector(0)", "{{instance}} {{gpu}}")],
            about="For anybody. 0 where no node computes on one, or nvidia-ml-py is not installed.",
        ),
        lines("Clock", "s", [(f"p2pmodel_clock_offset_seconds{N}", "{{instance}}")], about="Of one neighbour."),
        lines(
            "Gossip process",
            "none",
            [
                (f"p2pmodel_gossip_peers{N}", "{{instance}}: peers"),
                (f"increase(p2pmodel_gossip_restarts_total{N}[15m])", "{{instance}}: restarts in 15 min"),
            ],
        ),
    ],
    by_instance=True,
)

BOARDS = {"swarm": SWARM, "collective": COLLECTIVE, "node": NODE}


def files() -> dict[str, str]:
    return {
        f"{FOLDER}/{name}.json": json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"
        for name, made in BOARDS.items()
    }
