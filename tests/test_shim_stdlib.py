# SPDX-License-Identifier: Apache-2.0
"""
The standard library's logging: its lines in the sys stream, ids on its records.

With structlog around them they are in `test_structlog`.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import logging.handlers
import pickle
import queue

import pytest

import fasten
from fasten import context, processors
from fasten.shim.stdlib import LoggingHandler, install_record_factory
from tests.outside import run_python

RID = "0199f3c2a4c87000800000000000abcd"
SECRET = "hunter2-canary"


@pytest.fixture
def logger():
    """
    Return a logger that nobody else knows, pytest neither, with fasten's handler.
    """
    made = logging.Logger("tests.stdlib", logging.DEBUG)  # noqa: LOG001
    made.addHandler(LoggingHandler())
    return made


@pytest.fixture
def factory():
    """
    Install the record factory; take it out again.
    """
    before = install_record_factory()
    yield before
    logging.setLogRecordFactory(before)


class TestHandler:
    def test_a_line_is_recorded(self, fasten_trail, logger):
        """
        Text, level, logger, the fields of extra, and the request's id.
        """
        with fasten.bind(RID, tenant_id="acme"):
            logger.warning("%s placed", "o-1", extra={"total": 3})
        (row,) = fasten_trail.sys

        assert ("o-1 placed", "warning", logger.name, 3, RID, "acme") == tuple(
            row[k]
            for k in ("event", "level", "logger", "total", "request_id", "tenant_id")
        )
        assert {"total"} == set(row) - {"shape", *processors_columns()}

    def test_secrets_are_redacted(self, fasten_trail, logger):
        """
        In fields, in text of a known shape, and in exceptions.
        """
        key = "-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----"
        logger.info("login %s", key, extra={"password": SECRET})
        try:
            raise ValueError(key)
        except ValueError:
            logger.exception("failed")

        assert SECRET not in repr(fasten_trail.sys)
        assert "BEGIN PRIVATE" not in repr(fasten_trail.sys)

    def test_an_exception_and_a_stack_are_spelt(self, fasten_trail, logger):
        """
        As structlog's renderers would have them.
        """
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError:
            logger.exception("failed", stack_info=True)
        (row,) = fasten_trail.sys

        assert row["exception"].startswith("Traceback")
        assert row["exception"].endswith("ZeroDivisionError: division by zero")
        assert row["stack"].startswith("Stack (most recent call last)")

    @pytest.mark.parametrize(
        ("message", "args", "event"),
        [
            ("%d", ("x",), "%d 1 arguments that do not fit"),
            ("100%", (), "100%"),
            ("%(a)s", ({"a": 1},), "1"),
            (ValueError("boom"), (), "boom"),
            ({"a": 1}, (), "{'a': 1}"),
        ],
    )
    def test_any_message(self, fasten_trail, logger, capsys, message, args, event):
        """
        A wrong format loses no line, and logging prints no complaint.
        """
        logger.info(message, *args)

        assert [event] == [row["event"] for row in fasten_trail.sys]
        assert ("", "") == capsys.readouterr()

    def test_a_hostile_record_costs_nothing(self, fasten_trail, logger, capsys):
        """
        Neither what cannot be spelt nor what is no mapping raises.
        """

        class Hostile:
            def __repr__(self):
                raise RuntimeError(SECRET)

            __str__ = __repr__

        logger.info(Hostile())
        logger.info("x", extra={"it": Hostile()})

        assert 2 == len(fasten_trail.sys)
        assert SECRET not in repr(fasten_trail.sys) + capsys.readouterr().err

    @pytest.mark.parametrize("level", [7, 27, logging.CRITICAL])
    def test_levels_of_ones_own(self, fasten_trail, logger, level):
        """
        Under the name that logging has for them.
        """
        logger.setLevel(1)
        logger.log(level, "x", extra={"level": "mine"})
        (row,) = fasten_trail.sys

        assert row["level"] in ("level 7", "level 27", "critical", "mine")
        assert "x" == row["event"]

    def test_its_own_level_holds(self, fasten_trail, logger):
        """
        It is a logging.Handler like any other.
        """
        logger.handlers[0].setLevel(logging.ERROR)
        logger.info("x")

        assert [] == fasten_trail.sys

    def test_fastens_own_work_is_left_out(self, fasten_trail, logger):
        """
        What the store's driver logs while rows are delivered makes no rows.
        """
        with context.suppressed():
            logger.info("x")

        assert [] == fasten_trail.sys

    def test_no_feedback_from_the_store(self, sqlite_dsn, wait_until):
        """
        On the root logger at DEBUG, with SQLAlchemy logging each statement.
        """
        root = logging.getLogger()
        sqlalchemy = logging.getLogger("sqlalchemy.engine")
        before = root.level, sqlalchemy.level
        handler = LoggingHandler()
        root.addHandler(handler)
        root.setLevel(logging.DEBUG)
        sqlalchemy.setLevel(logging.DEBUG)
        try:
            running = fasten.init(
                service_id="svc",
                stdout="",
                audit_dsn=sqlite_dsn,
                sys_dsn=f"{sqlite_dsn}?table=sys_log",
            )
            fasten.emit("AUTH_LOGIN", "x")
            logging.getLogger("app").info("one")

            assert fasten.flush(10)
            stored = running.query("sys").rows
            assert ["one"] == [row.event for row in stored]
            assert running.delivery.queues["sys"].depth == 0
        finally:
            root.removeHandler(handler)
            root.setLevel(before[0])
            sqlalchemy.setLevel(before[1])

    def test_a_handler_that_emits_while_fasten_logs(self, tmp_path):
        """
        Its rows are stored, from whatever thread fasten complains in; nothing hangs.
        """
        done = run_python(
            """
            import logging, sys
            import fasten
            class Emitting(logging.Handler):
                def emit(self, record):
                    if record.name == "fasten":
                        fasten.log.info("heard", text=record.getMessage())
                        fasten.emit("CONFIG_UPDATED", "heard")
            logging.getLogger().addHandler(Emitting())
            path = sys.argv[1]
            engine = fasten.init(service_id="svc", stdout="", spool_dir=path + "/spool",
                                 audit_dsn=f"sqlite:///{path}/none/audit.db")
            fasten.emit("AUTH_LOGIN", "x")
            while fasten.stats()["emitted"] < 2:
                fasten.flush(0.1)
            import os
            os.mkdir(path + "/none")
            assert fasten.flush(20)
            rows = fasten.query(order="asc").rows
            targets = [row.target for row in rows if row.domain != "fasten"]
            assert targets[0] == "x", targets
            assert 1 <= targets.count("heard") < 10, targets
            print("done", fasten.close(5))
            """,
            str(tmp_path),
        )

        assert "done True\n" == done.stdout, done.stderr


def processors_columns():
    """
    Return the fixed keys of a log line.
    """
    from fasten.rows import SYS_COLUMNS

    return SYS_COLUMNS


class TestRecordFactory:
    def test_formats_name_the_request(self, factory, fasten_trail):
        """
        `%(request_id)s` in a format, outside of a request the id of the process.
        """
        out = io.StringIO()
        handler = logging.StreamHandler(out)
        handler.setFormatter(logging.Formatter("%(request_id)s %(tenant_id)s"))
        plain = logging.getLogger("tests.plain")
        plain.propagate = False
        plain.addHandler(handler)
        try:
            with fasten.bind(RID, tenant_id="acme"):
                plain.warning("x")
            plain.warning("x")
        finally:
            plain.handlers.clear()

        assert [f"{RID} acme", f"{context.sentinel()} None"] == (
            out.getvalue().splitlines()
        )

    def test_extra_wins(self, factory, fasten_trail, logger):
        """
        An application that already gives its own goes on working.
        """
        with fasten.bind(RID):
            logger.info("x", extra={"request_id": "mine", "span_id": "s"})
            record = logger.makeRecord(
                "n", 20, "f", 1, "x", (), None, extra={"trace_id": "t"}
            )
            with pytest.raises(KeyError, match="overwrite"):
                logger.info("x", extra={"message": "y"})  # noqa: G101

        assert ("t", RID) == (record.trace_id, record.request_id)
        assert ["mine"] == [row["request_id"] for row in fasten_trail.sys]

    def test_a_listeners_thread_keeps_the_id(self, factory, fasten_trail, logger):
        """
        The id is that of the thread that logged, not of the one that writes.
        """
        (handler,) = logger.handlers
        lines = queue.SimpleQueue()
        logger.handlers[:] = [logging.handlers.QueueHandler(lines)]
        listener = logging.handlers.QueueListener(lines, handler)
        listener.start()
        with fasten.bind(RID):
            logger.info("x")
        listener.stop()

        assert [RID] == [row["request_id"] for row in fasten_trail.sys]

    def test_the_factory_before_makes_the_record(self, factory):
        """
        Whatever it puts there stays; nothing is wrapped twice.
        """

        class Mine(logging.LogRecord):
            pass

        before = logging.getLogRecordFactory()
        again = install_record_factory()
        logging.setLogRecordFactory(Mine)
        install_record_factory()
        try:
            record = logging.getLogRecordFactory()("n", 20, "f", 1, "x", (), None)
        finally:
            logging.setLogRecordFactory(before)

        assert before is again
        assert isinstance(record, Mine)
        assert isinstance(record.request_id, str)

    def test_records_copy_and_travel(self, factory):
        """
        As QueueHandler and SocketHandler have them.
        """
        with fasten.bind(RID):
            record = logging.getLogRecordFactory()("n", 20, "f", 1, "x", (), None)
        twins = copy.copy(record), pickle.loads(pickle.dumps(record))
        as_json = json.dumps({k: str(v) for k, v in vars(record).items()})

        assert [RID, RID] == [twin.request_id for twin in twins]
        assert RID in as_json
        assert "x" == twins[1].getMessage()


def test_structlog_is_not_needed():
    """
    Neither the handler nor the factory loads it.
    """
    done = run_python("""
        import logging, sys
        import fasten
        from fasten.shim.stdlib import LoggingHandler, install_record_factory
        logging.basicConfig(handlers=[LoggingHandler()], level=20)
        install_record_factory()
        engine = fasten.init(service_id="svc", stdout="")
        logging.info("x")
        print([row["event"] for row in engine.sys.ring.rows()])
        print("structlog" in sys.modules, fasten.processors.failures())
    """)

    assert ("['x']\nFalse 0\n", "") == (done.stdout, done.stderr)


def test_lines_before_init_wait():
    """
    A handler that is set up before fasten loses nothing.
    """
    done = run_python("""
        import logging
        import fasten
        logging.basicConfig(handlers=[fasten.shim.stdlib.LoggingHandler()], level=20)
        logging.info("early")
        engine = fasten.init(service_id="svc", stdout="")
        (row,) = engine.sys.ring.rows()
        print(row["event"], row["service_id"])
    """)

    assert ("early svc\n", "") == (done.stdout, done.stderr)


def test_the_sys_line_of_a_record_that_cannot_be_read(fasten_trail):
    """
    The line says so, instead of nothing.
    """
    before = processors.failures()
    record = logging.makeLogRecord({"name": "odd", "levelname": None})
    LoggingHandler().emit(record)
    (row,) = fasten_trail.sys

    assert ("a log record could not be read", "odd", before) == (
        row["event"],
        row["logger"],
        processors.failures(),
    )
