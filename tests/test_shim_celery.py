# SPDX-License-Identifier: Apache-2.0
"""
Celery: a real prefork worker on a real Redis.
"""

from __future__ import annotations

import base64
import json
import os

import pytest
from celery import chain
from redis import Redis

import fasten
from fasten.context import HEADER
from tests.brokers import HOSTILE_VALUES, is_minted
from tests.checker import faults, rows_of
from tests.outside import wait_until
from tests.workers import worker

COMMAND = (
    *("celery", "-A", "tests.tasks_celery", "worker", "--loglevel", "warning"),
    *("--pool", "prefork", "--concurrency", "2"),
)
BEAT = ("--beat", "--scheduler", "celery.beat:Scheduler")


pytestmark = pytest.mark.xdist_group("celery")


@pytest.fixture(scope="module")
def dsn(tmp_path_factory):
    """
    Return the store of this file's worker.
    """
    return f"sqlite:///{tmp_path_factory.mktemp('celery') / 'audit.db'}"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, dsn):
    """
    Run a worker with two processes, and beat; return the module of its tasks.
    """
    folder, command = tmp_path_factory.mktemp("redis"), (*COMMAND, *BEAT)
    with (
        pytest.MonkeyPatch.context() as patch,
        worker(folder, patch, dsn, "tests.tasks_celery", *command) as module,
    ):
        yield module
        module.app.close()


def rows_for(dsn, *targets):
    """
    Return the rows whose targets begin so, and see to it that all are sound.
    """
    rows = rows_of(dsn)
    assert [] == faults(rows)
    return [row for row in rows if row["target"].startswith(targets)]


def test_the_id_reaches_the_worker(tasks, dsn):
    """
    Tasks, tasks that they enqueue, chains and retries run under the enqueuing
    request's id, in processes that each started once.
    """
    with fasten.bind("req-1"):
        placed = tasks.place.delay("ord-1")
        again = tasks.flaky.delay("ord-2")
        chained = chain(tasks.place.s("ord-1"), tasks.follow.s("ord-4"))()
    assert "req-1" == placed.get(timeout=60)
    assert "req-1" == again.get(timeout=60)
    assert ["req-1", "req-1"] == chained.get(timeout=60)
    unbound = tasks.place.delay("ord-3").get(timeout=60)
    first, second = chain(tasks.place.s("ord-5"), tasks.follow.s("ord-5"))().get(
        timeout=60
    )
    wait_until(lambda: len(rows_for(dsn, "ord-")) >= 11, 30)
    wait_until(lambda: len(rows_for(dsn, "process")) >= 2, 30)

    rows = rows_for(dsn, "ord-")
    assert {"task"} == {row["method"] for row in rows}
    assert {
        *((f"ord-{number}", "req-1") for number in (1, 2, 4)),
        *(("ord-3", unbound), ("ord-5", first)),
    } == {(row["target"], row["request_id"]) for row in rows}
    assert [True, True] == [is_minted(rid) for rid in (unbound, first)]
    assert first == second != unbound
    started = [row["detail"] for row in rows_for(dsn, "process")]
    placing = {row["detail"] for row in rows if row["code"] == "ORDER_PLACED"}
    assert 2 == len(started) == len(set(started))
    assert placing <= set(started)


def test_beat_and_forged_messages(tasks, dsn):
    """
    Each task that beat sends has an id of its own; whatever a message on the Redis has
    for an id or brings along, none becomes an id, and the task runs.
    """
    broker = Redis(port=int(os.environ["TEST_REDIS_PORT"]))
    forged = [
        *({HEADER: value} for value in HOSTILE_VALUES),
        *({"headers": value} for value in (7, "x", ["a"], {HEADER: "evt-1"})),
    ]
    for number, headers in enumerate(forged):
        broker.lpush("celery", message(tasks.received.name, number, headers))
    broker.close()

    wait_until(lambda: len(rows_for(dsn, "forged-")) >= len(forged), 30)
    wait_until(lambda: len(rows_for(dsn, "tick")) >= 2, 30)

    rows = rows_for(dsn, "forged-", "tick")
    assert [] == [row for row in rows if not is_minted(row["request_id"])]
    assert len(rows) == len({row["request_id"] for row in rows})
    assert {"task"} == {row["method"] for row in rows}


def message(name, number, headers):
    """
    Return a message as Celery has it on a Redis, with *headers* of a forger.
    """
    given = headers.get(HEADER)
    body = json.dumps([[f"forged-{number}", given], {}, {}]).encode()
    properties = {
        "body_encoding": "base64",
        "correlation_id": f"forged-{number}",
        "delivery_info": {"exchange": "", "routing_key": "celery"},
        "delivery_tag": f"forged-{number}",
    }
    known = {"lang": "py", "task": name, "id": f"forged-{number}"}
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {**known, **headers},
            "properties": properties,
        }
    )


def test_eager_tasks(fasten_trail):
    """
    An eager task runs under the caller's id, and leaves the caller's scope alone.
    """
    from tests import tasks_celery as tasks

    tasks.app.conf.task_always_eager = True
    try:
        with fasten.bind("req-2", actor="ann"):
            assert "req-2" == tasks.place.delay("ord-1").get()
            assert "ann" == fasten.current().actor
    finally:
        tasks.app.conf.task_always_eager = False

    assert "req-2" == fasten_trail.assert_correlated()
    assert 2 == len(fasten_trail.audit)
