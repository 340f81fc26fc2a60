# SPDX-License-Identifier: Apache-2.0
"""
Dramatiq: a real worker process with one thread on a real Redis.
"""

from __future__ import annotations

import json

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker

import fasten
from fasten.context import HEADER
from fasten.shim import dramatiq as shim
from tests.brokers import HOSTILE_VALUES, is_minted
from tests.checker import faults, rows_of
from tests.outside import wait_until
from tests.workers import worker

COMMAND = ("dramatiq", "tests.tasks_dramatiq", "--processes", "1", "--threads", "1")


@pytest.fixture
def tasks(tmp_path, monkeypatch, sqlite_dsn):
    """
    Run a worker; return the module of its actors.
    """
    before = dramatiq.broker.global_broker
    with worker(
        tmp_path, monkeypatch, sqlite_dsn, "tests.tasks_dramatiq", *COMMAND
    ) as module:
        yield module
        module.broker.close()
        module.broker.client.close()
    dramatiq.set_broker(before)


def test_the_id_reaches_the_worker(tasks, sqlite_dsn):
    """
    Messages, what actors send, retries, delayed messages, the next of a pipeline and
    coroutines run under the sending request's id; a skipped one leaves nothing.
    """
    with fasten.bind("req-1"):
        tasks.place.send("ord-1")
        tasks.flaky.send("ord-2")
        tasks.soon.send("ord-3")
        tasks.notify.send_with_options(args=("ord-4",), delay=50)
        (tasks.notify.message("ord-5") | tasks.notify.message_with_options()).run()
        tasks.skipped.send("ord-6")
    wait_until(lambda: len(rows_of(sqlite_dsn)) >= 8, 30)
    tasks.skipped.send("ord-7")
    tasks.flaky.send("ord-8")
    wait_until(lambda: len(rows_of(sqlite_dsn)) >= 10, 30)

    rows = rows_of(sqlite_dsn)
    assert [] == faults(rows)
    assert {"task"} == {row["method"] for row in rows}
    minted = {row["request_id"] for row in rows if row["target"] == "ord-8"}
    assert {"req-1"} == {r["request_id"] for r in rows if r["target"] != "ord-8"}
    assert [32] == [len(rid) for rid in minted]


def test_forged_messages(tasks, sqlite_dsn):
    """
    Whatever a message on the Redis has for an id or brings along, none becomes an id,
    and the actor runs.
    """
    redis = tasks.broker.client
    for number, value in enumerate(HOSTILE_VALUES):
        message = tasks.received.message(number, value)
        forged = {**message.asdict(), "options": {HEADER: value}}
        forged["options"]["redis_message_id"] = message.message_id
        redis.hset("dramatiq:default.msgs", message.message_id, json.dumps(forged))
        redis.rpush("dramatiq:default", message.message_id)
    wait_until(lambda: len(rows_of(sqlite_dsn)) >= len(HOSTILE_VALUES), 30)
    rows = rows_of(sqlite_dsn)

    assert [] == faults(rows)
    assert [] == [row for row in rows if not is_minted(row["request_id"])]
    assert {str(n) for n, _ in enumerate(HOSTILE_VALUES)} == {r["target"] for r in rows}
    assert len(HOSTILE_VALUES) == len({row["request_id"] for row in rows})


@pytest.fixture
def stub():
    """
    Return a broker in memory with the shim, and what its actor saw.
    """
    broker, seen = shim.install(shim.install(StubBroker())), []

    @dramatiq.actor(broker=broker, max_retries=0)
    def look():
        seen.append(fasten.current_request_id())

    worker = dramatiq.Worker(broker, worker_timeout=10, worker_threads=1)
    worker.start()
    yield broker, look, seen
    worker.stop()
    broker.close()


def test_forged_ids(stub):
    """
    What is no id is not taken for one, and the actor runs.
    """
    broker, look, seen = stub
    for value in HOSTILE_VALUES:
        message = look.message()
        message.options[HEADER] = value
        broker.enqueue(message)
    broker.join("default", timeout=10_000)

    assert [] == [rid for rid in seen if not is_minted(rid)]
    assert len(HOSTILE_VALUES) == len(set(seen))
    assert 1 == sum(type(m).__name__ == "RequestID" for m in broker.middleware)
