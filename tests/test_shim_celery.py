# SPDX-License-Identifier: Apache-2.0
"""
Celery: a real prefork worker on a real Redis.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import fasten
from tests import brokers
from tests.checker import faults, rows_of
from tests.outside import ROOT, wait_until


@pytest.fixture
def tasks(tmp_path, monkeypatch, sqlite_dsn):
    """
    Run a worker with two processes; return the module of its tasks.
    """
    with brokers.redis(tmp_path) as port:
        monkeypatch.setenv("TEST_REDIS_PORT", str(port))
        monkeypatch.setenv("FASTEN_SERVICE_ID", "worker")
        monkeypatch.setenv("FASTEN_AUDIT_DSN", sqlite_dsn)
        monkeypatch.setenv("FASTEN_STDOUT", "")
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [
            *(sys.executable, "-m", "celery", "-A", "tests.tasks_celery", "worker"),
            *("--pool", "prefork", "--concurrency", "2", "--loglevel", "warning"),
        ]
        with subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}
        ) as worker:
            sys.modules.pop("tests.tasks_celery", None)
            from tests import tasks_celery

            yield tasks_celery
            tasks_celery.app.close()
            worker.send_signal(signal.SIGTERM)
            worker.wait(30)


@pytest.mark.xdist_group("celery")
def test_the_id_reaches_the_worker(tasks, sqlite_dsn):
    """
    Tasks, tasks that they enqueue, and retries run under the enqueuing request's id.
    """
    with fasten.bind("req-1"):
        placed = tasks.place.delay("ord-1")
        again = tasks.flaky.delay("ord-2")
    assert "req-1" == placed.get(timeout=60)
    assert "req-1" == again.get(timeout=60)
    unbound = tasks.place.delay("ord-3").get(timeout=60)
    wait_until(lambda: len(rows_of(sqlite_dsn)) >= 5, 30)

    rows = rows_of(sqlite_dsn)
    assert [] == faults(rows)
    assert {"task"} == {row["method"] for row in rows}
    ids = {row["target"]: row["request_id"] for row in rows}
    assert {"ord-1": "req-1", "ord-2": "req-1", "ord-3": unbound} == ids
    assert 32 == len(unbound)


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
