# SPDX-License-Identifier: Apache-2.0
"""
Transactions of many processes, some of which are killed: both or neither, in order.

FASTEN_TEST_KILLS=200 is the long form: so many kills for every kind of connection.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any, Final, Self

import pytest

import fasten
from tests.checker import faults, rows_of
from tests.outside import ROOT, run_python, wait_until
from tests.transactions import (
    WAYS,
    AsyncOrmPlainly,
    DjangoConnection,
    OrmSession,
    Psycopg,
    Sqlite3,
    business,
    prepare,
    waiting,
)

# What stores make of a transaction whose process dies is no matter of interpreters.
pytestmark = pytest.mark.slow

KILLS: Final = int(os.environ.get("FASTEN_TEST_KILLS", "3"))
SHORT: Final = (Sqlite3, Psycopg, OrmSession, DjangoConnection, AsyncOrmPlainly)
PAIRS: Final = [
    pytest.param(way.__name__, store, id=f"{way.__name__}-{store}")
    for way in (WAYS if "FASTEN_TEST_KILLS" in os.environ else SHORT)
    for store in way.stores  # type: ignore[attr-defined]
]

VICTIMS: Final = """
    import os, random, signal, sys, time
    import fasten
    from tests import transactions
    from tests.faults import loaded

    dsn, name, kills, spool_dir = sys.argv[1:]
    way = getattr(transactions, name)
    way.load()  # like `loaded`: before the forks, not in each
    chance = random.Random(os.getpid())


    def work(first, told):
        fasten.init(service_id="svc", node_id="n", audit_dsn=dsn, stdout="",
                    spool_dir=spool_dir)
        mine = way(dsn)
        for number in range(first, first + 1000):
            mine.do(f"write {number}", f"emit {number}")
            if number == first + 1:
                os.write(told, b"!")
            mine.commit()
            if hasattr(mine, "again"):
                mine.again()


    for kill in range(int(kills)):
        heard, told = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                work(kill * 1000, told)
            finally:
                os._exit(1)
        os.close(told)
        if not os.read(heard, 1):
            sys.exit("the victim died by itself")
        os.close(heard)
        time.sleep(chance.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
"""


def start(dsn: str, **settings: Any) -> fasten.Engine:
    """
    Run fasten on *dsn*, quietly.
    """
    given = {"service_id": "svc", "node_id": "n", "stdout": "", "audit_dsn": dsn}
    return fasten.init(**given | settings)


@pytest.mark.parametrize(("name", "store"), PAIRS)
def test_a_kill_leaves_both_or_neither(
    request: Any, tmp_path: Path, name: str, store: str
) -> None:
    """
    Whenever the process dies, each order has its row, and each row its order.
    """
    dsn = request.getfixturevalue(f"{store}_dsn")
    spool_dir = str(tmp_path / "spool")
    prepare(dsn)
    done = run_python(VICTIMS, dsn, name, str(KILLS), spool_dir, timeout=60 + KILLS * 5)

    assert 0 == done.returncode, done.stderr
    start(dsn, spool_dir=spool_dir)
    wait_until(lambda: not waiting(dsn), 30)
    rows = rows_of(dsn)
    assert [] == faults(rows)
    assert business(dsn) == sorted(int(row["target"]) for row in rows)
    assert len(rows) >= KILLS


WORKER: Final = """
    import os, sys, time
    import fasten
    from tests.transactions import OrmSession

    dsn, number, transactions, spool_dir = sys.argv[1:]
    number, transactions = int(number), int(transactions)
    fasten.init(service_id="svc", node_id="n", audit_dsn=dsn, stdout="",
                spool_dir=spool_dir)
    fasten.codes.register("shop", {"LINE_ADDED": fasten.codes.Meta()})
    mine = OrmSession(dsn)
    for n in range(transactions):
        for attempt in range(20):
            try:
                mine.write(number * 10_000 + n)
                for line in range(3):
                    fasten.emit("LINE_ADDED", number, actor=f"{os.getpid()}",
                                detail={"n": n * 3 + line}, connection=mine.connection)
                mine.commit()
                break
            except Exception as error:
                mine.roll_back()
                if "locked" not in str(error):
                    raise
        print(n, flush=True)
    sys.stdin.read()
"""


class Workers:
    """
    Eight processes of one service on two hosts, as their spools tell.
    """

    def __init__(self, dsn: str, folder: Path, transactions: int) -> None:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.transactions = transactions
        self.all = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", textwrap.dedent(WORKER), dsn, str(number)),
                    *(str(transactions), str(folder / f"host-{number % 2}")),
                ],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(8)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.all:
            worker.kill()
            worker.communicate()

    def wait_for(self, worker: subprocess.Popen[str], n: int) -> None:
        """
        Wait until *worker* has committed its transaction *n*.
        """
        assert worker.stdout
        for line in worker.stdout:
            if int(line) == n:
                return
        raise AssertionError(f"worker {worker.pid} ended before {n}")


def test_eight_processes_and_two_movers(store_dsn: str, tmp_path: Path) -> None:
    """
    No row twice, each writer's in order, and nothing is stuck when two movers die.
    """
    prepare(store_dsn)
    start(store_dsn, spool_dir=str(tmp_path / "host-2"))
    fasten.emit("ORDER_PLACED", "makes the tables")
    assert fasten.flush(20)
    with Workers(store_dsn, tmp_path, 25) as workers:
        for worker in workers.all:
            workers.wait_for(worker, 10)
        for killed in workers.all[:2]:
            killed.send_signal(signal.SIGKILL)
        for worker in workers.all[2:]:
            workers.wait_for(worker, 24)
        # Nobody flushes: those that are left have to see to it.
        wait_until(lambda: not waiting(store_dsn), 15)
    rows = rows_of(store_dsn)

    assert [] == faults(rows)
    lines = [row for row in rows if row["code"] == "LINE_ADDED"]
    assert len(business(store_dsn)) * 3 == len(lines)
    of_writers = defaultdict(list)
    for row in lines:
        of_writers[row["actor"]].append(json.loads(row["detail"])["n"])
    assert 8 == len(of_writers)
    for numbers in of_writers.values():
        assert list(range(len(numbers))) == numbers
