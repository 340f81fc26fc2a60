# SPDX-License-Identifier: Apache-2.0
"""
Collects ratios and prints them as one table, with what must hold and the goal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reference import machine, median
from tests.postgres import private_server

# Row of performance.md: (figure, must, goal); a figure ends in what is better.
TARGETS: dict[str, tuple[str, float, float, str]] = {
    "1": ("emit p50, tight loop / S", 0.9, 0.6, "<="),
    "2": ("emit p50 without detail / S", 0.3, 0.17, "<="),
    "3": ("emit p50 at 500/s / S", 1.1, 0.7, "<="),
    "4": ("emit p99 at 500/s / p99 of S", 1.2, 0.8, "<="),
    "5": ("what crash safety adds / S", 0.25, 0.1, "<="),
    "6": ("acked rows found after kill -9", 1.0, 1.0, ">="),
    "7a": ("durable rows/s SQLite, one producer / Q", 0.5, 0.7, ">="),
    "7b": ("drain of a backlog, SQLite / Q", 0.75, 0.95, ">="),
    "8": ("durable rows/s Postgres, one producer / P", 0.45, 0.75, ">="),
    "9": ("row 7b at 600 k rows", 0.7, 0.9, ">="),
    "10": ("added p99 of a handler beside a drain, ms", 1.5, 0.6, "<="),
    "10p": ("the same with Postgres", 1.5, 0.6, "<="),
    "11": ("emit to committed when idle, ms", 20.0, 5.0, "<="),
    "12": ("4 threads: emits/s / rate of S on one", 0.6, 1.0, ">="),
    "13": ("bytes per row in SQLite / its JSON", 1.4, 1.2, "<="),
    "14": ("request_id query at 1 M rows / raw", 4.0, 2.5, "<="),
    "15": ("both middlewares per request / S", 4.0, 2.0, "<="),
    "16": ("import fasten / import structlog", 1.6, 1.4, "<="),
    "17": ("keyset page 10,000 / page 1", 2.0, 1.2, "<="),
    "v1": ("verify 1 M rows / hashing alone", 12.0, 6.0, "<="),
    "v2": ("memory of verify, 1 M rows / 100 k", 1.2, 1.05, "<="),
    "v3": ("longest append beside a sweep / its longest step", 2.0, 1.2, "<="),
    "log": ("log line with the chain / without it", 1.25, 1.2, "<="),
    "log/s": ("the same at 500/s", 1.25, 1.2, "<="),
    "log/keys": ("log line with the chain / the same line without", 1.25, 1.2, "<="),
    "log/behind": ("... where level and time are structlog's", 1.25, 1.2, "<="),
    "rss": ("resident memory added: import, MiB", 30.0, 20.0, "<="),
    "rss s1": ("... and a row stored in SQLite", 70.0, 55.0, "<="),
    "rss s": ("... and 10 k rows", 100.0, 75.0, "<="),
    "rss p1": ("... and a row stored in Postgres", 70.0, 60.0, "<="),
    "rss p": ("... and 10 k rows", 100.0, 75.0, "<="),
    "rss a": ("... and 20 k rows, the store away", 100.0, 75.0, "<="),
    "rss d": ("the same, settings of a small device", 80.0, 60.0, "<="),
    "spool": ("journal per row while the store is away, bytes", 1500.0, 900.0, "<="),
    "mem": ("memory of a queued row, bytes", 2048.0, 1024.0, "<="),
}

RESULTS = Path(__file__).with_name("results.json")

_figures: dict[str, list[float]] = {}
_costs: dict[str, list[tuple[float, float]]] = {}


@pytest.fixture
def figure() -> Callable[..., None]:
    """
    Record the ratios of one row of the table, one a round.
    """

    def record(row: str, *ratios: float) -> None:
        _figures.setdefault(row, []).extend(ratios)

    return record


@pytest.fixture
def cost() -> Callable[[str, float, float], None]:
    """
    Record what one message took, bare and through a shim, in nanoseconds.
    """

    def record(shim: str, bare_ns: float, shim_ns: float) -> None:
        _costs.setdefault(shim, []).append((bare_ns, shim_ns))

    return record


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FASTEN_") and not name.startswith("FASTEN_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def durable_postgres() -> Iterator[str]:
    """
    Return the DSN of a server with the settings of production: fsync on.
    """
    with private_server(settings=("shared_buffers=128MB",)) as server:
        yield server.dsn()


def _verdict(row: str, value: float) -> str:
    _, must, goal, sense = TARGETS[row]
    good = (lambda a, b: a <= b) if sense == "<=" else (lambda a, b: a >= b)
    return "goal" if good(value, goal) else "must" if good(value, must) else "MISSED"


def _lines() -> list[dict[str, Any]]:
    lines = []
    for row, values in _figures.items():
        name, must, goal, sense = TARGETS[row]
        value = median(values)
        lines.append(
            {
                "row": row,
                "figure": name,
                "value": round(value, 3),
                "low": round(min(values), 3),
                "high": round(max(values), 3),
                "must": f"{sense} {must:g}",
                "goal": f"{sense} {goal:g}",
                "holds": _verdict(row, value),
            }
        )
    return lines


def _kept(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Return *lines* with those of earlier runs that this one did not measure again.
    """
    known = {}
    if RESULTS.exists():
        known = {line["row"]: line for line in json.loads(RESULTS.read_text())["rows"]}
    known |= {line["row"]: line for line in lines}
    return [known[row] for row in TARGETS if row in known]


def _print_costs(write: Callable[[str], None]) -> None:
    """
    Print what each shim costs, the median of its rounds, for benchmarks/README.md.
    """
    if not _costs:
        return
    write("")
    write("| shim | bare client, us of CPU | with the shim | the shim's part |")
    write("|---|---|---|---|")
    for shim, rounds in _costs.items():
        bare, through = (
            median(list(each)) / 1000 for each in zip(*rounds, strict=True)
        )
        added = median([b - a for a, b in rounds]) / 1000
        write(f"| {shim} | {bare:.1f} | {through:.1f} | {added:+.1f} |")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """
    Print the tables, and write the first as JSON to benchmarks/results.json.
    """
    _print_costs(terminalreporter.write_line)
    lines = _lines()
    if not lines:
        return
    lines.sort(key=lambda line: list(TARGETS).index(line["row"]))
    write = terminalreporter.write_line
    write("")
    head = f"{'':6}{'figure':44}{'median':>9}{'min':>9}{'max':>9}"
    write(f"{head}  {'must':9}{'goal':9}holds")
    for line in lines:
        write(
            f"{line['row']:6}{line['figure']:44}{line['value']:>9}{line['low']:>9}"
            f"{line['high']:>9}  {line['must']:9}{line['goal']:9}{line['holds']}"
        )
    found = {"machine": machine(), "rows": _kept(lines)}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    write(f"written to {RESULTS.name}: ratios of one run on {os.cpu_count()} cores")
