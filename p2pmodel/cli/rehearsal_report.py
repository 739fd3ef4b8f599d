"""The quickstart's report as text."""

from p2pmodel.cli.output import size, table
from p2pmodel.cli.rehearsal import Report
from p2pmodel.domain.ids import short


def report_text(report: Report) -> str:
    parts = ["", _history(report), "", _patches(report), "", _costs(report), "", *_next(report)]
    return "\n".join(parts)


def _mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / len(losses)


def _history(report: Report) -> str:
    domains = list(report.base_exam)
    rows = [
        ["1.0.0", "the base", *(f"{report.base_exam[d]:.4f}" for d in domains), f"{_mean(report.base_exam):.4f}", ""]
    ]
    for version in report.versions:
        for label, losses in ((f"Fisher, α {version.alpha:g}", version.exam), ("(plain mean)", version.mean)):
            if not losses:
                continue
            rows.append(
                [
                    version.number if losses is version.exam else "",
                    label,
                    *(f"{losses[d]:.4f}" for d in domains),
                    f"{_mean(losses):.4f}",
                    f"{_mean(losses) / _mean(report.base_exam) - 1:+.2%}",
                ]
            )
    return table(
        "Versions: exam loss in nats per byte, on held-out text that no contributor trained on",
        ["version", "merge", *domains, "mean", "vs base"],
        rows,
    )


def _patches(report: Report) -> str:
    rows = [
        [v.number, p.domain, short(p.id), size(p.bytes), f"{p.loss_before:.4f}", f"{p.loss_after:.4f}", p.state]
        for v in report.versions
        for p in v.patches
    ]
    return table(
        "Patches: the contributor's own held-out loss, in nats per token",
        ["for", "data", "patch", "size", "before", "after", "in the round"],
        rows,
    )


def _costs(report: Report) -> str:
    traffic = "; ".join(f"{name.replace('_', ' ')} {size(value)}" for name, value in sorted(report.traffic.items()))
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
    return f"Over the network: {traffic}\nSeconds: {seconds}"


def _next(report: Report) -> list[str]:
    if report.pids:
        return [
            "The swarm is still running. Join it, ask it, watch it, stop it:",
            f"  p2pmodel join --peers {report.address}",
            f"  p2pmodel infer --peers {report.address} 'import '",
            f"  p2pmodel status --home {report.folder}/bootstrap",
            f"  p2pmodel log --home {report.folder}/bootstrap",
            f"  kill {' '.join(str(pid) for pid in report.pids.values())}",
        ]
    return [
        "Go on with:",
        "  p2pmodel join                                  host the starter model; prints how others join",
        "  p2pmodel infer 'import '                       ask the swarm that runs on this machine",
        "  p2pmodel train --data FILE                     train a patch on a text of yours",
        "  p2pmodel quickstart --keep                     the same swarm, left running",
    ]
