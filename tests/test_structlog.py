# SPDX-License-Identifier: Apache-2.0
"""
fasten in a user's own structlog: real chains, a real engine, the stdlib bridge.

Each processor by itself is in `test_processors`.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading

import pytest
import structlog

import fasten
from fasten import processors
from fasten.processors import SysTee, add_correlation, chain
from fasten.shim.stdlib import LoggingHandler
from tests.outside import run_python

RID = "0199f3c2a4c87000800000000000abcd"
SECRET = "hunter2-canary"
Formatter = structlog.stdlib.ProcessorFormatter


@pytest.fixture(autouse=True)
def _as_new():
    yield
    processors.remove_from_configured()
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def configured(*before, after=(), **options):
    """
    Configure structlog as a user does; return where it prints JSON.
    """
    out = io.StringIO()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            *before,
            structlog.processors.JSONRenderer(),
            *after,
        ],
        logger_factory=structlog.PrintLoggerFactory(out),
        **options,
    )
    return out


def lines_of(out):
    """
    Return what was printed, a dict a line.
    """
    return [json.loads(line) for line in out.getvalue().splitlines()]


class TestInit:
    def test_ring_stdout_and_renderer_each_get_the_line(self):
        """
        The user's own renderer, fasten's NDJSON, and the ring: one line each.
        """
        done = run_python("""
            import structlog, sys
            structlog.configure(
                processors=[structlog.processors.add_log_level,
                            structlog.processors.JSONRenderer()],
                logger_factory=structlog.PrintLoggerFactory(sys.stderr),
                cache_logger_on_first_use=True,
            )
            log = structlog.get_logger()
            log.info("cached")
            import fasten
            engine = fasten.init(service_id="svc", stdout="sys")
            with fasten.bind("r-1"):
                log.info("placed", total=3)
            fasten.close()
            rows = engine.sys.ring.rows()
            assert [("placed", "r-1")] == [(r["event"], r["request_id"]) for r in rows]
        """)
        printed = [json.loads(line) for line in done.stdout.splitlines()]
        rendered = [json.loads(line) for line in done.stderr.splitlines()]

        assert 0 == done.returncode, done.stderr
        assert [("sys", "placed", 3)] == [
            (line["shape"], line["event"], line["total"]) for line in printed
        ]
        assert ["cached", "placed"] == [line["event"] for line in rendered]
        assert "r-1" == rendered[1]["request_id"]

    def test_log_off_leaves_the_chain_alone(self, monkeypatch):
        """
        Also one that an earlier init() changed; chain() by hand stays.
        """
        configured()
        users = structlog.get_config()["processors"]
        before = list(users)
        fasten.init(service_id="svc", stdout="")
        changed = list(users)
        monkeypatch.setenv("FASTEN_LOG", "off")
        running = fasten.init(service_id="svc", stdout="")
        structlog.get_logger().info("not copied")

        assert before == users != changed
        assert [] == running.sys.ring.rows()

    def test_stands_before_the_renderer_wherever_that_is(self):
        """
        A processor behind the renderer gets text, and the tee an event.
        """
        out = configured(after=[lambda _l, _m, text: f"{text} "])
        running = fasten.init(service_id="svc", stdout="")
        failed = processors.failures()
        structlog.get_logger().info("x")

        assert ["x"] == [row["event"] for row in running.sys.ring.rows()]
        assert ["x"] == [line["event"] for line in lines_of(out)]
        assert failed == processors.failures()

    def test_the_users_configuration_is_not_replaced(self):
        """
        Wrapper, context class, factory and caching are as they were.
        """
        configured(cache_logger_on_first_use=True)
        before = structlog.get_config()
        fasten.init(service_id="svc", stdout="")
        after = structlog.get_config()

        assert before.keys() == after.keys()
        assert all(before[name] is after[name] for name in before)


class TestChain:
    def test_async_loggers_keep_the_request(self, fasten_trail):
        """
        Their processors run in another thread.
        """
        configured(*chain(), wrapper_class=structlog.make_filtering_bound_logger(0))

        async def request():
            with fasten.bind(RID):
                await structlog.get_logger().ainfo("x")

        asyncio.run(request())

        assert [RID] == [row["request_id"] for row in fasten_trail.sys]

    def test_what_is_dropped_is_not_copied(self, fasten_trail):
        """
        A filter before the chain decides for both.
        """

        def drop(_logger, _method, _event):
            raise structlog.DropEvent

        out = configured(drop, *chain())
        structlog.get_logger().info("x")

        assert ([], "") == (fasten_trail.sys, out.getvalue())

    def test_a_processor_that_logs_and_emits(self, fasten_trail):
        """
        Of the user's own, in the same chain: no recursion of ours.
        """

        def audit(_logger, _method, event):
            fasten.emit("CONFIG_UPDATED", "x")
            fasten.log.info("from inside")
            return event

        configured(audit, *chain())
        structlog.get_logger().info("x")

        assert ["from inside", "x"] == [row["event"] for row in fasten_trail.sys]
        assert 1 == len(fasten_trail.audit)

    @pytest.mark.parametrize(
        "processor",
        [
            structlog.processors.format_exc_info,
            structlog.processors.dict_tracebacks,
            structlog.processors.StackInfoRenderer(),
        ],
    )
    def test_with_structlogs_exception_processors(self, fasten_trail, processor):
        """
        Whatever they make of it, the line is there and says what was raised.
        """
        configured(processor, *chain(), structlog.processors.format_exc_info)
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError:
            structlog.get_logger().exception("failed", stack_info=True)
        (row,) = fasten_trail.sys

        assert "ZeroDivisionError" in json.dumps(row["exception"])

    def test_threads_log_while_it_is_inserted(self, fasten_trail):
        """
        A thread sees the chain with all of it or without.
        """
        configured(cache_logger_on_first_use=True)
        logger, stop, failed = structlog.get_logger(), threading.Event(), []

        def work():
            try:
                while not stop.is_set():
                    logger.info("x")
            except Exception as error:
                failed.append(error)

        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        for _ in range(200):
            processors.insert_into_configured()
            processors.remove_from_configured()
        stop.set()
        for worker in workers:
            worker.join(10)

        assert [] == failed


class TestBridge:
    @pytest.fixture
    def foreign(self):
        """
        Return a stdlib logger that nobody else knows.
        """
        return logging.Logger("tests.foreign", logging.DEBUG)  # noqa: LOG001

    @staticmethod
    def _handler(**options):
        out = io.StringIO()
        handler = logging.StreamHandler(out)
        handler.setFormatter(
            Formatter(
                processors=[
                    Formatter.remove_processors_meta,
                    structlog.processors.JSONRenderer(),
                ],
                **options,
            )
        )
        return handler, out

    def test_foreign_loggers_carry_the_id(self, fasten_trail, foreign):
        """
        In their own output, and as rows.
        """
        handler, out = self._handler(foreign_pre_chain=chain())
        foreign.addHandler(handler)
        with fasten.bind(RID):
            foreign.warning("hello %s", "world")
        (row,), (line,) = fasten_trail.sys, lines_of(out)

        assert RID == row["request_id"] == line["request_id"]
        assert ("hello world", "warning", "tests.foreign") == tuple(
            row[name] for name in ("event", "level", "logger")
        )

    def test_a_line_of_two_handlers_is_one_row(self, fasten_trail, foreign):
        """
        Each formats the record anew; the next record is another row.
        """
        for _ in range(2):
            foreign.addHandler(self._handler(foreign_pre_chain=chain())[0])
        for number in range(3):
            foreign.info("line %d", number)

        assert ["line 0", "line 1", "line 2"] == [r["event"] for r in fasten_trail.sys]

    def test_structlogs_own_lines_are_not_doubled(self, fasten_trail):
        """
        Through wrap_for_formatter, with chain() on both sides and a LoggingHandler.
        """
        logger = logging.Logger("tests.own", logging.DEBUG)  # noqa: LOG001
        handler, out = self._handler(foreign_pre_chain=chain())
        logger.addHandler(handler)
        logger.addHandler(LoggingHandler())
        structlog.configure(
            processors=[*chain(), Formatter.wrap_for_formatter],
            logger_factory=lambda *_: logger,
            wrapper_class=structlog.stdlib.BoundLogger,
        )
        with fasten.bind(RID):
            structlog.get_logger().info("x", password=SECRET)

        assert ["x"] == [row["event"] for row in fasten_trail.sys]
        assert [("x", RID, "***")] == [
            (line["event"], line["request_id"], line["password"])
            for line in lines_of(out)
        ]

    def test_the_handler_takes_them_where_no_tee_does(self, fasten_trail):
        """
        A structlog without fasten's processors still reaches the sys stream.
        """
        logger = logging.Logger("tests.own", logging.DEBUG)  # noqa: LOG001
        logger.addHandler(LoggingHandler())
        structlog.configure(
            processors=[Formatter.wrap_for_formatter],
            logger_factory=lambda *_: logger,
            wrapper_class=structlog.stdlib.BoundLogger,
        )
        structlog.get_logger().info("x", total=3)
        (row,) = fasten_trail.sys

        assert ("x", "info", 3) == (row["event"], row["level"], row["total"])
        assert not {"_logger", "_name"} & set(row)


def test_lines_are_kept_in_a_durable_store(store_dsn):
    """
    FASTEN_SYS_DSN: what the user's chain logged is found by its request and its text.
    """
    configured(SysTee(), add_correlation)
    extra = "&" if "?" in store_dsn else "?"
    fasten.init(service_id="svc", stdout="", sys_dsn=f"{store_dsn}{extra}table=sys_log")
    with fasten.bind(RID):
        structlog.get_logger().info("placed", total=3, password=SECRET)

    assert fasten.flush(10)
    page = fasten.query("sys", request_id=RID, q="PLACED")
    assert ("store", ["placed"]) == (page.completeness, [r.event for r in page.rows])
    assert {"total": 3, "password": "***"} == page.rows[0].fields
