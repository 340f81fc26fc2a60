# SPDX-License-Identifier: Apache-2.0
"""
The structlog processors and the log object, with real structlog chains around them.
"""

from __future__ import annotations

import io
import json
import logging
import logging.config
import threading
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from fasten import context, processors
from fasten.context import bind, scope, suppressed
from fasten.processors import (
    Sink,
    SysTee,
    add_correlation,
    bind_sink,
    chain,
    insert_into_configured,
    log,
    record,
    redact,
    remove_from_configured,
)
from fasten.redact import Redactor
from fasten.rows import SYS_COLUMNS, Query
from fasten.streams import Ring, Stream
from tests.outside import run_python

AT_NS = 1_776_861_296_000_000_000
AT = "2026-04-22T12:34:56.000000Z"
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "hunter2-canary"


@attrs.define
class Engine:
    """
    The part of an engine that the log path sees, with a real stream behind it.
    """

    stream: Stream = attrs.field(factory=lambda: Stream("sys", Ring(100)))
    quiet: list[bool] = attrs.field(factory=list)

    def sink(self, **changed: Any) -> Sink:
        """
        Return what is bound.
        """
        given_: dict[str, Any] = {
            "record": self.record,
            "clean": Redactor().clean,
            "tidy": Redactor().tidy,
            "service_id": "svc",
            "source_node_id": "node",
            "clock_ns": lambda: AT_NS,
        }
        return Sink(**(given_ | changed))

    def record(self, row: Any, *, is_printed: bool = True) -> None:
        """
        Take a row.
        """
        self.quiet.append(not is_printed)
        self.stream.record(row)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """
        Return the rows so far, oldest first.
        """
        return self.stream.ring.rows()

    @property
    def row(self) -> dict[str, Any]:
        """
        Return the only row.
        """
        (row,) = self.rows
        return row


@pytest.fixture(autouse=True)
def _as_new() -> Iterator[None]:
    # What other tests logged is not these tests' business, nor the other way round.
    bind_sink(Engine().sink())
    bind_sink(None)
    structlog.reset_defaults()
    yield
    remove_from_configured()
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    bind_sink(Engine().sink())
    bind_sink(None)


@pytest.fixture
def engine() -> Engine:
    """
    Bind a running engine.
    """
    made = Engine()
    bind_sink(made.sink())
    return made


def configured(*before: Any, **options: Any) -> io.StringIO:
    """
    Configure structlog as a user does, to print JSON on the returned stream.
    """
    out = io.StringIO()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *before,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(out),
        **options,
    )
    return out


def printed(out: io.StringIO) -> dict[str, Any]:
    """
    Return the one line that was printed.
    """
    (line,) = out.getvalue().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


class TestAddCorrelation:
    """
    The first processor.
    """

    def test_adds_what_the_scope_knows(self, engine: Engine) -> None:
        """
        Id, service, node, tenant and trace, and no more.
        """
        with bind("r-1", tenant_id="t", trace_id=TRACE, span_id=SPAN, actor="ann"):
            event = add_correlation(None, "info", {"event": "x"})

        assert {
            "event": "x",
            "request_id": "r-1",
            "service_id": "svc",
            "source_node_id": "node",
            "tenant_id": "t",
            "trace_id": TRACE,
            "span_id": SPAN,
        } == event

    def test_leaves_out_what_nobody_knows(self, engine: Engine) -> None:
        """
        Without tenant and trace there are no such keys; the id is a sentinel.
        """
        event = add_correlation(None, "info", {})

        assert {"request_id", "service_id", "source_node_id"} == set(event)
        assert context.sentinel() == event["request_id"]

    def test_overrides_nothing(self, engine: Engine) -> None:
        """
        The user's own keys win.
        """
        mine = {"request_id": "mine", "service_id": "s", "tenant_id": None}
        with bind("r-1", tenant_id="t"):
            event = add_correlation(None, "info", {**mine})

        assert {**mine, "source_node_id": "node"} == event

    def test_takes_the_settings_tenant(self) -> None:
        """
        FASTEN_TENANT_ID holds where the scope names no tenant.
        """
        bind_sink(Engine().sink(tenant_id="fixed"))
        with bind("r"):
            fixed = add_correlation(None, "info", {})["tenant_id"]
        with bind("r", tenant_id="own"):
            own = add_correlation(None, "info", {})["tenant_id"]

        assert ("fixed", "own") == (fixed, own)

    def test_asks_nobody_for_the_actor(self, engine: Engine) -> None:
        """
        A log line has no actor, so no middleware's callable runs for it.
        """
        asked: list[Any] = []
        with scope("r", request=1, ask_actor=asked.append, ask_tenant=str):
            event = add_correlation(None, "info", {})

        assert ([], "1") == (asked, event["tenant_id"])

    def test_before_init_only_a_scope_counts(self) -> None:
        """
        Without an engine there is no service, and no sentinel of one.
        """
        outside = add_correlation(None, "info", {})
        with bind("r-1"):
            inside = add_correlation(None, "info", {})

        assert ({}, {"request_id": "r-1"}) == (outside, inside)

    @pytest.mark.parametrize("event", [None, "rendered", b"x", 7, ()])
    def test_passes_on_what_is_no_event(self, event: Any, engine: Engine) -> None:
        """
        Behind a renderer, by mistake, none of the processors raises.
        """
        passed = add_correlation(None, "info", event), SysTee()(None, "info", event)

        assert (event, event) == passed


class TestRedact:
    """
    The processor that keeps secrets out of the user's own lines, too.
    """

    def test_hides_secrets(self) -> None:
        """
        As in fasten's own rows, and before init() as well.
        """
        event = redact(None, "info", {"event": "x", "password": SECRET, "n": 1})

        assert {"event": "x", "password": "***", "n": 1} == event

    def test_leaves_structlogs_own_entries(self) -> None:
        """
        Exceptions and log records go on to the formatters that understand them.
        """
        record_ = logging.makeLogRecord({})
        error = ValueError("x")
        event = redact(None, "error", {"_record": record_, "exc_info": error, "n": 1})

        assert record_ is event["_record"]
        assert error is event["exc_info"]

    def test_removes_what_it_cannot_judge(self) -> None:
        """
        If redaction fails, nothing unredacted passes.
        """

        def broken(_: Any) -> dict[str, Any]:
            raise RuntimeError

        bind_sink(Engine().sink(clean=broken))
        event = redact(None, "info", {"event": SECRET})

        assert SECRET not in repr(event)


class TestSysTee:
    """
    The copy into the sys stream.
    """

    def test_copies_and_passes_on(self, engine: Engine) -> None:
        """
        The event itself is the same object, unchanged.
        """
        event = {"event": "x", "user_id": 7, "password": SECRET}
        passed = SysTee()(None, "info", event)

        assert passed is event
        assert {"event": "x", "user_id": 7, "password": SECRET} == event
        assert {"user_id": 7, "password": "***"} == {
            k: engine.row[k] for k in ("user_id", "password")
        }

    def test_makes_a_row_in_wire_form(self, engine: Engine) -> None:
        """
        The fixed keys in their order, then the user's fields.
        """
        with bind("r-1", tenant_id="t"):
            SysTee()(None, "info", {"event": "x", "user_id": 7})

        assert ["shape", *SYS_COLUMNS, "user_id"] == list(engine.row)
        assert {
            "shape": "sys",
            "level": "info",
            "event": "x",
            "request_id": "r-1",
            "service_id": "svc",
            "source_node_id": "node",
            "tenant_id": "t",
            "timestamp": AT,
            "logger": None,
            "user_id": 7,
        } == engine.row

    def test_knows_the_trace(self, engine: Engine) -> None:
        """
        Alone, without add_correlation before it, too.
        """
        with bind("r-1", trace_id=TRACE, span_id=SPAN):
            SysTee()(None, "info", {"event": "x"})

        assert (TRACE, SPAN) == (engine.row["trace_id"], engine.row["span_id"])

    def test_a_later_change_of_the_event_does_not_reach_the_row(
        self, engine: Engine
    ) -> None:
        """
        Neither the next processor's changes nor the caller's to his own list.
        """
        items = [1, 2]
        event = {"event": "x", "items": items}
        redacted = redact(None, "info", dict(event))
        SysTee()(None, "info", event)
        SysTee(is_redacted=True)(None, "info", redacted)
        items.append(3)
        event.clear()
        redacted.clear()

        assert [[1, 2], [1, 2]] == [row["items"] for row in engine.rows]

    @pytest.mark.parametrize(
        ("method", "level", "expected"),
        [
            ("info", None, "info"),
            ("warn", "warning", "warning"),
            ("msg", None, "info"),
            ("exception", None, "error"),
            ("fatal", None, "critical"),
            ("log", "WARN", "warning"),
            ("success", None, "success"),
            ("", None, "info"),
        ],
    )
    def test_names_levels_one_way(
        self, method: str, level: str | None, expected: str, engine: Engine
    ) -> None:
        """
        Whatever the logger calls it.
        """
        event = {"event": "x"} if level is None else {"event": "x", "level": level}
        SysTee()(None, method, event)

        assert expected == engine.row["level"]

    def test_spells_the_exception(self, engine: Engine) -> None:
        """
        exc_info becomes text, of whichever form it is.
        """
        tee = SysTee()
        try:
            raise ValueError("boom")
        except ValueError as error:
            forms: list[Any] = [True, error, (ValueError, error, error.__traceback__)]
            for form in forms:
                tee(None, "error", {"event": "x", "exc_info": form})
        tee(None, "error", {"event": "x", "exc_info": True})
        *with_text, without = engine.rows

        assert all(
            row["exception"].startswith("Traceback")
            and row["exception"].endswith("ValueError: boom")
            and "exc_info" not in row
            for row in with_text
        )
        assert "exception" not in without

    def test_takes_an_exception_that_is_formatted_already(self, engine: Engine) -> None:
        """
        The processor format_exc_info may stand before the tee.
        """
        SysTee()(None, "error", {"event": "x", "exception": "as formatted"})

        assert "as formatted" == engine.row["exception"]

    def test_cuts_a_very_long_traceback_in_the_middle(self, engine: Engine) -> None:
        """
        Both ends matter: where it began, and what was raised.
        """
        error = ValueError("a" * 100_000 + "the end")
        SysTee()(None, "error", {"event": "x", "exc_info": error})
        text = engine.row["exception"]

        assert text.startswith("ValueError: a")
        assert text.endswith("the end")
        assert len(text) < 20_000

    def test_secrets_in_exceptions_are_redacted(self, engine: Engine) -> None:
        """
        Also behind redact, which leaves the exception to its formatter.
        """
        key = "-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----"
        event = {"event": "x", "exc_info": ValueError(key)}
        SysTee(is_redacted=True)(None, "error", redact(None, "error", event))

        assert "BEGIN PRIVATE" not in repr(engine.row)

    def test_strips_the_stdlib_bridges_own_entries(self, engine: Engine) -> None:
        """
        A LogRecord is not a field, but it knows the logger's name.
        """
        record_ = logging.makeLogRecord({"name": "app.orders"})
        event = {"event": "x", "_record": record_, "_from_structlog": False}
        SysTee()(None, "info", event)

        assert "app.orders" == engine.row["logger"]
        assert not {"_record", "_from_structlog"} & set(engine.row)
        assert event["_record"] is record_

    def test_the_place_of_a_row_is_the_processs_own(self, engine: Engine) -> None:
        """
        A field cannot forge shape, service, node or time.
        """
        forged = dict.fromkeys(("shape", "service_id", "source_node_id"), "forged")
        SysTee()(None, "info", {"event": "x", "timestamp": "1970", **forged})

        assert ("sys", "svc", "node", AT) == tuple(
            engine.row[k]
            for k in ("shape", "service_id", "source_node_id", "timestamp")
        )

    @pytest.mark.parametrize("rid", [None, "", 7, ["x"]])
    def test_the_request_id_is_always_text(self, rid: Any, engine: Engine) -> None:
        """
        A user's own value of another kind is spelt; an empty one is replaced.
        """
        with bind("r-1"):
            SysTee()(None, "info", {"event": "x", "request_id": rid})

        assert (str(rid) if rid else "r-1") == engine.row["request_id"]

    @pytest.mark.parametrize("mine", [None, "r-2"])
    def test_rows_are_found_by_their_request_id(
        self, mine: str | None, engine: Engine
    ) -> None:
        """
        Whether the scope gave it, or the user, or add_correlation before the tee.
        """
        given_ = {} if mine is None else {"request_id": mine}
        with bind("r-1"):
            log.info("a", **given_)
            SysTee()(None, "info", {"event": "b", **given_})
            event = add_correlation(None, "info", {"event": "c", **given_})
            SysTee()(None, "info", event)
        asked = {"request_id": mine or "r-1"}
        page = engine.stream.ring.query(Query.parse("sys", asked, now_us=0))

        assert ["c", "b", "a"] == [row.event for row in page.rows]

    def test_finds_a_renamed_event(self, engine: Engine) -> None:
        """
        The processor EventRenamer may stand before the tee.
        """
        renamed = structlog.processors.EventRenamer("msg")(
            logging.getLogger(), "info", {"event": "the event"}
        )
        SysTee()(None, "info", renamed)

        assert "the event" == engine.row["event"]
        assert "msg" not in engine.row

    def test_copies_nothing_of_fastens_own_work(self, engine: Engine) -> None:
        """
        What a store logs while rows are delivered does not become rows.
        """
        event = {"event": "x"}
        with suppressed():
            passed = SysTee()(None, "info", event)

        assert ([], True) == (engine.rows, passed is event)

    def test_a_sink_that_raises_is_counted(self) -> None:
        """
        A line must not cost its caller anything.
        """

        def full(*_: Any, **__: Any) -> None:
            raise MemoryError

        bind_sink(Engine().sink(record=full))
        before = processors.failures()
        passed = SysTee()(None, "info", {"event": "x"})
        log.info("y")

        assert ({"event": "x"}, before + 2) == (passed, processors.failures())

    def test_printing_can_be_left_to_the_renderer(self, engine: Engine) -> None:
        """
        Whose renderer prints on stdout anyway wants one line, not two.
        """
        SysTee()(None, "info", {"event": "x"})
        SysTee(is_printed=False)(None, "info", {"event": "x"})

        assert [False, True] == engine.quiet

    @given(
        st.dictionaries(
            st.sampled_from(
                ["event", "level", "logger", "request_id", "tenant_id", "message", "x"]
            )
            | st.text(),
            st.none()
            | st.integers()
            | st.text()
            | st.lists(st.integers())
            | st.floats(),
        )
    )
    def test_any_event_becomes_a_valid_row(self, event: dict[str, Any]) -> None:
        """
        Fixed keys hold text or None, and the whole is JSON.
        """
        made = Engine()
        bind_sink(made.sink())
        SysTee()(None, "info", event)
        row = made.row

        assert all(isinstance(row[name], str) for name in ("event", "request_id"))
        assert all(isinstance(row[n], str | None) for n in ("tenant_id", "logger"))
        assert json.dumps(row, allow_nan=False)


class TestChain:
    """
    chain() in the user's own configuration.
    """

    def test_correlates_redacts_and_copies(self, engine: Engine) -> None:
        """
        The printed line and the row say the same.
        """
        out = configured(*chain())
        with bind("r-1", tenant_id="t"):
            structlog.get_logger().bind(user_id=7).warning("x", password=SECRET)
        line = printed(out)

        assert ("r-1", "***", 7) == tuple(
            line[k] for k in ("request_id", "password", "user_id")
        )
        assert line | {"timestamp": AT} == {
            k: v for k, v in engine.row.items() if k in line
        }
        assert "warning" == engine.row["level"]

    @pytest.mark.parametrize("method", ["warn", "exception"])
    def test_alone_makes_a_whole_line(self, method: str, engine: Engine) -> None:
        """
        Nothing but a renderer has to stand behind it: level and time are there.
        """
        (step,) = chain()
        event = step(None, method, {"event": "x", "exc_info": method == "exception"})

        assert (engine.row["level"], AT) == (event["level"], event["timestamp"])

    def test_the_users_own_stamps_stay(self, engine: Engine) -> None:
        """
        Level and time are added where there are none, and on request nowhere.
        """
        given = {"event": "x", "level": "odd", "timestamp": "now"}
        (step,) = chain()
        (bare,) = chain(is_stamped=False)

        assert given.items() <= step(None, "info", given.copy()).items()
        assert {"level", "timestamp"}.isdisjoint(bare(None, "info", {"event": "x"}))

    def test_the_row_is_not_what_is_printed(self, engine: Engine) -> None:
        """
        Processors behind it may change the event; the row stays as it was.
        """
        order = {"id": 7}
        (step,) = chain()
        event = step(None, "info", {"event": "x", "order": order, "token": SECRET})
        order["id"] = 8
        event["event"] = "y"

        assert ({"id": 7}, "***") == (event["order"], event["token"])
        assert ("x", {"id": 7}) == (engine.row["event"], engine.row["order"])

    def test_stands_there_before_init(self) -> None:
        """
        What is logged first waits for the engine, once.
        """
        out = configured(*chain())
        structlog.get_logger().info("early")
        made = Engine()
        bind_sink(made.sink())

        assert "early" == printed(out)["event"]
        assert ["early"] == [row["event"] for row in made.rows]

    def test_under_the_stdlibs_formatter(self, engine: Engine) -> None:
        """
        As foreign_pre_chain it also copies lines of the standard library's loggers.
        """
        out = io.StringIO()
        handler = logging.StreamHandler(out)
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                processors=[
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    structlog.processors.JSONRenderer(),
                ],
                foreign_pre_chain=[structlog.stdlib.add_log_level, *chain()],
            )
        )
        foreign = logging.getLogger("tests.foreign")
        foreign.propagate = False
        foreign.addHandler(handler)
        try:
            foreign.warning("hello %s", "world")
        finally:
            foreign.removeHandler(handler)

        assert ("hello world", "svc") == tuple(
            printed(out)[k] for k in ("event", "service_id")
        )
        assert ("hello world", "warning", "tests.foreign") == tuple(
            engine.row[k] for k in ("event", "level", "logger")
        )

    def test_under_structlogs_stdlib_loggers(self, engine: Engine) -> None:
        """
        The logger's name comes from the wrapped stdlib logger.
        """
        structlog.configure(
            processors=[
                *chain(),
                structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
            ],
            logger_factory=structlog.stdlib.LoggerFactory(),
            wrapper_class=structlog.stdlib.BoundLogger,
        )
        structlog.stdlib.get_logger("tests.named").info("x")

        assert "tests.named" == engine.row["logger"]


class TestInsertion:
    """
    What init() does to a structlog that is configured.
    """

    def test_reaches_loggers_that_are_cached(self, engine: Engine) -> None:
        """
        The list is changed in place, before the renderer.
        """
        out = configured(cache_logger_on_first_use=True)
        cached = structlog.get_logger()
        cached.info("before")
        out.truncate(0)
        out.seek(0)
        done = insert_into_configured()
        with bind("r-1"):
            cached.info("after")

        assert done
        assert ("after", "r-1") == tuple(
            printed(out)[k] for k in ("event", "request_id")
        )
        assert ["after"] == [row["event"] for row in engine.rows]

    def test_is_done_once(self, engine: Engine) -> None:
        """
        A second init() doubles nothing.
        """
        configured()
        inserted = insert_into_configured(), insert_into_configured()
        structlog.get_logger().info("x")

        assert ((True, True), 1) == (inserted, len(engine.rows))

    def test_respects_the_users_own_chain(self, engine: Engine) -> None:
        """
        Where chain() stands already, nothing is added.
        """
        configured(*chain())
        before = list(structlog.get_config()["processors"])
        inserted = insert_into_configured()

        assert inserted
        assert before == structlog.get_config()["processors"]

    def test_adds_only_what_is_missing(self, engine: Engine) -> None:
        """
        A user's add_correlation stays where it is.
        """
        configured(add_correlation)
        insert_into_configured()
        chain_now = structlog.get_config()["processors"]

        assert 1 == chain_now.count(add_correlation)
        assert isinstance(chain_now[-2], SysTee)

    def test_can_be_taken_out(self, engine: Engine) -> None:
        """
        The list is as it was, and still the same list.
        """
        configured()
        users = structlog.get_config()["processors"]
        before = list(users)
        insert_into_configured()
        remove_from_configured()
        remove_from_configured()

        assert before == users

    def test_configures_nothing_for_anybody(self, engine: Engine) -> None:
        """
        A structlog that nobody configured is left as it is.
        """
        before = list(structlog.get_config()["processors"])
        inserted = insert_into_configured()

        assert not inserted
        assert not structlog.is_configured()
        assert before == structlog.get_config()["processors"]

    def test_says_so_where_the_chain_is_a_tuple(
        self, engine: Engine, caplog: pytest.LogCaptureFixture
    ) -> None:
        """
        What cannot be changed in place is left, with the cure in the log.
        """
        structlog.configure(processors=(structlog.processors.JSONRenderer(),))
        with caplog.at_level("WARNING", "fasten"):
            inserted = insert_into_configured()

        assert not inserted
        assert "*fasten.processors.chain()" in caplog.text

    def test_an_empty_chain_is_left_empty(self, engine: Engine) -> None:
        """
        Without a renderer there is nothing to stand before.
        """
        structlog.configure(processors=[])

        assert not insert_into_configured()

    def test_survives_structlogs_capture_logs(self, engine: Engine) -> None:
        """
        That test helper empties the list and puts all of it back.
        """
        out = configured()
        insert_into_configured()
        with structlog.testing.capture_logs() as captured:
            structlog.get_logger().info("inside")
        structlog.get_logger().info("outside")

        assert ["inside"] == [entry["event"] for entry in captured]
        assert ["outside"] == [row["event"] for row in engine.rows]
        assert "outside" == printed(out)["event"]


class TestLog:
    """
    fasten.log.
    """

    @pytest.mark.parametrize(
        ("method", "level"),
        [
            ("debug", "debug"),
            ("info", "info"),
            ("warn", "warning"),
            ("warning", "warning"),
            ("error", "error"),
            ("critical", "critical"),
        ],
    )
    def test_levels(self, method: str, level: str, engine: Engine) -> None:
        """
        Each method records a line of its level.
        """
        getattr(log, method)("user_created", user_id="u-42")

        assert (level, "user_created", "u-42") == tuple(
            engine.row[k] for k in ("level", "event", "user_id")
        )

    def test_exception_takes_what_is_handled(self, engine: Engine) -> None:
        """
        As structlog's, it is an error with a traceback.
        """
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError:
            log.exception("failed", step=2)

        assert ("error", 2) == (engine.row["level"], engine.row["step"])
        assert "ZeroDivisionError" in engine.row["exception"]

    def test_log_takes_names_and_numbers(self, engine: Engine) -> None:
        """
        As logging.Logger.log does.
        """
        for level in ("WARN", 20, logging.ERROR, 99, 5):
            log.log(level, "x")

        assert ["warning", "info", "error", "critical", "debug"] == [
            row["level"] for row in engine.rows
        ]

    def test_bind_makes_a_new_logger(self, engine: Engine) -> None:
        """
        Fields add up, the call's own win, and the logger bound from is unchanged.
        """
        bound = log.bind(a=1, b=1).bind(b=2)
        bound.info("x", c=3)
        bound.unbind("a").info("y", b=4)
        bound.try_unbind("a", "z").new(d=5).info("z")
        log.info("w")
        fields = [{k: v for k, v in row.items() if k in "abcd"} for row in engine.rows]

        assert [{"a": 1, "b": 2, "c": 3}, {"b": 4}, {"d": 5}, {}] == fields

    def test_unbind_misses_what_is_not_bound(self) -> None:
        """
        As structlog's; try_unbind does not mind.
        """
        with pytest.raises(KeyError):
            log.unbind("nothing")

    def test_merges_structlogs_contextvars(self, engine: Engine) -> None:
        """
        What a structlog user bound for the request is in these lines, too.
        """
        structlog.contextvars.bind_contextvars(order="o-1", a="ambient")
        log.bind(a="bound").info("x")

        assert ("o-1", "bound") == (engine.row["order"], engine.row["a"])

    def test_clearing_structlogs_contextvars_keeps_the_request(
        self, engine: Engine
    ) -> None:
        """
        The ContextVar of a request is fasten's own.
        """
        with bind("r-1"):
            structlog.contextvars.clear_contextvars()
            log.info("x")

        assert "r-1" == engine.row["request_id"]

    @pytest.mark.parametrize(
        ("event", "args", "expected"),
        [
            ("%s is %d", ("a", 1), "a is 1"),
            ("%(a)s", ({"a": 1},), "1"),
            ("50% of %s", (), "50% of %s"),
            ("%d", ("x",), "%d 1 arguments that do not fit"),
        ],
    )
    def test_interpolates(
        self, event: str, args: tuple[Any, ...], expected: str, engine: Engine
    ) -> None:
        """
        As logging does, but a wrong format does not lose the line.
        """
        log.info(event, *args)

        assert expected == engine.row["event"]

    def test_any_field_name_is_allowed(self, engine: Engine) -> None:
        """
        Names that are taken get an underscore; none of them raises.
        """
        log.info("x", event="e", level=3, self=1, method_name="m", shape="s")
        taken = {"event_": "e", "level_": 3, "shape_": "s"}

        assert taken | {"self": 1, "method_name": "m", "level": "info"} == {
            k: engine.row[k]
            for k in ("event_", "level_", "shape_", "self", "method_name", "level")
        }

    def test_is_redacted(self, engine: Engine) -> None:
        """
        Before anything leaves the call.
        """
        log.info("x", headers={"Authorization": SECRET}, api_key=SECRET)

        assert SECRET not in repr(engine.row)

    def test_says_nothing_inside_fastens_own_work(self, engine: Engine) -> None:
        """
        As the tee.
        """
        with suppressed():
            log.info("x")

        assert [] == engine.rows

    def test_is_not_the_users_structlog(self, engine: Engine) -> None:
        """
        The user's chain neither sees nor changes these lines.
        """
        out = configured()
        insert_into_configured()
        log.info("x")

        assert ("", 1) == (out.getvalue(), len(engine.rows))

    def test_repr_shows_no_values(self) -> None:
        """
        What is bound may be a secret.
        """
        assert "<Log bound to ['password']>" == repr(log.bind(password=SECRET))

    def test_record_is_the_bridges_way_in(self, engine: Engine) -> None:
        """
        A logging handler gives level, text, fields and the logger's name.
        """
        record("WARNING", "x", {"n": 1}, logger_name="app")

        assert ("warning", "x", 1, "app") == tuple(
            engine.row[k] for k in ("level", "event", "n", "logger")
        )


class TestEarly:
    """
    Before init(), and between two engines.
    """

    def test_lines_wait_for_the_engine(self) -> None:
        """
        In order, redacted, under the service's names and their own scope.
        """
        log.info("first", password=SECRET)
        with bind("r-1", tenant_id="t"):
            log.info("second")
        made = Engine()
        bind_sink(made.sink())
        log.info("third")
        first, second, third = made.rows

        assert ["first", "second", "third"] == [row["event"] for row in made.rows]
        assert ("svc", "***", "r-1", "t", AT) == (
            first["service_id"],
            first["password"],
            second["request_id"],
            second["tenant_id"],
            third["timestamp"],
        )
        assert context.sentinel() == first["request_id"]

    def test_only_the_last_thousand_are_kept(self) -> None:
        """
        A service that never calls init() does not fill its memory.
        """
        for number in range(1200):
            log.info("x", n=number)
        made = Engine(Stream("sys", Ring(5000)))
        bind_sink(made.sink())

        assert (1000, 200) == (len(made.rows), made.rows[0]["n"])

    def test_a_test_trail_can_leave_them(self) -> None:
        """
        What was logged on import does not show up in the first test, and is not lost.
        """
        log.info("on import")
        trail, later = Engine(), Engine()
        bind_sink(trail.sink(), takes_early=False)
        bind_sink(None)
        bind_sink(later.sink())

        assert ([], ["on import"]) == (
            trail.rows,
            [row["event"] for row in later.rows],
        )

    def test_their_id_is_settled_when_they_are_handed_over(self) -> None:
        """
        A line from before the first request stays `boot-`, whenever it is read.
        """
        done = run_python("""
            from fasten import context, processors
            from fasten.streams import finished
            rows = []
            processors.log.info("early")
            context.set_service("svc")
            processors.bind_sink(processors.Sink(
                record=rows.append, clean=dict, tidy=dict,
                service_id="svc", source_node_id="n",
            ))
            with context.bind("r-1"):
                pass
            print(finished(rows[0])["request_id"])
        """)

        assert ("boot-svc-", "") == (done.stdout[:9], done.stderr)

    def test_a_forked_child_leaves_them_to_its_parent(self) -> None:
        """
        A preloaded application's first lines are recorded once, not by each worker.
        """
        done = run_python("""
            import os
            from fasten import processors
            from fasten.streams import finished
            processors.log.info("early")
            pid = os.fork()
            processors.bind_sink(processors.Sink(
                record=lambda row: print(finished(row)["event"], pid > 0, flush=True),
                clean=dict, tidy=dict, service_id="s", source_node_id="n",
            ))
            if pid:
                os.waitpid(pid, 0)
        """)

        assert ("early True", "") == (done.stdout.strip(), done.stderr)

    def test_keeps_when_a_line_was_written(self) -> None:
        """
        The time is the caller's, not the engine's.
        """
        log.info("early")
        made = Engine()
        bind_sink(made.sink())

        assert AT != made.row["timestamp"]

    def test_threads_log_while_the_engine_comes(self) -> None:
        """
        No line is lost or doubled when init() runs beside them.
        """
        made = Engine(Stream("sys", Ring(5000)))
        begun = threading.Barrier(3, timeout=10)

        def work() -> None:
            begun.wait()
            for number in range(400):
                log.info("x", n=number)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        begun.wait()
        bind_sink(made.sink())
        for thread in threads:
            thread.join(10)

        assert 800 == len(made.rows)


def test_structlog_is_loaded_by_its_user_only() -> None:
    """
    Neither the processors nor a line of log import structlog.
    """
    done = run_python("""
        import sys
        from fasten import processors
        processors.log.info("x")
        processors.insert_into_configured()
        print("structlog" in sys.modules, processors.failures())
    """)

    assert ("False 0", "") == (done.stdout.strip(), done.stderr)
