# SPDX-License-Identifier: Apache-2.0
"""
capture(): what a test sees of fasten, and that nothing else does.

The pytest plugin over it is in `test_shim_pytest`.
"""

from __future__ import annotations

import asyncio
import io
import logging
import threading
import unittest
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import pytest
import structlog

import fasten
from fasten import codes, context, engine, processors
from fasten.codes import Meta, Outcome
from fasten.rows import AUDIT_COLUMNS, SYS_COLUMNS
from fasten.testing import Clock, Trail, capture
from tests.outside import run_python

ID = "0199f3c2a4c87000800000000000abcd"


@pytest.fixture
def trail():
    """
    Run the test under a trail.
    """
    with capture() as trail:
        yield trail


def message_of(call, *args, **kwargs):
    """
    Return the text of the AssertionError that *call* raises.
    """
    with pytest.raises(AssertionError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


class TestRows:
    def test_audit_rows_are_wire_dicts(self, trail):
        """
        Every wire key, in order; what only a store assigns is None.
        """
        id_ = fasten.emit("ORDER_PLACED", "o-1", actor="ann", detail={"total": 3})
        (row,) = trail.audit

        assert list(AUDIT_COLUMNS) == list(row)
        assert (id_, "ORDER_PLACED", "ann", "o-1", {"total": 3}, None, None) == tuple(
            row[k]
            for k in ("id", "code", "actor", "target", "detail", "hash", "stored_at")
        )

    def test_the_three_streams(self, trail):
        """
        Log lines and requests are there, too, under the same request id.
        """
        with fasten.bind(ID):
            fasten.emit("ORDER_PLACED", "o-1")
            fasten.log.info("placed", total=3)
            fasten.record_api(method="POST", path="/orders", status=201)
        (line,), (request,) = trail.sys, trail.api

        assert ["shape", *SYS_COLUMNS, "total"] == list(line)
        assert ("POST", "/orders", 201) == (
            request["method"],
            request["path"],
            request["status"],
        )
        assert ID == trail.assert_correlated(ID)

    def test_ids_are_counted_and_time_stands_still(self, trail):
        """
        The same test sees the same rows each time that it runs.
        """
        first, second = fasten.emit("AUTH_LOGIN", "a"), fasten.emit("AUTH_LOGIN", "b")
        trail.clock.advance(1.5)
        fasten.emit("AUTH_LOGIN", "c")
        trail.clock.advance(timedelta(hours=1))
        fasten.emit("AUTH_LOGIN", "d")

        assert ("1", "2") == (first[-16:].lstrip("0"), second[-16:].lstrip("0"))
        assert first[:14] == second[:14]
        assert [
            "2026-04-22T12:34:56.000000Z",
            "2026-04-22T12:34:56.000000Z",
            "2026-04-22T12:34:57.500000Z",
            "2026-04-22T13:34:57.500000Z",
        ] == [row["timestamp"] for row in trail.audit]

    def test_minted_request_ids_are_counted(self):
        """
        So are the ids of requests, and the sentinel of rows without one.
        """
        seen = []
        for _ in range(2):
            with capture() as trail:
                fasten.emit("AUTH_LOGIN", "a")
                for _ in range(2):
                    with fasten.bind():
                        fasten.emit("AUTH_LOGIN", "a")
                fasten.emit("AUTH_LOGIN", "a")
                seen.append([row["request_id"] for row in trail.audit])
        boot, one, two, orphan = seen[0]

        assert seen[0] == seen[1]
        assert ("boot-test-000000000000", "orphan-test-000000000000") == (boot, orphan)
        assert one < two
        assert context.accept(one) == one

    def test_rows_of_all_threads_arrive(self, trail):
        """
        Whichever thread emits, and none twice.
        """
        begun = threading.Barrier(4, timeout=10)

        def work(name):
            begun.wait()
            for number in range(250):
                fasten.emit("AUTH_LOGIN", f"{name}-{number}")
                fasten.log.info("in")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, "abcd"))

        assert 1000 == len({row["id"] for row in trail.audit})
        assert 1000 == len({row["target"] for row in trail.audit})
        assert 1000 == len(trail.sys)

    def test_more_rows_than_any_ring_holds(self):
        """
        A trail forgets nothing, whatever the size of the rings.
        """
        with capture(sys_ring_size=2, queue_capacity=2) as trail:
            for number in range(5):
                fasten.log.info("x", n=number)
                fasten.emit("AUTH_LOGIN", number)

        assert (5, 5) == (len(trail.sys), len(trail.audit))

    def test_a_row_given_a_connection_is_pending(self, trail):
        """
        It is there at once, and says that its transaction decides.
        """
        fasten.emit("ORDER_PLACED", "o-1", connection=object())
        fasten.emit("ORDER_PLACED", "o-2")

        assert [True, None] == [row.get("pending") for row in trail.audit]
        assert "(pending)" in trail.report()
        assert (
            asyncio.run(fasten.aemit("ORDER_PLACED", "o-3", connection=object()))
            == trail.audit[-1]["id"]
        )

    def test_the_reader_and_query_see_them(self, trail):
        """
        Code under test may ask for what it recorded.
        """
        with fasten.bind(ID):
            fasten.emit("ORDER_PLACED", "o-1")
            fasten.log.info("placed")

        assert ["o-1"] == [row.target for row in fasten.query(actor="system").rows]
        assert 2 == len(fasten.trail(ID))

    def test_clear_forgets(self, trail):
        """
        What the set-up of a test emitted need not disturb it.
        """
        fasten.emit("AUTH_LOGIN", "a")
        trail.clear()
        fasten.emit("AUTH_LOGIN", "b")

        assert ["b"] == [row["target"] for row in trail.audit]

    def test_repr_counts(self, trail):
        """
        A debugger shows at a glance whether there is anything.
        """
        fasten.emit("AUTH_LOGIN", "a")

        assert "<Trail of 1 audit, 0 sys, 0 api rows>" == repr(trail)


class TestEmitted:
    @pytest.fixture(autouse=True)
    def _rows(self, trail):
        with fasten.bind(ID, actor="ann", tenant_id="acme"):
            fasten.emit(
                "ORDER_PLACED",
                42,
                outcome="denied",
                detail={"total": 3, "ship": {"city": "Rome", "zip": "00118"}},
            )
        trail.clock.advance(3600)
        fasten.emit("USER_CREATED", "u-1", reason="asked")

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"times": 1},
            {"target": 42},
            {"target": "42", "actor": "ann"},
            {"outcome": Outcome.DENIED},
            {"tenant": "acme", "service": "test", "node": "test"},
            {"request_id": uuid.UUID(ID).hex},
            {"detail": {"total": 3}},
            {"detail": {"ship": {"city": "Rome"}}},
            {"detail": {"total": mock.ANY}, "client": None},
            {"target": mock.ANY},
            {"detail": {"total": pytest.approx(3.0)}},
            {"since": "2h", "until": "30m"},
            {"since": datetime(2026, 4, 22, tzinfo=UTC)},
            {"since": timedelta(hours=2)},
            {"timestamp": "2026-04-22T12:34:56Z"},
            {"retention_class": "long", "method": "sdk"},
            {"order": "desc", "limit": 10, "offset": 0},
        ],
    )
    def test_takes_the_readers_filters(self, trail, fields):
        """
        All of them under their names and short forms; detail matches a subset.
        """
        row = trail.assert_emitted("ORDER_PLACED", **fields)

        assert "42" == row["target"]

    @pytest.mark.parametrize(
        ("fields", "told"),
        [
            ({"target": "43"}, "target is '42', not '43'"),
            ({"actor": "bob", "outcome": "success"}, "outcome is 'denied', not 'succe"),
            ({"client": "10.0.0.1"}, "client is None, not '10.0.0.1'"),
            ({"tenant": None}, "tenant_id is 'acme', not None"),
            ({"detail": {"total": 4}}, "detail.total is 3, not 4"),
            ({"detail": {"ship": {"city": "Bonn"}}}, "detail.ship.city is 'Rome', not"),
            ({"detail": {"ship": {"street": "x"}}}, "detail.ship.street is missing"),
            ({"detail": {"total": {"net": 3}}}, "detail.total is 3, not {'net': 3}"),
            ({"detail": None}, "not None"),
            ({"since": "30m"}, "outside of since and until"),
            ({"times": 2}, "was emitted 1 times, not 2"),
            ({"times": 0}, "was emitted 1 times, not 0"),
            ({"offset": 1}, "ORDER_PLACED offset=1 was not emitted"),
        ],
    )
    def test_says_what_differs(self, trail, fields, told):
        """
        A failure shows the nearest rows and what keeps each from being meant.
        """
        message = message_of(trail.assert_emitted, "ORDER_PLACED", **fields)

        assert told in message
        assert "ORDER_PLACED  ann  target=42  denied" in message

    def test_the_nearest_row_comes_first(self, trail):
        """
        The same code before others, fewer differences before more.
        """
        fasten.emit("ORDER_PLACED", "o-9", actor="bob")
        message = message_of(
            trail.assert_emitted, "ORDER_PLACED", target=9, actor="bob"
        )
        lines = message.splitlines()

        assert "ORDER_PLACED target=9 actor='bob' was not emitted" == lines[0]
        assert "nearest rows:" == lines[1]
        assert lines[2].startswith("  ORDER_PLACED  bob  target=o-9")
        assert "    target is 'o-9', not '9'" == lines[3]
        assert lines[-1].startswith("  USER_CREATED")

    def test_names_the_near_code_of_one_that_is_unknown(self, trail):
        """
        A misspelt code is the likeliest reason.
        """
        message = message_of(trail.assert_emitted, "ORDER_PLACD")

        assert "did you mean 'ORDER_PLACED'?" in message

    def test_says_so_where_there_is_nothing(self, trail):
        """
        The commonest failure: nothing was emitted.
        """
        trail.clear()
        message = message_of(trail.assert_emitted, "ORDER_PLACED")

        assert "ORDER_PLACED was not emitted\nnothing was emitted at all" == message

    def test_shows_a_few_rows_only(self, trail):
        """
        A long trail does not bury what was asked for.
        """
        for number in range(100):
            fasten.emit("AUTH_LOGIN", number, detail={"text": "x" * 5000})
        message = message_of(trail.assert_emitted, "ORDER_PLACED", target=43)

        assert "... and 97 more" in message
        assert len(message) < 3000
        assert len(trail.report()) < 20_000
        assert "... and 52 more" in trail.report()

    def test_shows_control_characters_as_escapes(self, trail):
        """
        A target is somebody's text, and the failure is shown in a terminal.
        """
        fasten.emit("AUTH_FAILED", "\x1b[2J\u202eevil\n", detail={"a": "\x1b"})
        message = message_of(trail.assert_emitted, "AUTH_FAILED", target="x")

        assert "\x1b" not in message
        assert "\\x1b[2J\\u202eevil\\n" in message

    @pytest.mark.parametrize(
        ("fields", "told"),
        [
            ({"actr": "ann"}, "did you mean 'actor'"),
            ({"actr": None}, "did you mean 'actor'"),
            ({"outcome": "denid"}, "none of: success failure denied unknown"),
            ({"since": "yesterday"}, "since"),
        ],
    )
    def test_a_filter_that_cannot_match_is_an_error(self, trail, fields, told):
        """
        Not a failure, which an assertion that nothing matches would hide.
        """
        with pytest.raises(fasten.InvalidQuery, match=told):
            trail.assert_not_emitted("ORDER_PLACED", **fields)

    def test_not_emitted(self, trail):
        """
        It shows the rows that should not be there.
        """
        trail.assert_not_emitted("ORDER_PLACED", target="43")
        trail.assert_not_emitted("USER_DELETED")
        message = message_of(trail.assert_not_emitted, "ORDER_PLACED", actor="ann")

        assert message.startswith("ORDER_PLACED actor='ann' was emitted:\n  ORDER_")

    def test_rows_are_those_that_match(self, trail):
        """
        For assertions of one's own.
        """
        assert ["ORDER_PLACED", "USER_CREATED"] == [r["code"] for r in trail.rows()]
        assert ["u-1"] == [r["target"] for r in trail.rows(domain="user")]
        assert ["USER_CREATED"] == [
            r["code"] for r in trail.rows(order="desc", limit=1)
        ]


class TestCorrelated:
    def test_one_id_is_returned(self, trail):
        """
        A request's rows of all streams share it.
        """
        with fasten.bind(ID):
            fasten.emit("AUTH_LOGIN", "a")
            fasten.log.info("x")

        assert ID == trail.assert_correlated()
        assert "'other'" in message_of(trail.assert_correlated, "other")

    def test_a_row_that_lost_its_request_is_shown(self, trail):
        """
        As one of a thread that nobody carried the context to.
        """
        with fasten.bind(ID):
            fasten.emit("AUTH_LOGIN", "a")
            worker = threading.Thread(target=fasten.emit, args=("AUTH_LOGIN", "stray"))
            worker.start()
            worker.join(10)
        message = message_of(trail.assert_correlated, ID)

        assert "orphan-test-000000000000  AUTH_LOGIN  system  target=stray" in message

    def test_lines_of_the_start_do_not_count(self, trail):
        """
        An application logs before its first request.
        """
        fasten.log.info("starting")
        with fasten.bind(ID):
            fasten.emit("AUTH_LOGIN", "a")

        assert ID == trail.assert_correlated(ID)

    def test_nothing_is_not_correlated(self, trail):
        """
        An empty trail proves nothing.
        """
        assert "nothing was recorded" in message_of(trail.assert_correlated)


class TestInit:
    def test_opens_no_store(self, trail, tmp_path, sqlite_dsn):
        """
        The application's own init() runs, and neither file nor thread comes of it.
        """
        threads = threading.active_count()
        fasten.init(service_id="orders", audit_dsn=sqlite_dsn, sys_dsn=f"{sqlite_dsn}2")
        fasten.emit("ORDER_PLACED", "o-1")
        fasten.log.info("x")

        assert fasten.flush()
        assert threads == threading.active_count()
        assert [] == [path.name for path in tmp_path.iterdir()]
        assert ["o-1"] == [row["target"] for row in trail.audit]

    def test_its_settings_hold(self, trail, capsys):
        """
        Service, tenant, redaction, caps and trust are the application's; stdout stays.
        """
        fasten.log.info("before")
        fasten.init(
            service_id="orders",
            node_id="n-7",
            tenant_id="acme",
            redact_keys="shoe_size",
            redact_replacement="[gone]",
            trust_request_id=False,
        )
        fasten.emit("USER_CREATED", "u-1", detail={"shoe_size": 44})
        fasten.log.info("after")
        row, lines = trail.audit[0], trail.sys

        assert ("orders", "n-7", "acme", {"shoe_size": "[gone]"}) == tuple(
            row[k] for k in ("service_id", "source_node_id", "tenant_id", "detail")
        )
        assert row["request_id"].startswith("boot-orders-")
        assert ["test", "orders"] == [line["service_id"] for line in lines]
        assert not context.trusts_request_ids()
        assert "" == capsys.readouterr().out

    def test_its_environment_is_read(self, trail, monkeypatch):
        """
        FASTEN_* counts as it does in production; only the two names have defaults.
        """
        monkeypatch.setenv("FASTEN_REDACT_KEYS", "shoe_size")
        first = fasten.init().settings
        monkeypatch.setenv("FASTEN_SERVICE_ID", "billing")
        second = fasten.init().settings
        monkeypatch.setenv("FASTEN_AUDIT_DSN", "mysql://x")

        assert ("test", "test", ("shoe_size",)) == (
            first.service_id,
            first.node_id,
            first.redact_keys,
        )
        assert "billing" == second.service_id
        with pytest.raises(fasten.SettingsError, match="FASTEN_AUDIT_DSN"):
            fasten.init()

    def test_captures_settings_are_its_defaults(self):
        """
        What init() is given wins over what capture() is given, and that over FASTEN_*.
        """
        with capture(service_id="mine", strict=False) as trail:
            mine = fasten.init().settings
            theirs = fasten.init(service_id="theirs").settings
            fasten.emit("NO_SUCH_CODE", "x")

        assert ("mine", "theirs") == (mine.service_id, theirs.service_id)
        assert {"theirs"} == {row["service_id"] for row in trail.audit}

    def test_strictness_holds(self, trail):
        """
        A caller's mistake raises, unless the application says otherwise.
        """
        with pytest.raises(fasten.UnknownCode):
            fasten.emit("NO_SUCH_CODE", "x")
        fasten.init(strict=False)
        fasten.emit("NO_SUCH_CODE", "x")
        row = trail.assert_emitted("NO_SUCH_CODE", outcome="unknown")

        assert "unknown code" in row["detail"]["_mistake"]
        (told,) = trail.mistakes()
        assert told.startswith("NO_SUCH_CODE x: unknown code")

    def test_its_codes_hold_and_go(self, tmp_path):
        """
        Files of its settings are read, and forgotten with the capture.
        """
        mine = tmp_path / "mine.yaml"
        mine.write_text("domain: shop\ncodes: {SHOP_OPENED: {}}\n")
        with capture(codes=str(mine)) as trail:
            fasten.emit("SHOP_OPENED", "x")
            fasten.init(codes=[])
            with pytest.raises(fasten.UnknownCode):
                fasten.emit("SHOP_OPENED", "x")
        with capture(), pytest.raises(fasten.UnknownCode):
            fasten.emit("SHOP_OPENED", "x")

        assert ["shop"] == [row["domain"] for row in trail.audit]

    def test_the_working_directorys_codes_are_found(self, tmp_path):
        """
        As init() finds them: an application that never calls it in tests has them.
        """
        (tmp_path / "codes.yaml").write_text("domain: shop\ncodes: {SHOP_SHUT: {}}\n")
        with capture() as trail:
            fasten.emit("SHOP_SHUT", "x")

        assert ["SHOP_SHUT"] == [row["code"] for row in trail.audit]

    def test_a_registered_code_stays(self, trail):
        """
        A module that is imported in one test is there in the next.
        """
        codes.register("tests", {"TRAIL_WALKED": Meta()})
        with capture():
            fasten.emit("TRAIL_WALKED", "x")
        fasten.emit("TRAIL_WALKED", "y")

        assert ["y"] == [row["target"] for row in trail.audit]

    def test_rows_go_on_after_close(self, trail):
        """
        An application's shutdown closes its engine, and the next init() opens one.
        """
        fasten.emit("AUTH_LOGIN", "a")
        fasten.close()
        with pytest.raises(fasten.NotInitialized):
            fasten.emit("AUTH_LOGIN", "b")
        fasten.init()
        fasten.emit("AUTH_LOGIN", "c")

        assert ["a", "c"] == [row["target"] for row in trail.audit]


class TestRestoring:
    def test_the_engine_that_ran_before_runs_again(self, sqlite_dsn):
        """
        Its rows are stored, the captured ones are not.
        """
        ran = fasten.init(service_id="real", audit_dsn=sqlite_dsn, stdout="")
        before = context.sentinel()
        fasten.emit("AUTH_LOGIN", "before")
        with capture():
            fasten.init(service_id="other")
            fasten.emit("AUTH_LOGIN", "inside")
        fasten.emit("AUTH_LOGIN", "after")
        fasten.log.info("after")

        assert fasten.flush()
        assert ran is engine.current()
        assert before == context.sentinel()
        assert ["before", "after"] == [
            row.target for row in fasten.query(order="asc", code="AUTH_LOGIN").rows
        ]
        assert ["after"] == [row["event"] for row in ran.sys.ring.rows()]

    def test_where_none_ran_none_runs(self):
        """
        emit() raises as before, and init() opens stores again.
        """
        with capture():
            pass
        made = fasten.init(service_id="real", stdout="")

        assert made.delivery is not None
        made.close()

    @pytest.mark.parametrize("wrong", [{"on_full": "explode"}, {"codes": "none.yaml"}])
    def test_a_capture_that_cannot_start_leaves_nothing(self, wrong):
        """
        Wrong settings raise, and the process is as it was.
        """
        before = context.sentinel(), engine.current(), context.mint_request_id
        with pytest.raises(fasten.FastenError), capture(**wrong):
            pytest.fail("not reached")
        with pytest.raises(fasten.NotInitialized):
            fasten.emit("AUTH_LOGIN", "x")

        assert before[:2] == (context.sentinel(), engine.current())

    def test_captures_nest(self, trail):
        """
        The inner one takes all, then the outer one goes on, its ids too.
        """
        fasten.emit("AUTH_LOGIN", "a")
        with capture(service_id="inner") as inner:
            fasten.emit("AUTH_LOGIN", "b")
        fasten.emit("AUTH_LOGIN", "c")

        assert ["b"] == [row["target"] for row in inner.audit]
        assert ["a", "c"] == [row["target"] for row in trail.audit]
        assert trail.audit[1]["id"].endswith("2")
        assert "test" == trail.audit[1]["service_id"]

    def test_an_exception_ends_it_too(self):
        """
        The trail is read after the block, and the error carries it.
        """
        with pytest.raises(ZeroDivisionError) as caught, capture() as trail:  # noqa: PT012
            fasten.emit("AUTH_LOGIN", "a")
            1 / 0  # noqa: B018

        assert engine.current() is None
        assert ["a"] == [row["target"] for row in trail.audit]
        assert ["fasten trail:\naudit  AUTH_LOGIN  system  target=a"] == [
            *caught.value.__notes__
        ]

    def test_its_own_failures_show_the_rows_once(self):
        """
        An assertion that lists the nearest rows gets no second list.
        """
        with pytest.raises(AssertionError) as caught, capture() as trail:
            trail.assert_emitted("AUTH_LOGIN")

        assert not hasattr(caught.value, "__notes__")

    def test_one_capture_serves_many_times(self):
        """
        Also inside itself: each entry has a trail of its own.
        """
        again = capture(service_id="again")
        with again as one:
            with again as two:
                fasten.emit("AUTH_LOGIN", "two")
            fasten.emit("AUTH_LOGIN", "one")

        assert ["one"] == [row["target"] for row in one.audit]
        assert ["two"] == [row["target"] for row in two.audit]

    def test_mistakes_inside_are_told_outside(self, trail):
        """
        What an inner block let pass is not lost with it.
        """
        with capture(strict=False):
            fasten.emit("NO_SUCH_CODE", "x")
        trail.assert_not_emitted("NO_SUCH_CODE")

        assert 2 == len(trail.mistakes())

    def test_callables_that_raise_are_mistakes(self, trail):
        """
        Nothing raises into a request for them, so a test has to be told.
        """
        with context.scope(None, request=object(), ask_actor=lambda _: 1 / 0):
            fasten.emit("AUTH_LOGIN", "x")

        assert ["1 of the actor=, tenant= and client= callables raised"] == (
            trail.mistakes()
        )


class TestStructlog:
    @pytest.fixture(autouse=True)
    def _as_new(self):
        yield
        processors.remove_from_configured()
        structlog.reset_defaults()

    @staticmethod
    def _configured():
        out = io.StringIO()
        structlog.configure(
            processors=[structlog.processors.JSONRenderer()],
            logger_factory=structlog.PrintLoggerFactory(out),
        )
        return structlog.get_config()["processors"], out

    def test_lines_of_a_configured_structlog_are_there(self):
        """
        As init() would have it; the chain is the user's again afterwards.
        """
        chain, out = self._configured()
        before = list(chain)
        with capture() as trail, fasten.bind(ID):
            structlog.get_logger().info("x", password="canary")
        after = list(chain)
        structlog.get_logger().info("y")

        assert ("x", ID) == (trail.sys[0]["event"], trail.sys[0]["request_id"])
        assert before == after
        assert 2 == len(out.getvalue().splitlines())

    def test_log_off_leaves_it_alone(self):
        """
        FASTEN_LOG=off holds under a trail, too.
        """
        chain, _ = self._configured()
        before = list(chain)
        with capture(log=False) as trail:
            inside = list(chain)
            structlog.get_logger().info("x")
            fasten.init(log=True)
            structlog.get_logger().info("y")
            fasten.init(log=False)
            structlog.get_logger().info("z")

        assert before == inside == chain
        assert ["y"] == [row["event"] for row in trail.sys]

    def test_what_ran_before_stays_inserted(self, sqlite_dsn):
        """
        A capture takes nothing out that init() has put in.
        """
        chain, _ = self._configured()
        fasten.init(service_id="real", stdout="")
        before = [type(processor) for processor in chain]
        with capture():
            fasten.init(log=False)

        assert 3 == len(before)
        assert before == [type(processor) for processor in chain]


class TestEarly:
    def test_early_lines_are_left_for_the_real_engine(self):
        """
        What was logged on import is in no trail, and not lost.
        """
        done = run_python("""
            import fasten
            from fasten.testing import capture
            fasten.log.info("on import")
            with capture() as trail:
                fasten.log.info("in a test")
                fasten.init()
                fasten.log.info("after init")
            fasten.log.info("between")
            print([line["event"] for line in trail.sys])
            engine = fasten.init(service_id="real", stdout="")
            print([line["event"] for line in engine.sys.ring.rows()])
        """)

        assert ("['in a test', 'after init']\n['on import', 'between']\n", "") == (
            done.stdout,
            done.stderr,
        )


@capture
def plain(trail: Trail, number: int = 1) -> list[str]:
    """
    Emit under a trail of one's own.
    """
    fasten.emit("AUTH_LOGIN", number)
    return [row["target"] for row in trail.audit]


class TestDecorating:
    def test_a_function(self, trail):
        """
        Bare or with settings; each call has its own trail.
        """
        settled = capture(service_id="x")(lambda: engine.current().settings.service_id)

        assert (["1"], ["2"], "x") == (plain(), plain(number=2), settled())
        assert [] == trail.audit

    def test_a_coroutine_function(self):
        """
        The trail lasts until the coroutine has ended.
        """

        @capture(service_id="x")
        async def emits(trail):
            await asyncio.sleep(0)
            fasten.emit("AUTH_LOGIN", "a")
            return len(trail.audit)

        assert 1 == asyncio.run(emits())

    def test_pytest_sees_no_parameter(self):
        """
        It would look for a fixture of that name.
        """
        import inspect

        assert ["number"] == list(inspect.signature(plain).parameters)

    def test_each_test_of_a_class(self):
        """
        As mock.patch does: the methods whose names begin with test.
        """
        seen = []

        @capture
        class Tests(unittest.TestCase):
            def helper(self):
                return engine.current()

            def test_one(self, trail):
                """
                Emit one row.
                """
                fasten.emit("AUTH_LOGIN", "one")
                seen.append(len(trail.audit))

            def test_two(self):
                """
                Emit another row.
                """
                fasten.emit("AUTH_LOGIN", "two")
                seen.append(self.helper() is not None)

        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(Tests).run(result)

        assert (2, []) == (result.testsRun, [*result.failures, *result.errors])
        assert [1, True] == seen


class TestUnittest:
    def test_enter_context(self):
        """
        The recipe for unittest is one line of setUp.
        """
        seen = []

        class Tests(unittest.TestCase):
            def setUp(self):
                self.trail = self.enterContext(capture())

            def test_one(self):
                """
                Emit one row.
                """
                fasten.emit("AUTH_LOGIN", "one")
                self.trail.assert_emitted("AUTH_LOGIN", times=1)

            def test_two(self):
                """
                Emit another row.
                """
                fasten.emit("AUTH_LOGIN", "two")
                seen.append(self.trail.audit[0]["id"])
                self.trail.assert_emitted("AUTH_FAILED")

        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(Tests).run(result)

        assert (2, [], 1) == (result.testsRun, result.errors, len(result.failures))
        assert "AUTH_LOGIN  system  target=two" in result.failures[0][1]
        assert seen[0].endswith("01")
        assert engine.current() is None

    def test_of_a_class_and_async(self):
        """
        One trail for all tests of a class, from an event loop.
        """

        class Tests(unittest.IsolatedAsyncioTestCase):
            @classmethod
            def setUpClass(cls):
                cls.trail = cls.enterClassContext(capture())

            async def test_one(self):
                """
                Emit one row from a thread.
                """
                await asyncio.to_thread(fasten.emit, "AUTH_LOGIN", "one")
                self.trail.assert_emitted("AUTH_LOGIN", target="one")

        result = unittest.TestResult()
        suite = unittest.TestSuite(
            [unittest.defaultTestLoader.loadTestsFromTestCase(Tests)]
        )
        suite.run(result)

        assert (1, [], []) == (result.testsRun, result.errors, result.failures)


DJANGO = """
    import sys
    import django
    from django.conf import settings
    settings.configure(
        SECRET_KEY="x", ROOT_URLCONF="project", ALLOWED_HOSTS=["*"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3",
                               "NAME": ":memory:"}},
        INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth"],
        MIDDLEWARE=["fasten.shim.django.RequestIDMiddleware",
                    "fasten.shim.django.APILogger"],
    )
    django.setup()

    from django.contrib.auth.models import User
    from django.db import connection, transaction
    from django.http import HttpResponse
    from django.test import TestCase
    from django.test.runner import DiscoverRunner
    from django.urls import path
    import fasten
    from fasten.testing import capture

    def create(request):
        with transaction.atomic():
            user = User.objects.create(username="ann")
            fasten.emit("USER_CREATED", user.pk, connection=connection)
        fasten.log.info("created")
        return HttpResponse(status=201)

    class project:
        urlpatterns = [path("users", create)]
    sys.modules["project"] = project

    class Tests(TestCase):
        def setUp(self):
            self.trail = self.enterContext(capture())

        def test_one(self):
            answer = self.client.post("/users", headers={"X-Request-ID": "abc"})
            self.assertEqual("abc", answer.headers["X-Request-ID"])
            row = self.trail.assert_emitted("USER_CREATED", times=1)
            self.assertIs(True, row["pending"])
            self.trail.assert_correlated("abc")
            self.assertEqual([201], [row["status"] for row in self.trail.api])

        async def test_two(self):
            await self.async_client.post("/users")
            self.trail.assert_emitted("USER_CREATED", times=1, method="http")

    runner = DiscoverRunner(verbosity=0)
    suite = runner.test_loader.loadTestsFromTestCase(Tests)
    databases = runner.setup_databases()
    result = runner.run_suite(suite)
    runner.teardown_databases(databases)
    print(result.testsRun, len(result.failures), len(result.errors))
"""


def test_under_djangos_own_runner():
    """
    Django's TestCase, its clients, and a row that its transaction decides on.
    """
    done = run_python(DJANGO)

    assert "2 0 0" == done.stdout.strip(), done.stderr


def test_importing_it_touches_nothing():
    """
    No engine, no stand-in, no open trail: only a capture changes the process.
    """
    done = run_python("""
        import fasten.testing
        from fasten import engine
        print(engine.current(), engine.stand_in(None), fasten.testing.running._open)
    """)

    assert ("None None []", "") == (done.stdout.strip(), done.stderr)


def test_the_clock_moves_back_as_well():
    """
    A clock that steps back is what some tests are about.
    """
    clock = Clock()
    start = clock()
    clock.advance(-0.25)

    assert -250_000_000 == clock() - start


def test_stdlib_records_do_not_leak(caplog):
    """
    A capture's own start and end say nothing in the log.
    """
    with caplog.at_level(logging.DEBUG), capture():
        pass

    assert [] == caplog.records


def test_relative_paths_stay_where_they_were(tmp_path: Path):
    """
    A trail leaves the working directory empty.
    """
    with capture(audit_dsn="sqlite:///./audit.db"):
        fasten.emit("AUTH_LOGIN", "x")

    assert [] == list(tmp_path.iterdir())
