# SPDX-License-Identifier: Apache-2.0
"""
`make bench-peers`: fasten beside the libraries that a user would pick instead.

Caller's p50 in a tight loop, durable events a second (the same number for each, from
the first call until all are stored), and the share of acknowledged events that is found
after kill -9; all in one run, in turns, each in a process of its own. Prints a table
and writes peers.json.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.peer_libraries import PEERS, Peer
from benchmarks.reference import events, machine, median, percentile

ROUNDS = 3
EVENTS = 20_000
ALIVE_S = 1.0
RESULTS = Path(__file__).with_name("peers.json")
PRINTED = "{:26}{:>10}  {:14}{:17}{:>9}{:>12}{:>11}"


# --- in the peer's process ------------------------------------------------------------


def measure(peer: Peer) -> dict[str, float]:
    """
    Record EVENTS in a tight loop: time each call, and all until they are stored.

    One event is stored before that. What a library takes for its first, it takes once.
    """
    given = list(events(EVENTS + 1))
    clock = time.perf_counter
    start = clock()
    peer.open()
    peer.record(given.pop())
    peer.settle()
    first_s = clock() - start
    taken: list[float] = []
    start = before = clock()
    for event in given:
        peer.record(event)
        after = clock()
        taken.append(after - before)
        before = after
    peer.settle()
    spent = clock() - start
    return {
        "p50_us": 1e6 * median(taken),
        "p99_us": 1e6 * percentile(taken, 0.99),
        "per_s": len(taken) / spent,
        "first_s": first_s,
    }


def record_until_killed(peer: Peer) -> None:
    """
    Record, and say so on stdout once each call has returned.
    """
    peer.open()
    # Written by hand: what print() buffers dies with the process.
    for event in events(10**9):
        peer.record(event)
        os.write(1, f"{event['target']}\n".encode())


def child(name: str, task: str, folder: Path) -> None:
    """
    Do one task for one peer.
    """
    peer = PEERS[name](folder)
    if task == "measure":
        print(json.dumps(measure(peer)))
    elif task == "die":
        record_until_killed(peer)
    else:
        print("\n".join(peer.targets()))


# --- the run --------------------------------------------------------------------------


def command(name: str, task: str, folder: Path) -> list[str]:
    """
    Return what starts a task in a process of its own.
    """
    return [sys.executable, "-m", "benchmarks.peers", name, task, str(folder)]


def output_of(name: str, task: str, folder: Path) -> str:
    """
    Run a task to its end; return what it printed.

    Raises:
        RuntimeError: it failed; with the last line of its complaint.
    """
    ended = subprocess.run(
        command(name, task, folder), capture_output=True, text=True, check=False
    )
    if ended.returncode:
        lines = ended.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {ended.returncode}")
    return ended.stdout


def found_after_kill(name: str, folder: Path) -> float:
    """
    Kill a recording process; return which share of what it acknowledged is stored.
    """
    victim = subprocess.Popen(
        command(name, "die", folder), stdout=subprocess.PIPE, text=True
    )
    assert victim.stdout is not None
    acked = {victim.stdout.readline().strip()}
    deadline = time.monotonic() + ALIVE_S
    while time.monotonic() < deadline:
        acked.add(victim.stdout.readline().strip())
    os.kill(victim.pid, signal.SIGKILL)
    # What it wrote before it died is still in the pipe; half a line is not counted.
    acked.update(line.strip() for line in victim.stdout if line.endswith("\n"))
    victim.wait()
    stored = set(output_of(name, "count", folder).split())
    return len(acked & stored) / len(acked)


def results() -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Measure the peers in turns; yield each one's figures, or why there are none.
    """
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in PEERS}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as at:
        for number in range(ROUNDS):
            for name in [n for n in PEERS if n not in failed]:
                at_ = Path(at) / f"{list(PEERS).index(name)}-{number}"
                folders = [at_.with_suffix(f".{task}") for task in ("m", "k")]
                for folder in folders:
                    folder.mkdir()
                try:
                    figures = json.loads(output_of(name, "measure", folders[0]))
                    figures["found"] = found_after_kill(name, folders[1])
                    rounds[name].append(figures)
                except RuntimeError as error:
                    failed[name] = str(error)
    for name, taken in rounds.items():
        if name in failed:
            yield name, {"failed": failed[name]}
        else:
            yield name, summary(taken)


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """
    Return the median of each figure, with its spread; of what was found, the least.
    """
    figures: dict[str, Any] = {}
    for key in ("p50_us", "p99_us", "per_s", "first_s"):
        values = [figures_[key] for figures_ in rounds]
        figures[key] = round(median(values), 3)
        figures[f"{key}_spread"] = [round(min(values), 3), round(max(values), 3)]
    figures["found"] = round(min(figures_["found"] for figures_ in rounds), 4)
    return figures


def installed(package: str) -> str:
    """
    Return the version that was measured.
    """
    if package == "python":
        return platform.python_version()
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def main() -> None:
    """
    Print the table, write the JSON.
    """
    print(
        PRINTED.format(
            "", "version", "store", "a row is", "p50, us", "durable/s", "found"
        )
    )
    rows = []
    for name, figures in results():
        peer = PEERS[name]
        row = {
            "name": name,
            "version": installed(peer.package),
            "store": peer.store,
            "keeps": peer.keeps,
            **figures,
        }
        rows.append(row)
        head = name, row["version"], peer.store, peer.keeps
        if "failed" in figures:
            print(
                PRINTED.format(*head, "-", "-", "-"), f" not measured: {row['failed']}"
            )
            continue
        found = f"{100 * figures['found']:.1f} %"
        print(
            PRINTED.format(
                *head, f"{figures['p50_us']:.1f}", f"{figures['per_s']:.0f}", found
            )
        )
    RESULTS.write_text(
        json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    if len(sys.argv) == 4:
        child(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    else:
        main()
