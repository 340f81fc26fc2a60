# SPDX-License-Identifier: Apache-2.0
"""
Celery: a real prefork worker on a real Redis; and a fan-out that ends there.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sqlite3
import threading
from contextlib import closing, contextmanager

import httpx
import paho.mqtt.client as paho
import pytest
from celery import chain
from redis import Redis

import fasten
from fasten.context import HEADER
from fasten.shim import http, mqtt
from tests import brokers
from tests.brokers import HOSTILE_VALUES, is_minted
from tests.checker import faults, rows_of
from tests.cli_runs import fasten_on
from tests.outside import wait_until
from tests.servers import asgi_thread
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


REQUESTS = 1000


class Shop:
    """
    An ASGI application that tells a device by MQTT of each order, 20 at once.
    """

    def __init__(self, client):
        self._client, self._crowd = client, asyncio.Barrier(20)

    async def __call__(self, scope, _receive, send):
        order = scope["path"].removeprefix("/")
        fasten.emit("ORDER_PLACED", order)
        await self._crowd.wait()  # for others, each in a scope of its own
        await mqtt.publish(self._client, f"orders/{order}", {"order": order}, qos=1)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@contextmanager
def connected(port):
    """
    Yield an MQTT client whose thread runs.
    """
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


@contextmanager
def device(port, tasks):
    """
    Hand each order that comes by MQTT to the worker.
    """
    router, ready = mqtt.Router(), threading.Event()

    @router.handler("orders/+")
    def on_order(message, _ctx):
        order = json.loads(message.payload)["order"]
        fasten.emit("DEVICE_SETPOINT_UPDATED", order)
        tasks.pick.delay(order)

    with connected(port) as client:
        client.on_subscribe = lambda *_: ready.set()
        router.attach(client)
        client.subscribe("orders/+", qos=1)
        assert ready.wait(10)
        yield


async def order_all(url):
    """
    Place all orders, 40 at a time, each second one under an id of its own; return the
    ids that the answers name.
    """
    numbers = iter(range(REQUESTS))
    ids = {}

    async def customer(client):
        for n in numbers:
            answer = await client.get(f"{url}/fan-{n}", headers=given(n))
            ids[f"fan-{n}"] = answer.headers["X-Request-ID"]

    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        await asyncio.gather(*(customer(client) for _ in range(40)))
    return ids


def given(number):
    """
    Return the headers of an order.
    """
    return {"X-Request-ID": f"mine-{number}"} if number % 2 else {}


STOPS = {
    ("ORDER_PLACED", "http"),
    ("DEVICE_SETPOINT_UPDATED", "mqtt"),
    ("JOB_COMPLETED", "task"),
    ("BATCH_PROCESSED", "task"),
}


@pytest.mark.slow
def test_a_thousand_requests_at_once(tasks, dsn, tmp_path):
    """
    Requests that fan out over HTTP, MQTT, Celery and a thread pool mix no id and lose
    none: each of the four rows of each has the id that its client sent or got.
    """
    with (
        brokers.mosquitto(tmp_path) as port,
        fasten_on(dsn, spool_dir=str(tmp_path / "spool")),
        device(port, tasks),
        connected(port) as client,
    ):
        app = http.RequestIDMiddleware(http.APILogger(Shop(client)))
        with asgi_thread(app, lifespan="off") as url:
            ids = asyncio.run(order_all(url))
        assert fasten.flush(60)
        wait_until(lambda: count(dsn, "fan-%") >= 4 * REQUESTS, 120)

    rows = rows_for(dsn, "fan-")
    found = {(r["target"], r["request_id"], r["code"], r["method"]) for r in rows}
    wanted = {(order, rid, *stop) for order, rid in ids.items() for stop in STOPS}
    assert set() == found ^ wanted
    assert 4 * REQUESTS == len(rows)
    assert REQUESTS == len(set(ids.values()))
    assert {rid for n in range(REQUESTS) for rid in given(n).values()} < set(
        ids.values()
    )


def count(dsn, pattern):
    """
    Count the rows of some targets.
    """
    with closing(sqlite3.connect(dsn.removeprefix("sqlite:///"))) as connection:
        query = "SELECT count(*) FROM audit_log WHERE target LIKE ?"
        return connection.execute(query, (pattern,)).fetchone()[0]
