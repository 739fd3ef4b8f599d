"""`p2pmodel test` and `p2pmodel exam`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2pmodel.cli import options
from p2pmodel.cli.output import emit, plain, size, table
from p2pmodel.domain.errors import Regressed, UsageError
from p2pmodel.domain.ids import short

if TYPE_CHECKING:  # it loads torch
    from p2pmodel.node.versions.testing import TaskReport

exam = typer.Typer(no_args_is_help=True, help="Look at exams.")


def examine(
    subject: Annotated[
        str, typer.Argument(metavar="PATCH|VERSION", help="A patch file, the id of a patch, or a version.")
    ],
    suite: Annotated[
        Path | None,
        typer.Option(
            "--suite", exists=True, file_okay=False, help="Folder of a suite.", show_default="the model's own exam"
        ),
    ] = None,
    harness: Annotated[
        Path | None,
        typer.Option(
            "--harness",
            exists=True,
            file_okay=False,
            help="Folder of tasks of lm-evaluation-harness, instead of a suite.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Of the --harness; may be repeated.", show_default="all in the folder"),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Cases of each task.", show_default="all")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0.0, help="How much worse a task's score may be.", show_default="0.01"),
    ] = None,
    junit_file: Annotated[
        Path | None, typer.Option("--junit", dir_okay=False, help="Write a report as JUnit XML, for CI systems.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, show_default="all cores")] = None,
    model: options.Model = None,
    base: options.Base = None,
    home: options.Home = None,
    json: options.Json = False,
) -> None:
    """Run a suite on a patch or a version, against its parent; a regression ends with status 11."""
    if junit_file is not None and not junit_file.resolve().parent.is_dir():
        raise UsageError(f"The folder of {junit_file} does not exist.", "Make it first.")
    if harness is None and (task or limit is not None or tolerance is not None):
        raise UsageError("--task, --limit and --tolerance are for --harness.", "A suite says its own.")
    if harness is not None and (suite is not None or junit_file is not None):
        raise UsageError("--harness runs instead of a suite, and writes no JUnit XML.", "Use --json.")
    from p2pmodel.cli.junit import junit
    from p2pmodel.node.machine.threads import use_threads
    from p2pmodel.node.versions.testing import run_suite, run_tasks

    use_threads(threads)
    if harness is not None:
        allowed = 0.01 if tolerance is None else tolerance
        return _show_tasks(run_tasks(home, model, base, subject, harness, task or (), limit, allowed), json)
    report = run_suite(home, model, base, subject, suite)
    if junit_file is not None:
        junit_file.write_bytes(junit(report))
    rows = [
        [
            result.section,
            str(result.cases),
            *(f"{score:.1%}" if "/" in result.section else f"{score:.4f}" for score in (result.parent, result.score)),
            f"{result.change:+.2%}",
            f"{result.tolerance:.2%}",
            "REGRESSED" if result.regression else "ok",
        ]
        for result in report.sections
    ]
    title = f"{report.what} against {report.parent}, on {'the exam' if report.is_the_lineages else 'the suite'} "
    title += f"{report.suite} ({short(report.digest)}): nats per byte, or failed cases; lower is better"
    body = table(title, ["section", "cases", "parent", "now", "change", "may", ""], rows)
    emit(
        {**plain(report), "regressions": report.regressions},
        f"{body}\n{report.cases} cases in {report.seconds:.1f} s",
        json,
    )
    if report.regressions:
        raise Regressed(f"{report.what} regresses: {'; '.join(report.regressions)}.")


def _show_tasks(report: "TaskReport", json: bool) -> None:
    rows = [
        [
            result.task,
            result.metric,
            str(result.cases),
            f"{result.parent:.4f}",
            f"{result.score:.4f}",
            f"{result.change:+.4f}",
            f"{result.tolerance:.4f}",
            "REGRESSED" if result.regression else "ok",
        ]
        for result in report.results
    ]
    title = f"{report.what} against {report.parent}, on the tasks in {report.folder}"
    body = table(title, ["task", "metric", "cases", "parent", "now", "change", "may", ""], rows)
    emit({**plain(report), "regressions": report.regressions}, f"{body}\nin {report.seconds:.1f} s", json)
    if report.regressions:
        raise Regressed(f"{report.what} regresses: {'; '.join(report.regressions)}.")


@exam.command()
def check(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a suite.")],
    json: options.Json = False,
) -> None:
    """Read a suite as everybody does who uses it, and say what it holds and what its digest is."""
    from p2pmodel.engine.exams import Suite

    suite = Suite.load(folder)
    archive = len(suite.pack())
    rows = [
        [
            section.name,
            str(section.count("tune")),
            str(section.count("test")),
            "the Manifest's" if section.tolerance is None else f"{section.tolerance:.2%}",
        ]
        for section in suite.sections
    ]
    emit(
        {
            "name": suite.name,
            "licence": suite.licence,
            "digest": suite.digest,
            "bytes": archive,
            "sections": [
                {"name": s.name, "tune": s.count("tune"), "test": s.count("test"), "tolerance": s.tolerance}
                for s in suite.sections
            ],
        },
        table("", ["section", "tuning cases", "deciding cases", "tolerance"], rows)
        + f"\n{suite.name}: digest {suite.digest}, {size(archive)}",
        json,
    )
