# SPDX-License-Identifier: Apache-2.0
"""
RQ: a real worker, which forks for each job, on a real Redis.
"""

from __future__ import annotations

import pickle

import pytest
from rq import Callback, Retry
from rq.serializers import JSONSerializer

import fasten
from fasten.context import HEADER
from tests.brokers import HOSTILE_VALUES, is_minted
from tests.checker import faults, rows_of
from tests.outside import run_python, wait_until
from tests.workers import worker

COMMAND = (
    *("rq.cli", "worker", "--job-class", "fasten.shim.rq.Job", "--quiet"),
    *("--url", "redis://127.0.0.1:{port}/0", "--config", "tests.tasks_rq"),
)


@pytest.fixture
def tasks(tmp_path, monkeypatch, sqlite_dsn):
    """
    Run a worker; return the module of its jobs.
    """
    with worker(
        tmp_path,
        monkeypatch,
        sqlite_dsn,
        "tests.tasks_rq",
        *COMMAND,
    ) as module:
        yield module
        module.connection.close()


def result(job):
    """
    Return what a job returned, once it has.
    """
    found = job.latest_result(timeout=30)
    while found.type is found.Type.RETRIED:
        found = job.latest_result(timeout=30)
    return found.return_value


def test_the_id_reaches_the_worker(tasks, sqlite_dsn):
    """
    Jobs, what they enqueue, retries of both kinds and callbacks run under the
    enqueuing request's id; their rows are stored when the job has ended.
    """
    with fasten.bind("req-1"):
        placed = tasks.queue.enqueue(tasks.place, "ord-1", meta={"of": "ann"})
        again = tasks.queue.enqueue(tasks.flaky, "ord-2", retry=Retry(max=1))
        tasks.queue.enqueue(
            tasks.unbound, on_success=Callback(tasks.succeeded), job_id="well"
        )
        tasks.queue.enqueue(tasks.fails, on_failure=Callback(tasks.failed))
    assert "req-1" == result(placed)
    unbound = tasks.queue.enqueue(tasks.place, "ord-3")
    minted = result(unbound)
    assert "req-1" == result(again)
    wait_until(lambda: len(rows_of(sqlite_dsn)) >= 7, 30)

    rows = rows_of(sqlite_dsn)
    assert [] == faults(rows)
    assert {"task"} == {row["method"] for row in rows}
    ids = {(row["target"], row["request_id"]) for row in rows}
    bound = ("ord-1", "ord-2", "tests.tasks_rq.unbound", "tests.tasks_rq.fails")
    assert {("ord-3", minted), *((target, "req-1") for target in bound)} == ids
    assert 32 == len(minted)
    assert {"of": "ann", HEADER: "req-1"} == placed.get_meta()


def test_forged_ids(tasks, sqlite_dsn):
    """
    What is no id is not taken for one, nor does a `meta` that is no object, or no
    pickle, break the job.
    """
    queue = tasks.shim.Queue("json", tasks.connection, serializer=JSONSerializer)
    jobs = [
        queue.create_job(tasks.unbound, meta={HEADER: value})
        for value in HOSTILE_VALUES
    ]
    jobs.append(queue.create_job(tasks.unbound))
    jobs[-1].meta = ["no", "object"]
    found = [job.perform() for job in jobs]

    assert [] == [rid for rid in found if not is_minted(rid)]
    assert len(jobs) == len(set(found))
    assert None is fasten.current()


def test_forged_messages(tasks, sqlite_dsn):
    """
    A worker gets through whatever somebody writes into a job's `meta` on the Redis.
    """
    metas = [
        *(pickle.dumps({HEADER: value}) for value in ("evt-1", "nul\0", b"\xff", 7)),
        *(pickle.dumps({HEADER: "x" * 1_000_000}), pickle.dumps(["no", "object"])),
        *(b"no pickle", b"\0"),
    ]
    with fasten.bind("req-1"):
        jobs = [
            tasks.queue.create_job(tasks.received, (n,)) for n, _ in enumerate(metas)
        ]
    for job, meta in zip(jobs, metas, strict=True):
        job.save()
        tasks.connection.hset(job.key, "meta", meta)
        tasks.queue.push_job_id(job.id)
    for job in jobs:
        result(job)
    rows = rows_of(sqlite_dsn)

    assert [] == faults(rows)
    assert [] == [row for row in rows if not is_minted(row["request_id"])]
    assert sorted(row["target"] for row in rows) == [
        str(n) for n, _ in enumerate(metas)
    ]


def test_it_says_what_is_missing():
    """
    Without RQ the error names the package and the pip line.
    """
    done = run_python(
        """
        import sys
        sys.modules["rq"] = None
        from fasten.shim import rq
        """
    )

    assert (
        "MissingExtra: the rq shim needs the package rq; pip install 'fasten[rq]'"
        in (done.stderr)
    )
