# SPDX-License-Identifier: Apache-2.0
"""
Durable sys and api rows: appended, searched within bounds, expired.

What the rings do with the same questions is in `test_streams`.
"""

from __future__ import annotations

import logging
import threading
import time

import attrs
import pytest

import fasten
from fasten import delivery, engine, repository
from fasten.repository import Database, StreamRepository, stream
from fasten.rows import Query, format_timestamp
from fasten.settings import parse_dsn

DAY_US = 86_400_000_000
NOW_US = 1_776_861_296_000_000


def line(number, **fields):
    """
    Return a sys row in wire form, *number* seconds after NOW.
    """
    return {
        "shape": "sys",
        "level": "info",
        "event": f"event {number}",
        "request_id": f"r-{number % 3}",
        "service_id": "svc",
        "source_node_id": "n",
        "tenant_id": None,
        "timestamp": format_timestamp(NOW_US + number * 1_000_000),
        "logger": "app",
        **fields,
    }


@pytest.fixture
def store(store_dsn, tmp_path):
    """
    Return an empty store of log lines.
    """
    dsn = parse_dsn(store_dsn, cwd=tmp_path, table="sys_log")
    database = Database(dsn)
    yield StreamRepository(dsn, "sys", database)
    database.release()


def ask(store, **given):
    """
    Return the page that the reader's parameters ask for.
    """
    return store.query(Query.parse("sys", given, now_us=NOW_US))


class TestSearch:
    @pytest.mark.parametrize(
        "needle",
        ["ORDER 7", "order 7", 'say "hi"', "a\\b", "line\nend", "50%_", "caf\u00e9"],
    )
    def test_finds_text_in_event_and_fields(self, store, needle):
        """
        In any case; what JSON escapes, and what LIKE means otherwise, is text here.
        """
        store.append([line(1, event=f"x {needle} y"), line(2, note={"a": [needle]})])
        store.append([line(3), line(4, note="50x_")])

        assert ["event 2", f"x {needle} y"] == [
            row.event for row in ask(store, q=needle).rows
        ]

    @pytest.mark.parametrize("order", ["asc", "desc"])
    def test_looks_at_so_many_rows_a_page(self, store, monkeypatch, order):
        """
        A page may be empty; its cursor goes on, and no row is lost or told twice.
        """
        monkeypatch.setattr(stream, "SEARCHED", 10)
        hits = [3, 4, 38, 57, 58, 59]
        store.append(
            [line(n, note="needle" if n in hits else "hay") for n in range(60)]
        )
        found, sizes, cursor = [], [], None
        while True:
            page = ask(store, q="needle", order=order, limit=2, cursor=cursor)
            found += [int(row.event.split()[1]) for row in page.rows]
            sizes.append(len(page.rows))
            cursor = page.next
            if cursor is None:
                break

        assert (hits if order == "asc" else hits[::-1]) == found
        assert 0 in sizes
        assert len(sizes) <= 10

    def test_other_filters_come_first(self, store, monkeypatch):
        """
        The bound counts rows that the other filters let through.
        """
        monkeypatch.setattr(stream, "SEARCHED", 10)
        store.append([line(n, level="debug") for n in range(100)])
        store.append([line(100, level="error", note="needle")])
        store.append([line(n, level="debug") for n in range(101, 200)])
        page = ask(store, q="needle", level="error")

        assert (["event 100"], None) == ([row.event for row in page.rows], page.next)

    def test_counts_what_it_can(self, store, monkeypatch):
        """
        A total is told only where all rows were looked at.
        """
        store.append([line(n, note="needle") for n in range(10)])
        known = ask(store, q="needle", count=True, limit=3)
        monkeypatch.setattr(stream, "SEARCHED", 10)
        unknown = ask(store, q="needle", count=True, limit=3)
        plain = ask(store, count=True, limit=3)

        assert (10, None, 10) == (known.total, unknown.total, plain.total)


class TestSweep:
    def test_deletes_the_oldest_in_batches(self, store):
        """
        So many at a time, the oldest first, and nothing that is younger.
        """
        store.append([line(n) for n in (5, 1, 4, 2, 3)])
        gone = [store.sweep(NOW_US + 4_000_000, limit=2) for _ in range(3)]

        assert [2, 1, 0] == gone
        assert ["event 4", "event 5"] == [row.event for row in ask(store).rows]

    def test_of_one_service(self, store):
        """
        Services that share a table keep their rows for different times.
        """
        store.append([line(1), line(2, service_id="other")])

        assert 1 == store.sweep(NOW_US + DAY_US, service_id="svc")
        assert ["other"] == [row.service_id for row in ask(store).rows]


@pytest.fixture
def swept(monkeypatch):
    """
    Return a function that starts fasten, its sweeps looked at every 50 ms.
    """
    monkeypatch.setattr(delivery, "SWEEP_FIRST_S", 0.05)

    def start(dsn, **settings):
        extra = "&" if "?" in dsn else "?"
        return fasten.init(
            service_id="svc",
            stdout="",
            sys_dsn=f"{dsn}{extra}table=sys_log",
            api_dsn=f"{dsn}{extra}table=api_log",
            **settings,
        )

    return start


class TestDelivery:
    def test_both_streams_are_swept(self, store_dsn, swept, wait_until, monkeypatch):
        """
        Each after its own days, batch behind batch, while lines go on arriving.
        """
        monkeypatch.setattr(repository, "SWEEP_ROWS", 3)
        running = swept(store_dsn, sys_retention_days=30, api_retention_days=180)
        old = format_timestamp(time.time_ns() // 1000 - 31 * DAY_US)
        lines = running.delivery.stream_store("sys")
        requests = running.delivery.stream_store("api")
        lines.append([line(0, timestamp=old, event="old") for _ in range(8)])
        requests.append([request(old), request(format_timestamp(DAY_US))])
        fasten.log.info("young")

        assert fasten.flush(10)
        wait_until(lambda: len(running.query("sys").rows) == 1, 20)
        wait_until(lambda: len(running.query("api").rows) == 1, 20)
        assert ["young"] == [row.event for row in running.query("sys").rows]
        assert [old] == [row.timestamp for row in running.query("api").rows]

    def test_a_clock_that_was_set_ahead_deletes_nothing(self, sqlite_dsn, swept):
        """
        It may run an hour ahead of what has passed since the start, no more.
        """
        running = swept(sqlite_dsn)
        part = running.delivery
        wall_s, steady_s = part._began
        part._began = wall_s - 10 * 365 * 86_400, steady_s

        assert part._now_us() < time.time_ns() // 1000 - 9 * 365 * DAY_US

    def test_a_store_that_refuses_is_told_once(
        self, sqlite_dsn, swept, caplog, monkeypatch
    ):
        """
        With the reason, and not again while it stays the same.
        """
        running = swept(sqlite_dsn, retention_sweep_interval=3600)
        store = running.delivery.stream_store("sys")
        store.append([line(0)])
        tried = threading.Semaphore(0)

        def refuse(*_):
            tried.release()
            with store.database.transaction() as connection:
                connection.exec_driver_sql("DELETE FROM no_such_table")

        monkeypatch.setattr(store, "sweep", refuse)
        with caplog.at_level(logging.WARNING, "fasten"):
            for _ in range(2):
                expire(running, "sys")

        assert tried.acquire(timeout=5)
        # A table that is not there yet has nothing to delete: that is no news.
        assert "" == caplog.text
        monkeypatch.setattr(store, "sweep", refusing(PermissionError("read-only")))
        with caplog.at_level(logging.WARNING, "fasten"):
            for _ in range(2):
                expire(running, "sys")

        assert 1 == caplog.text.count("fasten sys: old rows cannot be deleted")

    def test_no_store_is_made_for_it(self, sqlite_dsn, swept, tmp_path):
        """
        A sweep of nothing leaves no file behind.
        """
        running = swept(sqlite_dsn)
        expire(running, "sys")

        assert [] == list(tmp_path.glob("*.db*"))


def request(timestamp):
    """
    Return an api row in wire form.
    """
    return {
        "shape": "api",
        "method": "GET",
        "path": "/",
        "request_id": "r",
        "service_id": "svc",
        "source_node_id": "n",
        "complete": True,
        "timestamp": timestamp,
    }


def expire(running: engine.Engine, name: str) -> None:
    """
    Run the sweep of one stream here and now.
    """
    running.delivery._sweeps[name].run()


def refusing(error):
    """
    Return a sweep that raises.
    """

    def sweep(*_):
        raise error

    return sweep


def test_the_rows_come_back_as_they_were(store):
    """
    Fixed keys and free fields, whatever a sweep or a search did in between.
    """
    given = line(7, user_id=42, nested={"a": [1, None]})
    store.append([given])
    (row,) = ask(store, q="42").rows

    assert given == row.to_dict()
    assert attrs.asdict(row)["fields"] == {"user_id": 42, "nested": {"a": [1, None]}}
