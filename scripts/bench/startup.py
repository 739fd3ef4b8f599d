#!/usr/bin/env python
"""How long until something is there: `p2pmodel --help`, and `p2pmodel join` until it says `serving`.

    python scripts/bench/startup.py [--runs 7] [--json] [-- ARGUMENTS OF JOIN]

What is compared runs in turns, so that what else the machine does falls on all alike. Wall and CPU time (user and
system, of the process and its children) are medians; the ratio is of the CPU times, which a busy machine bends less.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

GOAL_SECONDS = 0.3
SERVING_SECONDS = 120.0

Cost = tuple[float, float]
"""Wall and CPU seconds."""


def run_python(*arguments: str) -> Cost:
    began, used = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    now = os.times()
    cpu = now.children_user + now.children_system - used.children_user - used.children_system
    return time.perf_counter() - began, cpu


def join(arguments: Sequence[str]) -> Cost:
    """From start to the line with `serving`; the CPU time until then, of the node and of what it started."""
    with tempfile.TemporaryDirectory(prefix="p2pmodel-bench-") as home:
        command = [sys.executable, "-m", "p2pmodel", "join", "--home", home, *arguments]
        began = time.perf_counter()
        node = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        timer = threading.Timer(SERVING_SECONDS, node.kill)
        timer.start()
        try:
            assert node.stdout is not None
            if not any("serving" in line for line in node.stdout):
                raise SystemExit(f"the node ended before it served: {' '.join(command)}")
            return time.perf_counter() - began, cpu_of_session(node.pid)
        finally:
            timer.cancel()
            node.send_signal(signal.SIGTERM)
            try:
                node.wait(30)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()


def cpu_of_session(session: int) -> float:
    """CPU seconds of the live processes of a session, and of those of their children that have ended."""
    ticks = 0
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session:
            ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(cases: dict[str, Callable[[], Cost]], runs: int) -> dict[str, Cost]:
    """Medians. The first turn fills the page cache and counts for nothing."""
    costs: dict[str, list[Cost]] = {name: [] for name in cases}
    for turn in range(runs + 1):
        for name, case in cases.items():
            cost = case()
            if turn:
                costs[name].append(cost)
    return {
        name: (statistics.median(wall for wall, _ in found), statistics.median(cpu for _, cpu in found))
        for name, found in costs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=7, help="turns that count, for `--help`")
    parser.add_argument("--join-runs", type=int, default=3, help="turns that count, for `join`; 0 leaves it out")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("join", nargs="*", help="arguments of join, after --")
    asked = parser.parse_args()

    short = measure(
        {
            "python -c pass": lambda: run_python("-c", "pass"),
            "p2pmodel --help": lambda: run_python("-m", "p2pmodel", "--help"),
        },
        asked.runs,
    )
    imports, serving = "import torch, hivemind", "p2pmodel join, until serving"
    long = (
        measure(
            {imports: lambda: run_python("-c", "import torch, hivemind"), serving: lambda: join(asked.join)},
            asked.join_runs,
        )
        if asked.join_runs
        else {}
    )
    if asked.json:
        print(
            json.dumps(
                {name: {"wall_seconds": wall, "cpu_seconds": cpu} for name, (wall, cpu) in (short | long).items()}
            )
        )
        return
    for found in (short, long):
        base = next(iter(found.values()), (1.0, 1.0))
        for name, (wall, cpu) in found.items():
            print(f"{name:<30} {wall:7.3f} s wall {cpu:7.3f} s CPU   × {cpu / base[1]:.2f}")
    verdict = "reached" if short["p2pmodel --help"][0] < GOAL_SECONDS else "missed"
    print(f"goal for `p2pmodel --help`, {GOAL_SECONDS} s: {verdict}")


if __name__ == "__main__":
    main()
