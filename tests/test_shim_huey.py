# SPDX-License-Identifier: Apache-2.0
"""
Huey: a real consumer with two processes on a real Redis.
"""

from __future__ import annotations

import pytest
from huey.api import Result

import fasten
from fasten.shim import huey as shim
from tests.brokers import HOSTILE_VALUES, is_minted
from tests.checker import faults, rows_of
from tests.outside import wait_until
from tests.workers import worker

CONSUMER = ("huey.bin.huey_consumer", "tests.tasks_huey.huey", "-k", "process")
OPTIONS = ("-w", "2", "-d", "0.01", "-m", "0.05", "-s", "1", "-n")


@pytest.fixture
def tasks(tmp_path, monkeypatch, sqlite_dsn):
    """
    Run a consumer; return the module of its tasks.
    """
    command = (*CONSUMER, *OPTIONS)
    with worker(
        tmp_path, monkeypatch, sqlite_dsn, "tests.tasks_huey", *command
    ) as module:
        yield module
        module.huey.storage.conn.close()


def test_the_id_reaches_the_consumer(tasks, sqlite_dsn):
    """
    Tasks, what they enqueue, retries with and without a delay, and what follows a
    task run under the enqueuing request's id; the arguments are as they were given.
    """
    with fasten.bind("req-1"):
        placed = tasks.place("ord-1")
        again = tasks.flaky("ord-2")
        tasks.huey.enqueue(tasks.unbound.s().then(tasks.notify))
        later = tasks.unbound.schedule(delay=1)
    assert "req-1" == placed(blocking=True, timeout=30, max_delay=0.05)
    assert "req-1" == later(blocking=True, timeout=30, max_delay=0.05)
    tasks.cancelled()
    minted = [
        tasks.unbound()(blocking=True, timeout=30, max_delay=0.05) for _ in range(4)
    ]
    wait_until(lambda: len(rows_of(sqlite_dsn)) >= 4, 30)

    rows = rows_of(sqlite_dsn)
    assert [] == faults(rows)
    assert {("task", "req-1")} == {(row["method"], row["request_id"]) for row in rows}
    assert ["notify", "notify", "flaky", "place"] == sorted(
        (row["client"] for row in rows), key=["notify", "flaky", "place"].index
    )
    assert {"{}"} == {row["detail"] for row in rows if row["code"] == "JOB_COMPLETED"}
    assert "req-1" == again(blocking=True, timeout=30, max_delay=0.05)
    assert [32] * 4 == [len(rid) for rid in minted]
    assert 4 == len(set(minted))


def test_forged_messages(tasks):
    """
    Whatever a message on the Redis has for an id, none becomes one, and the task runs.
    """
    values, wanted = [*HOSTILE_VALUES, b"\xff\0"], {}
    for value in values:
        task = tasks.unbound.s()
        known = tasks.huey.serializer.deserialize(tasks.huey.serialize_task(task))
        forged = known._replace(kwargs={"_fasten_request_id": value})
        tasks.huey.storage.enqueue(tasks.huey.serializer.serialize(forged))
        wanted[task.id] = Result(tasks.huey, task)
    found = [
        each(blocking=True, timeout=30, max_delay=0.05) for each in wanted.values()
    ]

    assert [] == [rid for rid in found if not is_minted(rid)]
    assert len(values) == len(set(found))


def test_immediate_tasks(fasten_trail):
    """
    An immediate task runs under the caller's id, and leaves the caller's scope alone;
    installed twice, the shim acts once.
    """
    from huey import MemoryHuey

    huey = shim.install(shim.install(MemoryHuey(immediate=True)))

    @huey.task()
    def place(order):
        fasten.emit("ORDER_PLACED", order)

    with fasten.bind("req-2", actor="ann"):
        place("ord-1")
        assert "ann" == fasten.current().actor
    place("ord-2")

    first, second = fasten_trail.audit
    assert ("req-2", "system", "task") == (
        first["request_id"],
        first["actor"],
        first["method"],
    )
    assert 32 == len(second["request_id"])
    assert None is fasten.current()
