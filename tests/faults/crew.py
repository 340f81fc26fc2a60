# SPDX-License-Identifier: Apache-2.0
"""
A crew of workers, forked from one preloaded master as servers do: what it costs the
store and the disk while all are busy, and while none is. Run as a script it is that
master.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import psycopg

from tests.faults.grounds import Grounds
from tests.faults.oracle import Outcome, judge, read_acks
from tests.faults.oracle import select as ask
from tests.faults.victim import emit_on, settings_of
from tests.outside import ROOT, wait_until

__all__ = ["EXPERIMENTS", "workers"]

CREW: Final = 32
SPOOL_BYTES: Final = 16 * 1024 * 1024
"""What 32 idle workers may hold in the spool."""

PAUSE_S: Final = 0.05
"""Between two rows of a worker."""

_CONNECTIONS: Final = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'fasten'
"""
_TABLES: Final = ("audit_log", "sys_log", "api_log")


def workers(
    grounds: Grounds,
    *,
    trials: int = 2000,
    crew: int = CREW,
    idle_s: float | None = None,
) -> Outcome:
    """
    Have a crew write to three streams until all are at it and were looked at *trials*
    times, then rest: a connection each at the most while busy, none while idle, and a
    small spool.

    *idle_s* instead of the seconds after which a worker closes its connection, and
    gives its spare segment back.
    """
    start, dsn, acks = (
        time.monotonic(),
        grounds.dsn("postgres"),
        grounds.folder / "acks",
    )
    acks.touch()
    given = (dsn, str(grounds.spool), str(acks), str(crew), str(idle_s))
    with _master(*given) as master:
        busy, idle, kept = _observe(grounds, dsn, master, trials, crew, idle_s)
        _, said = master.communicate(timeout=120)
    wrong = [said[-4000:]] * (master.returncode != 0)
    wrong += [f"{busy} connections of {crew} workers"] * (busy > crew)
    wrong += [f"{idle} connections while idle"] * (idle > 0)
    wrong += [f"idle, they hold {kept} bytes of spool"] * (kept > _allowed(crew))
    wrong += [f"nothing in {table}" for table in _TABLES if not _has_rows(dsn, table)]
    with acks.open(encoding="ascii") as file:
        name = f"{crew} workers: {busy} connections, idle {idle} and {kept >> 10} KiB"
        found = judge(name, dsn, read_acks(file), trials=trials, wrong=wrong)
    return found.lasting(time.monotonic() - start)


def _observe(
    grounds: Grounds,
    dsn: str,
    master: subprocess.Popen[str],
    trials: int,
    crew: int,
    idle_s: float | None,
) -> tuple[int, int, int]:
    """
    Return the most connections while all are busy; those, and the bytes, once idle.
    """
    with psycopg.connect(dsn, autocommit=True) as watcher:

        def connections() -> int:
            return watcher.execute(_CONNECTIONS).fetchone()[0]  # type: ignore[index]

        def is_idle() -> bool:
            return not connections() and held(grounds.spool) <= _allowed(crew)

        wait_until(lambda: connections() >= crew, 120)
        busy = max(connections() for _ in range(trials))
        print("rest", file=master.stdin, flush=True)
        with suppress(TimeoutError):
            # The spare goes by itself, later than the connection.
            wait_until(is_idle, 90 if idle_s is None else 15)
        return busy, connections(), held(grounds.spool)


def _allowed(crew: int) -> int:
    return SPOOL_BYTES * crew // CREW


def _has_rows(dsn: str, table: str) -> bool:
    return bool(ask(dsn, f"SELECT 1 FROM {table} LIMIT 1"))


def held(spool: Path) -> int:
    """
    Return the bytes that are allocated for the files of a spool, as `du` counts them.
    """
    total = 0
    for path in spool.iterdir():
        with suppress(FileNotFoundError):  # given back a moment ago
            total += path.stat().st_blocks * 512
    return total


@contextmanager
def _master(*given: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", __name__, *given],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            yield running
        finally:
            with suppress(ProcessLookupError):  # all are gone, as they should be
                os.killpg(running.pid, signal.SIGKILL)


EXPERIMENTS: Final[dict[str, Callable[..., Outcome]]] = {"workers-postgres": workers}
"""The experiments of this module."""


# --- in the master --------------------------------------------------------------------


def _lead(dsn: str, spool: str, acks: str, crew: str, idle_s: str) -> None:
    import fasten

    if idle_s != "None":
        _tire_after(float(idle_s))
    fd = os.open(acks, os.O_WRONLY | os.O_APPEND)
    given = settings_of(dsn, spool, sys_dsn=dsn, api_dsn=dsn)
    delivery: Any = fasten.init(**given).delivery
    delivery._load()  # once, not in each worker
    rest, end = os.pipe(), os.pipe()
    children = []
    for number in range(int(crew)):
        pid = os.fork()
        if pid == 0:
            os.close(rest[1])
            os.close(end[1])
            _work(f"w{number}", fd, rest[0], end[0])
        children.append(pid)
    sys.stdin.readline()
    os.close(rest[1])
    sys.stdin.read()
    os.close(end[1])
    codes = [os.waitpid(pid, 0)[1] for pid in children]
    if any(codes):
        raise RuntimeError(f"workers ended with {codes}")


def _work(name: str, acks: int, rest: int, end: int) -> None:
    """
    Write to all three streams until it is time to rest; then be idle until the end.
    """
    import fasten

    emit, number = emit_on(name, acks), 0
    while not select.select([rest], [], [], PAUSE_S)[0]:
        emit("main", number)
        fasten.log.info("worked", number=number)
        fasten.record_api(method="GET", path="/", route="/", status=200)
        number += 1
    os.read(end, 1)
    os._exit(not fasten.close(10))


def _tire_after(seconds: float) -> None:
    """
    Have a worker that is idle give back what it does not need after *seconds*.
    """
    from fasten import delivery
    from fasten.spool import queue

    changed: Any = delivery, queue
    for module in changed:
        module.IDLE_S = seconds


if __name__ == "__main__":
    _lead(*sys.argv[1:])
