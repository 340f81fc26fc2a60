# SPDX-License-Identifier: Apache-2.0
"""
`tail -f`: each row once, through pages, late rows, and restarts of the source.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

import fasten
from fasten.reader import Principal, Router, bearer, router
from fasten.repository import AuditRepository, Writer
from fasten.rows import Pending, UlidMinter
from fasten.settings import parse_dsn
from tests.cli_runs import (
    fasten_on,
    following,
    in_terminal,
    mounted,
    served,
)
from tests.outside import wait_until
from tests.servers import asgi_thread, free_port

# Programs, each some seconds; what they show comes from stores.
pytestmark = pytest.mark.slow

TOKEN = "s3cret-token"
ENV = {"FASTEN_READER_TOKEN": TOKEN}
CODE = ("--code", "JOB_COMPLETED")


def targets(lines: list[str]) -> list[str]:
    """
    Return the targets of the page's lines.
    """
    return [line.partition("target=")[2] for line in lines]


def _reader(router: Router) -> Starlette:
    return Starlette(routes=[Mount("/api/v1/logs", router)])


class Feeder:
    """
    A writer of rows that can be as old as a test needs them.
    """

    def __init__(self, dsn: str, node: str = "host-01") -> None:
        self.repository = AuditRepository(parse_dsn(dsn, cwd=Path.cwd()))
        self._writer = Writer(os.urandom(16).hex(), "api-server", node)
        self._mint = UlidMinter()

    def row(self, target: str, age_s: float = 0.0) -> Pending:
        """
        Make a row that was emitted *age_s* seconds ago.
        """
        ns = time.time_ns() - round(age_s * 1e9)
        mint = UlidMinter() if age_s else self._mint
        return Pending(
            *(mint(ns), ns // 1000, "JOB_COMPLETED", "completed", "info", "ops", "ops"),
            *("medium", "success", "system", "system", None, None, None, target),
            *("sdk", None, "r-1", None, None, "{}"),
        )

    def store(self, *rows: Pending) -> None:
        """
        Store rows in one transaction.
        """
        self.repository.append(self._writer, [(0, row) for row in rows], 0)

    def close(self) -> None:
        """
        Let go of the store.
        """
        self.repository.database.release()


@pytest.fixture
def feeder(store_dsn):
    """
    Return a feeder of a store that exists.
    """
    made = Feeder(store_dsn)
    made.store(made.row("first"))
    yield made
    made.close()


class TestStore:
    def test_each_row_once_in_order(self, feeder, store_dsn):
        """
        Rows in bursts larger than a page arrive once and in order.
        """
        with following("--dsn", store_dsn, "-n", "5") as tail:
            tail.wait_for(1)
            expected = ["first"]
            for burst in (1, 3, 1_500, 7):
                rows = [feeder.row(f"{burst}/{n}") for n in range(burst)]
                feeder.store(*rows)
                expected += [row.target for row in rows]
                tail.wait_for(len(expected))

            assert expected == targets(tail.lines)

    def test_rows_that_were_there_are_not_new(self, feeder, store_dsn):
        """
        `-n` rows of the past are shown, and none of those before them.
        """
        feeder.store(*(feeder.row(f"old-{n}") for n in range(50)))
        with following("--dsn", store_dsn, "-n", "3") as tail:
            tail.wait_for(3)
            feeder.store(feeder.row("new"))
            tail.wait_for(4)

            assert ["old-47", "old-48", "old-49", "new"] == targets(tail.lines)

    def test_late_rows_are_shown(self, feeder, store_dsn):
        """
        A row that waited in a spool for two days is new when it is stored.
        """
        with following("--dsn", store_dsn) as tail:
            tail.wait_for(1)
            feeder.store(feeder.row("now"), feeder.row("late", age_s=2 * 86_400))
            feeder.store(feeder.row("then"))
            lines = tail.wait_for(4)

            assert {"first", "late", "now", "then"} == set(targets(lines))
            assert 4 == len(lines)

    def test_several_nodes(self, feeder, store_dsn):
        """
        Each node numbers for itself; all of them are followed, new ones too.
        """
        with following("--dsn", store_dsn) as tail:
            tail.wait_for(1)
            others = [Feeder(store_dsn, f"host-{n}") for n in range(3)]
            for number in range(10):
                for place, other in enumerate(others):
                    other.store(other.row(f"{place}/{number}"))
            lines = tail.wait_for(31)
            for other in others:
                other.close()

            assert 31 == len(set(targets(lines)))

    def test_filters_hold_for_new_rows(self, feeder, store_dsn):
        """
        Only rows that match are shown, before and after.
        """
        with following("--dsn", store_dsn, "--target", "mine", "-o", "ndjson") as tail:
            feeder.store(*(feeder.row(t) for t in ("mine", "yours", "mine")))
            lines = tail.wait_for(2)
            feeder.store(feeder.row("yours"), feeder.row("mine"))
            lines = tail.wait_for(3)

            assert ["mine"] * 3 == [json.loads(line)["target"] for line in lines]

    def test_an_engine_is_followed(self, store_dsn):
        """
        What a service emits is there a moment later.
        """
        with fasten_on(store_dsn):
            fasten.emit("JOB_COMPLETED", "one")
            assert fasten.flush(20)
            with following("--dsn", store_dsn) as tail:
                tail.wait_for(1)
                for number in range(500):
                    fasten.emit("JOB_COMPLETED", f"j-{number}")
                lines = tail.wait_for(501)

                assert ["one", *(f"j-{n}" for n in range(500))] == targets(lines)

    def test_a_store_that_is_not_there_yet(self, tmp_path):
        """
        `tail -f` may be started before the service: it waits, and misses nothing.
        """
        dsn = f"sqlite:///{tmp_path}/later.db"
        with following("--dsn", dsn) as tail:
            tail.wait_until_said("there is no store at")
            feeder = Feeder(dsn)
            feeder.store(*(feeder.row(f"j-{n}") for n in range(300)))
            lines = tail.wait_for(300)
            feeder.close()

            assert [f"j-{n}" for n in range(300)] == targets(lines)

    def test_a_file_that_is_replaced(self, tmp_path):
        """
        A new file under the old name is read from its beginning.
        """
        path = tmp_path / "audit.db"
        before = Feeder(f"sqlite:///{path}")
        before.store(*(before.row(f"a-{n}") for n in range(10)))
        with following("--dsn", f"sqlite:///{path}") as tail:
            tail.wait_for(10)
            before.close()
            for file in tmp_path.glob("audit.db*"):
                file.unlink()
            after = Feeder(f"sqlite:///{path}")
            after.store(*(after.row(f"b-{n}") for n in range(3)))
            tail.wait_for(13)
            after.store(after.row("b-3"))
            lines = tail.wait_for(14)
            after.close()

            assert [f"b-{n}" for n in range(4)] == targets(lines)[10:]

    def test_a_backup_that_is_restored(self, tmp_path):
        """
        Rows of a restored copy are not shown again; those stored into it are.
        """
        path, copy = tmp_path / "audit.db", tmp_path / "backup.db"
        feeder = Feeder(f"sqlite:///{path}")
        feeder.store(*(feeder.row(f"a-{n}") for n in range(5)))
        with (
            closing(sqlite3.connect(path)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        lost = feeder.row("a-5")
        feeder.store(lost)
        with following("--dsn", f"sqlite:///{path}") as tail:
            tail.wait_for(6)
            feeder.close()
            for file in tmp_path.glob("audit.db*"):
                file.unlink()
            copy.rename(path)
            again = Feeder(f"sqlite:///{path}")
            again.store(lost, again.row("b-0"))
            lines = tail.wait_for(7)
            again.store(again.row("b-1"))
            lines = tail.wait_for(8)
            again.close()

            assert [*(f"a-{n}" for n in range(6)), "b-0", "b-1"] == targets(lines)

    def test_a_server_that_restarts(self, private_postgres):
        """
        Postgres goes away and comes back: one line on stderr, no row lost or doubled.
        """
        dsn = private_postgres.dsn()
        feeder = Feeder(dsn)
        feeder.store(feeder.row("before"))
        with following("--dsn", dsn) as tail:
            tail.wait_for(1)
            private_postgres.stop("immediate")
            tail.wait_until_said("waiting: ")
            private_postgres.start()
            feeder.close()
            feeder.store(*(feeder.row(f"j-{n}") for n in range(20)))
            tail.wait_until_said("it is back")
            lines = tail.wait_for(21)
            feeder.close()

            assert ["before", *(f"j-{n}" for n in range(20))] == targets(lines)
            assert 1 == sum("waiting: " in line for line in tail.said)

    def test_what_is_wrong_from_the_start_is_not_waited_for(self, postgres_dsn):
        """
        A wrong database is exit 3, not silence.
        """
        with following("--dsn", f"{postgres_dsn}_not") as tail:
            assert 3 == tail.process.wait(30)

    @pytest.mark.parametrize("stream", ["sys", "api"])
    def test_rows_without_a_number(self, store_dsn, stream):
        """
        Durable sys and api rows are followed as well.
        """
        dsn = f"{store_dsn}?table={stream}_log"
        with fasten_on(None, **{f"{stream}_dsn": dsn}):

            def record(number: int) -> None:
                if stream == "sys":
                    fasten.log.info("event", n=number)
                else:
                    fasten.record_api(method="GET", path=f"/{number}", status=200)

            record(0)
            assert fasten.flush(20)
            with following("--stream", stream, "--dsn", dsn, "-o", "ndjson") as tail:
                tail.wait_for(1)
                for number in range(1, 700):
                    record(number)
                lines = tail.wait_for(700)
                key = "n" if stream == "sys" else "path"
                found = [json.loads(line)[key] for line in lines]

                assert [n if stream == "sys" else f"/{n}" for n in range(700)] == found


class TestReader:
    def test_audit_rows_each_once(self, store_dsn):
        """
        A remote store is followed by cursor: bursts, and rows that come late.
        """
        with fasten_on(store_dsn, reader_token=TOKEN):
            fasten.emit("JOB_COMPLETED", "first")
            assert fasten.flush(20)
            feeder = Feeder(store_dsn, "host-02")
            with (
                served(mounted(router().wsgi)) as address,
                following("--url", address, *CODE, env=ENV) as tail,
            ):
                tail.wait_for(1)
                feeder.store(*(feeder.row(f"j-{n}") for n in range(1_200)))
                tail.wait_for(1_201)
                feeder.store(feeder.row("late", age_s=3_600), feeder.row("now"))
                tail.wait_for(1_203)
                feeder.store(feeder.row("then"))
                found = targets(tail.wait_for(1_204))
            feeder.close()

        assert len(found) == len(set(found))
        assert {"first", "late", "now", "then"} | {f"j-{n}" for n in range(1_200)} == (
            set(found)
        )

    def test_no_row_is_too_late(self, store_dsn):
        """
        Rows of years ago, of nodes that were never seen, in more than a page: all met.
        """
        years_s = 3 * 365 * 86_400
        kept = {"audit_retention_override": "medium=9y"}  # or a sweep is sooner
        with fasten_on(store_dsn, reader_token=TOKEN, **kept):
            fasten.emit("JOB_COMPLETED", "first")
            assert fasten.flush(20)
            nodes = [Feeder(store_dsn, f"host-{n}") for n in range(3)]
            with (
                asgi_thread(_reader(router())) as address,
                following("--url", address, *CODE, env=ENV) as tail,
            ):
                tail.wait_for(1)
                for place, node in enumerate(nodes):
                    late = range(700) if place == 1 else range(3)
                    node.store(*(node.row(f"{place}/{n}", years_s) for n in late))
                found = targets(tail.wait_for(707))
            for node in nodes:
                node.close()

        assert ["first"] == found[:1]
        assert {
            f"{p}/{n}" for p, m in ((0, 3), (1, 700), (2, 3)) for n in range(m)
        } == (set(found[1:]))
        assert 707 == len(found)

    def test_a_server_that_restarts_over_its_store(self, store_dsn):
        """
        What is stored while nobody answers, late rows too, is met once it is back.
        """
        port = free_port()
        with (
            fasten_on(store_dsn, reader_token=TOKEN),
            closing(Feeder(store_dsn, "host-02")) as feeder,
            ExitStack() as first,
        ):
            feeder.store(feeder.row("before"))
            address = first.enter_context(served(mounted(router().wsgi), port))
            with following("--url", address, *CODE, env=ENV) as tail:
                tail.wait_for(1)
                first.close()
                tail.wait_until_said("waiting: ")
                feeder.store(feeder.row("late", age_s=9 * 86_400), feeder.row("now"))
                with served(mounted(router().wsgi), port):
                    tail.wait_for(3)
                    feeder.store(feeder.row("later", age_s=9 * 86_400))
                    found = targets(tail.wait_for(4))

        assert ["before", "late", "now", "later"] == found

    def test_a_tenant_follows_its_own(self, sqlite_dsn):
        """
        Late rows of others, in pages full of them, hide nothing and are not shown.
        """
        auth = bearer({TOKEN: Principal("ann", "acme")})
        with fasten_on(sqlite_dsn):
            fasten.emit("JOB_COMPLETED", "first", tenant_id="acme")
            assert fasten.flush(20)
            with (
                asgi_thread(_reader(router(auth))) as address,
                following("--url", address, *CODE, env=ENV) as tail,
            ):
                tail.wait_for(1)
                for number in range(1_500):
                    tenant = "acme" if number == 1_400 else "other"
                    fasten.emit("JOB_COMPLETED", f"{number}", tenant_id=tenant)
                found = targets(tail.wait_for(2))

        assert ["first", "1400"] == found

    def test_a_store_that_is_restored(self, tmp_path):
        """
        A reader whose store is replaced by its backup tells what comes after that.
        """
        path, copy = tmp_path / "audit.db", tmp_path / "backup.db"
        feeder = Feeder(f"sqlite:///{path}")
        feeder.store(*(feeder.row(f"a-{n}") for n in range(5)))
        with (
            closing(sqlite3.connect(path)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        feeder.store(*(feeder.row(f"lost-{n}") for n in range(5)))
        feeder.close()
        settings = {
            "service_id": "api-server",
            "stdout": "",
            "audit_dsn": f"sqlite:///{path}",
            "reader_token": TOKEN,
        }
        fasten.init(**settings)
        with (
            asgi_thread(_reader(router())) as address,
            following("--url", address, *CODE, env=ENV) as tail,
        ):
            tail.wait_for(10)
            fasten.close()
            for suffix in ("", "-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            copy.rename(path)
            with closing(Feeder(f"sqlite:///{path}")) as again:
                again.store(again.row("b-0"))
                fasten.init(**settings)
                tail.wait_for(11)
                again.store(again.row("b-1", age_s=9 * 86_400))
                lines = tail.wait_for(12)

        assert ["b-0", "b-1"] == targets(lines)[10:]

    @pytest.mark.parametrize("stream", ["audit", "sys", "api"])
    def test_rows_in_memory(self, stream):
        """
        Rings are followed, though their rows have no number.
        """

        def record(number: int) -> None:
            if stream == "audit":
                fasten.emit("USER_CREATED", str(number))
            elif stream == "sys":
                fasten.log.info(str(number))
            else:
                fasten.record_api(method="GET", path=str(number), status=200)

        with fasten_on(None, reader_token=TOKEN):
            record(0)
            words = ("--stream", stream, "-o", "ndjson")
            with served(mounted(router().wsgi)) as address:
                with following("--url", address, *words, env=ENV) as tail:
                    tail.wait_for(1)
                    for number in range(1, 450):
                        record(number)
                    fasten.flush(20)
                    tail.wait_for(450)
                    # The reading itself may have left a row among them.
                    wait_until(
                        lambda: sum("AUDIT_READ" not in x for x in tail.lines) >= 450,
                        20,
                    )
                    lines = list(tail.lines)
        key = {"audit": "target", "sys": "event", "api": "path"}[stream]
        found = [json.loads(line)[key] for line in lines]

        assert [str(n) for n in range(450)] == [n for n in found if n.isdecimal()]

    def test_a_service_that_restarts(self):
        """
        A new process begins with an empty ring: its rows are shown, none twice.
        """
        words = ("--stream", "sys", "-o", "ndjson")
        with fasten_on(None, reader_token=TOKEN):
            for number in range(5):
                fasten.log.info(f"a-{number}")
            with (
                served(mounted(router().wsgi)) as address,
                following("--url", address, *words, env=ENV) as tail,
            ):
                tail.wait_for(5)
                fasten.init(service_id="api-server", stdout="", reader_token=TOKEN)
                for number in range(5):
                    fasten.log.info(f"b-{number}")
                lines = tail.wait_for(10)

        assert [*(f"a-{n}" for n in range(5)), *(f"b-{n}" for n in range(5))] == [
            json.loads(line)["event"] for line in lines
        ]

    def test_workers_that_answer_in_turn(self):
        """
        Several processes behind one address: each row once, whoever answers.
        """
        rows = {
            worker: [_line(f"{worker}-{n}", n) for n in range(3)] for worker in "ab"
        }
        turns = iter(range(10**6))

        def answer(_environ, start_response):
            worker = "ab"[next(turns) % 2]
            start_response("200 OK", [("Content-Type", "application/json")])
            body = {
                "rows": rows[worker][::-1],
                "next": None,
                "completeness": "ring",
                "source": f"host-01/{worker}",
            }
            return [json.dumps(body).encode()]

        with served(answer) as address:
            words = ("--stream", "sys", "-o", "ndjson")
            with following("--url", address, *words) as tail:
                tail.wait_for(3)
                for number in range(3, 6):
                    rows["a"].append(_line(f"a-{number}", number))
                    rows["b"].append(_line(f"b-{number}", number))
                lines = tail.wait_for(9)
                events = [json.loads(line)["event"] for line in lines]

        assert len(events) == len(set(events))
        assert {f"{w}-{n}" for w in "ab" for n in range(3, 6)} <= set(events)

    def test_a_token_that_is_withdrawn_ends_it(self):
        """
        A refusal in the middle is not waited out.
        """
        allowed = [True]

        def answer(_environ, start_response):
            if not allowed:
                start_response("401 Unauthorized", [])
                return [b""]
            start_response("200 OK", [])
            return [b'{"rows": [], "completeness": "ring", "source": "h/1"}']

        with served(answer) as address, following("--url", address) as tail:
            allowed.clear()

            assert 1 == tail.process.wait(30)


def _line(event: str, number: int) -> dict:
    return {
        "shape": "sys",
        "level": "info",
        "event": event,
        "timestamp": f"2026-04-22T12:34:{number:02d}.000000Z",
    }


class TestTerminal:
    def test_ctrl_c_ends_it(self, sqlite_dsn):
        """
        Ctrl-C is how it ends: no traceback, exit 0.
        """
        feeder = Feeder(sqlite_dsn)
        feeder.store(feeder.row("first"))
        feeder.close()
        with following("--dsn", sqlite_dsn) as tail:
            tail.wait_for(1)
            tail.process.send_signal(signal.SIGINT)

            assert 0 == tail.process.wait(30)
            assert [] == tail.said

    def test_ctrl_c_is_typed(self, sqlite_dsn):
        """
        On a terminal: the line in colour, the key's echo, and the prompt again.
        """
        with fasten_on(sqlite_dsn):
            fasten.emit("USER_CREATED", "u-42", outcome="failure")
        code, seen = in_terminal(
            *("tail", "-f", "--dsn", sqlite_dsn), keys=("target=u-42", "\x03")
        )

        assert 0 == code
        assert "\x1b[" in seen
        assert seen.rstrip("\n").endswith("target=u-42\n^C")

    def test_help_fits(self):
        """
        The help of the largest command fits 80 columns.
        """
        code, seen = in_terminal("tail", "--help")

        assert 0 == code
        assert 80 >= max(map(len, seen.splitlines()))
