# SPDX-License-Identifier: Apache-2.0
"""
Scheduled jobs: an id per run, with the real APScheduler, `schedule`, and by hand.
"""

from __future__ import annotations

import asyncio
import threading
from datetime import datetime

import pytest
import schedule
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.schedulers.background import BackgroundScheduler

import fasten
from fasten.shim.scheduler import instrument
from tests.outside import wait_until


def test_each_run_has_an_id_of_its_own(fasten_trail):
    """
    Rows of one run share `scheduler-<run_id>`; the next run has another one.
    """

    @instrument
    def nightly_cleanup():
        fasten.emit("RETENTION_SWEEP_RAN", "audit_log")
        fasten.log.info("cleanup_done")

    nightly_cleanup()
    rid = fasten_trail.assert_correlated()
    row = fasten_trail.assert_emitted("RETENTION_SWEEP_RAN")
    nightly_cleanup()

    assert rid.startswith("scheduler-")
    assert ("scheduler", "scheduler") == (row["actor_kind"], row["method"])
    assert 2 == len({row["request_id"] for row in fasten_trail.audit})
    assert "nightly_cleanup" == nightly_cleanup.__name__


def test_async_jobs(fasten_trail):
    """
    A coroutine function stays one, and its awaits keep the id.
    """

    @instrument
    async def job():
        await asyncio.sleep(0)
        fasten.emit("JOB_COMPLETED", "job")

    asyncio.run(job())

    assert fasten_trail.assert_correlated().startswith("scheduler-")


def test_objects_that_are_awaited(fasten_trail):
    """
    An object whose call is a coroutine function runs to its end before the row is made.
    """

    class Job:
        async def __call__(self):
            await asyncio.sleep(0)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(instrument(Job(), code="JOB_COMPLETED")())

    assert "failure" == fasten_trail.audit[-1]["outcome"]


def test_recorded_runs(fasten_trail):
    """
    With a code, start, success and failure are rows, with the duration.
    """

    @instrument(code="JOB_COMPLETED", target="nightly")
    def fine():
        return 7

    @instrument(code="JOB_COMPLETED")
    def broken():
        raise error

    error = ValueError("no")

    assert 7 == fine()
    with pytest.raises(ValueError, match="no") as raised:
        broken()

    assert error is raised.value
    outcomes = [(row["outcome"], row["detail"]["phase"]) for row in fasten_trail.audit]
    assert [
        ("unknown", "started"),
        ("success", "finished"),
        ("unknown", "started"),
        ("failure", "finished"),
    ] == outcomes
    assert "nightly" == fasten_trail.audit[0]["target"]
    assert fasten_trail.audit[1]["detail"]["duration_ms"] >= 0


def test_within_a_request_the_parents_id_stays(fasten_trail):
    """
    A job started by hand inside a request knows whose request it was.
    """

    @instrument
    def job():
        return fasten.current().parent

    with fasten.bind("req-1"):
        assert "req-1" == job()
        assert "req-1" == fasten.current_request_id()


def test_apscheduler_runs_it(fasten_trail):
    """
    The real APScheduler runs an instrumented job in its own thread.
    """
    ran = threading.Event()

    @instrument
    def job():
        fasten.emit("JOB_COMPLETED", "job")
        ran.set()

    scheduler = BackgroundScheduler()
    scheduler.add_job(job, "date", run_date=datetime.now())  # noqa: DTZ005
    scheduler.start()
    try:
        assert ran.wait(10)
        # It takes a job that is over off its list, and fails where the list is gone.
        wait_until(lambda: not scheduler.get_jobs(), 10)
    finally:
        scheduler.shutdown()

    assert fasten_trail.assert_correlated().startswith("scheduler-")


def test_apscheduler_awaits_it(fasten_trail):
    """
    The real APScheduler of asyncio awaits an instrumented coroutine function, each run
    under an id of its own, and what is recorded names its end.
    """

    async def main():
        done = asyncio.Queue()

        @instrument(code="JOB_COMPLETED", target="sync")
        async def job(number):
            await asyncio.sleep(0)
            await done.put(number)

        scheduler = AsyncIOScheduler()
        now = datetime.now()  # noqa: DTZ005
        for number in range(2):
            scheduler.add_job(job, "date", run_date=now, args=[number])
        scheduler.start()
        ran = {await asyncio.wait_for(done.get(), 10) for _ in range(2)}
        await asyncio.to_thread(wait_until, lambda: len(fasten_trail.audit) == 4, 10)
        await asyncio.to_thread(wait_until, lambda: not scheduler.get_jobs(), 10)
        scheduler.shutdown()
        return ran

    assert {0, 1} == asyncio.run(asyncio.wait_for(main(), 20))
    rows = fasten_trail.audit
    assert 2 == len({row["request_id"] for row in rows})
    assert ["success", "success", "unknown", "unknown"] == sorted(
        row["outcome"] for row in rows
    )


def test_schedule_runs_it(fasten_trail):
    """
    The package `schedule` runs an instrumented job under its own name.
    """

    @instrument
    def nightly(table):
        fasten.emit("JOB_COMPLETED", table)

    plan = schedule.Scheduler()
    job = plan.every().day.do(nightly, "audit_log")
    plan.run_all()
    plan.run_all()

    assert "do=nightly" in str(job)
    ids = {row["request_id"] for row in fasten_trail.audit}
    assert 2 == len(ids)
    assert {"scheduler-"} == {rid[:10] for rid in ids}
