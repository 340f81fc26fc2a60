# SPDX-License-Identifier: Apache-2.0
"""
The main job, end to end: what is emitted is what a store holds, sealed and in order.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import uuid
from pathlib import Path
from typing import Any

import psycopg
import pytest

import fasten
from fasten import delivery, spool
from fasten.codes import Meta
from tests.checker import faults, rows_of
from tests.outside import run_python, wait_until


def start(dsn: str | None, **settings: Any) -> fasten.Engine:
    """
    Run fasten on *dsn* as a service would, and quietly.
    """
    given = {"service_id": "svc", "node_id": "host-01", "stdout": "", "audit_dsn": dsn}
    return fasten.init(**given | settings)


class TestFirstSnippet:
    def test_runs_as_printed(self, store_dsn: str, monkeypatch: Any) -> None:
        """
        The page's first snippet stores its row, and its line shares the id.
        """
        monkeypatch.setenv("FASTEN_SERVICE_ID", "my-service")
        monkeypatch.setenv("FASTEN_NODE_ID", "host-01")
        monkeypatch.setenv("FASTEN_AUDIT_DSN", store_dsn)
        monkeypatch.setenv("FASTEN_STDOUT", "sys")
        fasten.init()
        with fasten.bind("a1b2c3d4"):
            emitted = fasten.emit(
                code="USER_CREATED",
                target="u-42",
                actor="admin",
                detail={"email": "a@ex.com"},
            )
            fasten.log.info("user_created", user_id="u-42")

        assert fasten.flush(10)
        audit, line = fasten.trail("a1b2c3d4")
        assert emitted == audit.id
        assert ("USER_CREATED", "u-42", "admin", 1) == (
            audit.code,
            audit.target,
            audit.actor,
            audit.monotonic_seq,
        )
        assert {"email": "a@ex.com"} == audit.detail
        assert ("user_created", {"user_id": "u-42"}) == (line.event, line.fields)

    def test_without_a_dsn_rows_go_to_stdout(self, run_python: Any) -> None:
        """
        With no DSN at all, rows are NDJSON on stdout and nothing is written to disk.
        """
        done = run_python(
            """
            import fasten
            fasten.init(service_id="svc", node_id="n")
            fasten.emit(code="USER_CREATED", target="u-42", detail={"a": 1})
            """
        )

        assert "" == done.stderr
        row = json.loads(done.stdout)
        assert ["shape", "wire_version", "id"] == list(row)[:3]
        assert ("audit", "USER_CREATED", None, {"a": 1}) == (
            row["shape"],
            row["code"],
            row["monotonic_seq"],
            row["detail"],
        )
        assert [] == list(Path.cwd().iterdir())


class TestStored:
    def test_every_anchor(self, store_dsn: str) -> None:
        """
        All anchors that emit takes are in the store, spelled as given.
        """
        start(store_dsn)
        target = uuid.uuid4()
        fasten.emit(
            "ORDER_PLACED",
            target,
            actor=7,
            actor_kind="schedule",
            outcome="denied",
            method="ui",
            severity="critical",
            detail=["not", "an", "object"],
            tenant_id="acme",
            on_behalf_of="u-1",
            reason="because\nof \\ \t this",
            client="192.0.2.1",
        )
        fasten.flush(10)
        (row,) = rows_of(store_dsn)

        wanted = {
            "target": str(target),
            "actor": "7",
            "actor_kind": "scheduler",
            "outcome": "denied",
            "method": "ui",
            "severity": "critical",
            "detail": '{"value":["not","an","object"]}',
            "tenant_id": "acme",
            "on_behalf_of": "u-1",
            "reason": "because\nof \\ \t this",
            "client": "192.0.2.1",
        }
        assert wanted == {name: row[name] for name in wanted}
        assert [] == faults([row])

    def test_the_context_fills_what_is_not_given(self, store_dsn: str) -> None:
        """
        bind() names the caller of every row inside, and explicit arguments win.
        """
        start(store_dsn)
        with fasten.bind("req-1", actor="ann", tenant_id="acme", method="http"):
            fasten.emit("USER_UPDATED", "u-1")
            fasten.emit("USER_UPDATED", "u-2", actor="root", actor_kind="admin")
        fasten.emit("USER_UPDATED", "u-3")
        fasten.flush(10)
        first, second, third = rows_of(store_dsn)

        assert ("ann", "user", "acme", "http", "req-1") == tuple(
            first[k]
            for k in ("actor", "actor_kind", "tenant_id", "method", "request_id")
        )
        assert ("root", "admin") == (second["actor"], second["actor_kind"])
        assert ("system", "system") == (third["actor"], third["actor_kind"])
        assert third["request_id"].startswith("orphan-svc-")

    def test_hostile_texts_are_stored_and_recompute(self, store_dsn: str) -> None:
        """
        Tabs, backslashes, NULs, emoji and over-long names cost no row and no link.
        """
        start(store_dsn)
        for text in (
            "\\N",
            "a\tb",
            "\\.",
            "x\0y",
            "\ud800",
            "😀\ue000",
            "é" * 9000,
            "\x01",
        ):
            fasten.emit(
                "USER_UPDATED", text, actor=text, reason=text, detail={text: [text]}
            )
        assert fasten.flush(10)

        rows = rows_of(store_dsn)
        assert 8 == len(rows)
        assert [] == faults(rows)

    def test_secrets_never_reach_the_disk(self, store_dsn: str, tmp_path: Path) -> None:
        """
        Neither store nor spool holds a secret that was in a detail, target or reason.
        """
        start(store_dsn, spool_dir=str(tmp_path / "spool"))
        token = "ghp_" + "A" * 36
        fasten.emit(
            "USER_UPDATED",
            token,
            reason=token,
            detail={"note": token, "password": token},
        )
        fasten.flush(10)
        (row,) = rows_of(store_dsn)

        assert "***GH_TOKEN***" == row["target"]
        assert token not in json.dumps(row)
        spooled = b"".join(p.read_bytes() for p in (tmp_path / "spool").iterdir())
        assert token.encode() not in spooled

    def test_packs_as_the_spool_does(self, monkeypatch: Any) -> None:
        """
        The payload that emit builds in line is exactly what the spool would pack.
        """
        engine = start(None)
        seen: list[tuple[bytes, tuple[Any, ...]]] = []
        monkeypatch.setattr(
            engine,
            "_queue",
            type("Q", (), {"append": lambda _, p, r: seen.append((p, r)) or 1})(),
        )
        fasten.emit("USER_UPDATED", "u", reason="r", client="c", tenant_id="t")
        fasten.emit("USER_UPDATED", "u", detail={"é": None}, on_behalf_of="x")

        assert [spool.pack(row) for _, row in seen] == [payload for payload, _ in seen]
        assert [row for _, row in seen] == [
            spool.unpack(payload) for payload, _ in seen
        ]


class TestMistakes:
    def test_unknown_code_names_the_nearest(self, sqlite_dsn: str) -> None:
        """
        An unregistered code is refused, with the code that was meant.
        """
        start(sqlite_dsn)
        with pytest.raises(fasten.UnknownCode, match=r"USER_CREATD.*USER_CREATED"):
            fasten.emit("USER_CREATD", "u")

    @pytest.mark.parametrize(
        "wrong",
        [
            {"target": ""},
            {"target": None},
            {"target": True},
            {"target": 1.5},
            {"actor": ""},
            {"actor": object()},
            {"actor_kind": "robot"},
            {"outcome": "ok"},
            {"method": "smoke signals"},
            {"severity": "loud"},
            {"tenant_id": b"acme"},
            {"reason": 1.5},
        ],
    )
    def test_a_bad_anchor_is_named(
        self, sqlite_dsn: str, wrong: dict[str, Any]
    ) -> None:
        """
        A missing or wrong anchor raises, and says which one it is.
        """
        start(sqlite_dsn)
        with pytest.raises(fasten.InvalidAnchor, match=next(iter(wrong))):
            fasten.emit("USER_CREATED", **{"target": "u-1"} | wrong)

    def test_not_strict_stores_and_marks(self, sqlite_dsn: str) -> None:
        """
        With FASTEN_STRICT=off no mistake raises: it is stored, marked and counted.
        """
        start(sqlite_dsn, strict=False)
        fasten.emit("USER_CREATD", "u-1", detail={"kept": 1})
        fasten.emit("USER_CREATED", None, actor="ann")  # type: ignore[arg-type]
        fasten.emit("not a code", "u-1", outcome="odd")
        fasten.flush(10)
        rows = rows_of(sqlite_dsn)

        assert ["USER_CREATD", "USER_CREATED", "INVALID_CODE"] == [
            r["code"] for r in rows
        ]
        assert all("_mistake" in json.loads(row["detail"]) for row in rows)
        assert {"kept": 1} == json.loads(rows[0]["detail"])["detail"]
        assert 3 == fasten.stats()["mistakes"]

    def test_a_mistake_cannot_pass_for_fastens_own_record(
        self, sqlite_dsn: str
    ) -> None:
        """
        Not strict, a caller's AUDIT_ROW_ERASED is stored outside the domain `fasten`.
        """
        start(sqlite_dsn, strict=False)
        fasten.emit("AUDIT_ROW_ERASED", "x")
        fasten.flush(10)

        assert ["unregistered"] == [row["domain"] for row in rows_of(sqlite_dsn)]

    def test_a_hostile_repr_changes_no_error(self, sqlite_dsn: str) -> None:
        """
        A target whose repr raises is refused like any other that is not a name.
        """

        class Hostile:
            def __repr__(self) -> str:
                raise RuntimeError

        start(sqlite_dsn)
        with pytest.raises(fasten.InvalidAnchor, match="<Hostile>"):
            fasten.emit("USER_CREATED", Hostile())  # type: ignore[arg-type]

    def test_emit_before_init(self) -> None:
        """
        Emitting before init() says what to call.
        """
        with pytest.raises(fasten.NotInitialized, match=r"fasten\.init\(\)"):
            fasten.emit("USER_CREATED", "u-1")

    def test_emit_after_close(self, sqlite_dsn: str) -> None:
        """
        Emitting after close() says what to call; closing twice does nothing.
        """
        start(sqlite_dsn)
        assert fasten.close()
        assert fasten.close()
        with pytest.raises(fasten.NotInitialized, match="closed"):
            fasten.emit("USER_CREATED", "u-1")

    def test_own_codes_are_closed_to_callers(self, sqlite_dsn: str) -> None:
        """
        Nobody but fasten may emit its own records, whoever registered a code again.
        """
        start(sqlite_dsn)
        with pytest.raises(fasten.UnknownCode, match="own"):
            fasten.emit("AUDIT_READ", "x")
        with pytest.raises(fasten.CodeConflict):
            fasten.codes.register("app", {"AUDIT_READ": Meta()})


class TestStoreTrouble:
    def test_unwritable_sqlite_keeps_rows(self, tmp_path: Path) -> None:
        """
        A store whose directory is missing degrades health with the cure; rows wait.
        """
        store = tmp_path / "missing" / "audit.db"
        start(f"sqlite:///{store}", spool_dir=str(tmp_path / "spool"))
        fasten.emit("USER_CREATED", "u-1")

        assert not fasten.flush(0.3)
        wait_until(lambda: "degraded" == fasten.health()["state"], 10)
        assert "directory must exist" in fasten.health()["reasons"][0]
        store.parent.mkdir()
        assert fasten.flush(15)
        assert 1 == len(rows_of(f"sqlite:///{store}"))
        assert "ok" == fasten.health()["state"]

    def test_segments_are_made_while_a_store_is_waited_for(
        self, postgres_dsn: str, tmp_path: Path
    ) -> None:
        """
        No row needs a system call because the drainer hangs in a store.
        """
        journal = start(postgres_dsn, spool_dir=str(tmp_path)).delivery.spool
        fasten.emit("USER_CREATED", "u-1")
        assert fasten.flush(10)
        with psycopg.connect(postgres_dsn) as other:
            other.execute("LOCK TABLE audit_log IN ACCESS EXCLUSIVE MODE")
            for _ in range(3):
                wait_until(lambda: journal._spare is not None, 5)
                spare = journal._spare
                while journal._spare is spare:
                    fasten.emit("USER_CREATED", "u-2")

    def test_not_a_database(self, tmp_path: Path) -> None:
        """
        A file that is no database is named, and left alone.
        """
        store = tmp_path / "audit.db"
        store.write_text(
            "something else entirely, and long enough to be looked at" * 50
        )
        start(f"sqlite:///{store}")
        fasten.emit("USER_CREATED", "u-1")

        assert not fasten.flush(0.3)
        assert "not a database" in fasten.health()["reasons"][0]
        assert store.read_text().startswith("something else")

    def test_unreachable_postgres_is_not_waited_for(self, tmp_path: Path) -> None:
        """
        Nobody listens: init and emit return at once, health says what is wrong.
        """
        start(
            "postgres://bob:hunter2@127.0.0.1:1/app", spool_dir=str(tmp_path / "spool")
        )
        fasten.emit("USER_CREATED", "u-1")
        wait_until(lambda: fasten.health()["state"] != "ok", 10)
        health = fasten.health()

        assert "spool_only" == health["state"]
        assert "not reachable" in health["reasons"][0]
        assert "hunter2" not in repr(health)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"user": "nobody_here"}, "login|password"),
            ({"path": "/no_such_database"}, "database does not exist"),
            ({"query": "table=no_such_schema.audit"}, "schema"),
        ],
    )
    def test_postgres_that_refuses_says_the_cure(
        self, postgres_dsn: str, tmp_path: Path, change: dict[str, str], said: str
    ) -> None:
        """
        A wrong user, database or schema degrades with its cure and keeps the rows.
        """
        from urllib.parse import urlsplit

        parts = urlsplit(postgres_dsn)
        if "user" in change:
            netloc = f"{change['user']}:hunter2@{parts.netloc.rpartition('@')[2]}"
            dsn = parts._replace(netloc=netloc).geturl()
        else:
            dsn = parts._replace(**change).geturl()
        start(dsn, spool_dir=str(tmp_path / "spool"))
        fasten.emit("USER_CREATED", "u-1")
        wait_until(lambda: fasten.health()["state"] != "ok", 10)
        health = fasten.health()

        assert "degraded" == health["state"]
        assert any(word in health["reasons"][0] for word in said.split("|"))
        assert "hunter2" not in repr(health)
        assert 1 == health["depth"]

    def test_postgres_comes_late_goes_and_comes_back(
        self, private_postgres: Any, tmp_path: Path
    ) -> None:
        """
        Down at start, stopped, killed and restarted under load: nothing lost or twice.
        """
        server = private_postgres
        dsn = server.dsn()
        server.stop("immediate")
        start(dsn, spool_dir=str(tmp_path / "spool"))
        acked = [fasten.emit("USER_CREATED", f"early-{n}") for n in range(10)]
        assert not fasten.flush(0.2)
        server.start()
        stop, more = threading.Event(), []

        def emitting() -> None:
            n = 0
            while not stop.wait(0.0005):
                more.append(fasten.emit("USER_UPDATED", f"u-{n}", detail={"n": n}))
                n += 1

        thread = threading.Thread(target=emitting)
        thread.start()
        try:
            for mode in ("fast", "immediate", "kill"):
                assert fasten.flush(20)
                server.restart(mode)
        finally:
            stop.set()
            thread.join()
        assert fasten.flush(30)

        rows = rows_of(dsn)
        assert sorted(acked + more) == sorted(row["id"] for row in rows)
        assert [] == faults(rows)


WRITERS = """
import os, sys, threading
import fasten
from tests.faults import loaded  # once, not in each
codes = ["USER_CREATED", "BATCH_PROCESSED", "CONFIG_UPDATED"]

def emitting(thread):
    for n in range(int(sys.argv[2])):
        id = fasten.emit(codes[n % 3], f"t{thread}", detail={"n": n})
        os.write(1, f"{id}\\n".encode())

def work():
    fasten.init(service_id="svc", node_id="host-01", audit_dsn=sys.argv[1], stdout="")
    threads = [threading.Thread(target=emitting, args=(n,)) for n in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert fasten.flush(60)

children = []
for _ in range(8):
    pid = os.fork()
    if pid == 0:
        work()
        sys.exit()
    children.append(pid)
sys.exit(any([os.waitpid(pid, 0)[1] for pid in children]))
"""


class TestManyWriters:
    def test_one_valid_chain_per_class(self, store_dsn: str) -> None:
        """
        8 processes of 4 threads on one store: no gap, and every link recomputes.
        """
        done = run_python(WRITERS, store_dsn, "40", timeout=120)

        assert 0 == done.returncode, done.stderr
        rows = rows_of(store_dsn)
        assert sorted(done.stdout.split()) == sorted(row["id"] for row in rows)
        assert 8 * 4 * 40 == len(rows)
        assert [] == faults(rows)

    def test_order_per_thread_is_kept(self, sqlite_dsn: str) -> None:
        """
        What one thread emits is numbered in the order in which it did.
        """
        start(sqlite_dsn)
        for n in range(1500):
            fasten.emit("CONFIG_UPDATED", "t", detail={"n": n})
        fasten.flush(20)

        numbers = [json.loads(row["detail"])["n"] for row in rows_of(sqlite_dsn)]
        assert list(range(1500)) == numbers


class TestReentry:
    def test_from_signal_handlers(self, store_dsn: str) -> None:
        """
        A signal handler that emits while its thread emits loses and doubles nothing.
        """
        start(store_dsn)
        acked: list[str] = []

        def handler(*_: object) -> None:
            acked.append(fasten.emit("TRIGGER_FIRED", "signal"))

        before = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        try:
            for n in range(3000):
                id_ = fasten.emit("USER_UPDATED", f"u-{n}", detail={"n": n})
                acked.append(id_)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert fasten.flush(30)

        rows = rows_of(store_dsn)
        assert sorted(acked) == sorted(row["id"] for row in rows)
        assert [] == faults(rows)

    def test_from_del(self, sqlite_dsn: str) -> None:
        """
        Objects that emit as they are collected lose and double nothing.
        """
        start(sqlite_dsn)
        acked: list[str] = []

        class Dying:
            def __del__(self) -> None:
                acked.append(fasten.emit("TRIGGER_FIRED", "del"))

        for n in range(500):
            dying = Dying()
            dying.itself = dying  # type: ignore[attr-defined]
            acked.append(fasten.emit("USER_UPDATED", f"u-{n}"))
        del dying

        def are_dead() -> bool:
            # Beside another thread's collection ours does nothing: so, once more.
            gc.collect()
            return len(acked) == 1000

        wait_until(are_dead)
        assert fasten.flush(20)

        rows = rows_of(sqlite_dsn)
        assert 1000 == len(rows)
        assert sorted(acked) == sorted(row["id"] for row in rows)


class TestLife:
    def test_exit_delivers(self, store_dsn: str) -> None:
        """
        A program that just ends has its rows in the store, or leaves them to the next.

        Its exit is bounded: on a machine busy with tests it may be the latter.
        """
        done = run_python(
            """
            import sys, fasten
            fasten.init(service_id="svc", node_id="n", audit_dsn=sys.argv[1], stdout="")
            for n in range(100):
                fasten.emit("USER_CREATED", f"u-{n}")
            """,
            store_dsn,
        )

        assert (0, "") == (done.returncode, done.stderr)
        start(store_dsn, node_id="n")
        fasten.query()
        wait_until(lambda: len(fasten.query(limit=1000).rows) == 100, 20)
        assert [] == faults(rows_of(store_dsn))

    def test_rows_of_a_dead_process_are_adopted(
        self, store_dsn: str, tmp_path: Path
    ) -> None:
        """
        The next process of the service stores what a killed one left, emitting nothing.
        """
        os.environ["FASTEN_SPOOL_DIR"] = str(tmp_path / "spool")
        done = run_python(
            """
            import os, sys, fasten
            engine = fasten.init(
                service_id="svc", node_id="n", audit_dsn=sys.argv[1], stdout=""
            )
            engine.delivery.drainer._delivering.acquire()
            for n in range(100):
                print(fasten.emit("USER_CREATED", f"u-{n}"))
            sys.stdout.flush()
            os.kill(os.getpid(), 9)
            """,
            store_dsn,
        )
        acked = done.stdout.split()
        start(store_dsn, spool_dir=str(tmp_path / "spool"))
        wait_until(lambda: fasten.stats()["replayed"] == 100, 20)

        rows = rows_of(store_dsn)
        assert acked == [row["id"] for row in rows]
        assert {"n"} == {row["source_node_id"] for row in rows}
        assert [] == faults(rows)

    def test_many_dead_processes_are_adopted_in_turn(
        self, sqlite_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Where they are more than may be open at once, each has its turn.
        """
        spool_dir = str(tmp_path / "spool")
        done = run_python(
            """
            import os, sys, fasten
            fasten.init(service_id="svc", node_id="n", audit_dsn=sys.argv[1],
                        spool_dir=sys.argv[2], stdout="")
            for n in range(9):
                if (child := os.fork()) == 0:
                    fasten.emit("USER_CREATED", f"u-{n}")
                    os.kill(os.getpid(), 9)
                os.waitpid(child, 0)
            """,
            sqlite_dsn,
            spool_dir,
        )
        monkeypatch.setattr(delivery, "ADOPT_MOST", 2)
        monkeypatch.setattr(delivery, "TEND_S", 0.01)
        engine = start(sqlite_dsn, spool_dir=spool_dir)
        most = 0

        def is_done() -> bool:
            nonlocal most
            most = max(most, len(engine.delivery.adopted))
            return fasten.stats()["replayed"] == 9

        wait_until(is_done, 30)

        assert "" == done.stderr
        assert {f"u-{n}" for n in range(9)} == {
            row["target"] for row in rows_of(sqlite_dsn)
        }
        assert 0 < most <= 2

    def test_no_fork_falls_into_an_import(self, sqlite_dsn: str) -> None:
        """
        A child that is forked as the thread loads SQLAlchemy delivers its rows.
        """
        done = run_python(
            """
            import importlib.abc, os, sys, threading
            import fasten
            reached = threading.Event()

            class Slow(importlib.abc.MetaPathFinder):
                def find_spec(self, name, path=None, target=None):
                    # The thread is in the midst of an import: its lock is taken.
                    if name == "sqlalchemy.engine" and not reached.is_set():
                        reached.set()
                        threading.Event().wait(0.3)

            sys.meta_path.insert(0, Slow())
            fasten.init(service_id="svc", node_id="n", audit_dsn=sys.argv[1], stdout="")
            fasten.emit("USER_CREATED", "parent")
            assert reached.wait(20)
            if (child := os.fork()) == 0:
                fasten.emit("USER_CREATED", "child")
                os._exit(not fasten.close(20))
            print(os.waitpid(child, 0)[1], fasten.close(20))
            """,
            sqlite_dsn,
        )

        assert (0, "0 True\n") == (done.returncode, done.stdout)
        assert {"parent", "child"} == {row["target"] for row in rows_of(sqlite_dsn)}

    def test_a_forked_child_has_its_own_rows(self, store_dsn: str) -> None:
        """
        Parent and child of a fork each deliver their own rows, once.
        """
        done = run_python(
            """
            import os, sys, fasten
            fasten.init(service_id="svc", node_id="n", audit_dsn=sys.argv[1], stdout="")
            for n in range(50):
                fasten.emit("USER_CREATED", f"before-{n}")
            child = os.fork()
            me = "child" if child == 0 else "parent"
            for n in range(50):
                fasten.emit("USER_CREATED", f"{me}-{n}")
            assert fasten.flush(20)
            if child == 0:
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            """,
            store_dsn,
            timeout=60,
        )

        assert (0, "") == (done.returncode, done.stderr)
        rows = rows_of(store_dsn)
        assert 150 == len({row["target"] for row in rows}) == len(rows)
        assert [] == faults(rows)

    def test_on_failure_raise_answers_from_the_store(self, store_dsn: str) -> None:
        """
        A code with `on_failure: raise` returns when its row is stored.
        """
        fasten.codes.register("bank", {"MONEY_MOVED": Meta(on_failure="raise")})
        start(store_dsn)
        fasten.emit("MONEY_MOVED", "acc-1")

        assert ["MONEY_MOVED"] == [row["code"] for row in rows_of(store_dsn)]

    def test_strategy_raise_says_what_failed(self, tmp_path: Path) -> None:
        """
        With strategy `raise` a store that cannot be opened is the caller's to know.
        """
        start(
            f"sqlite:///{tmp_path}/missing/audit.db",
            audit_store_failure_strategy="raise",
        )
        with pytest.raises(
            fasten.AuditStoreError, match="directory must exist"
        ) as raised:
            fasten.emit("USER_CREATED", "u-1")

        assert raised.value.id.startswith("evt-")
        assert not raised.value.ambiguous

    def test_init_twice_flushes_and_replaces(self, tmp_path: Path) -> None:
        """
        A second init() leaves no row of the first behind.
        """
        first, second = (f"sqlite:///{tmp_path}/{n}.db" for n in (1, 2))
        start(first)
        fasten.emit("USER_CREATED", "u-1")
        start(second)
        fasten.emit("USER_CREATED", "u-2")
        fasten.flush(10)

        assert ["u-1"] == [row["target"] for row in rows_of(first)]
        assert ["u-2"] == [row["target"] for row in rows_of(second)]

    def test_init_opens_nothing(self, tmp_path: Path) -> None:
        """
        init() alone creates no file and starts no thread.
        """
        threads = threading.active_count()
        start(f"sqlite:///{tmp_path}/audit.db")

        assert [] == list(tmp_path.iterdir())
        assert threads == threading.active_count()


class TestReading:
    def test_pages_without_gap_or_repeat(self, store_dsn: str) -> None:
        """
        Following `next` from page to page meets every row once, newest first.
        """
        start(store_dsn)
        emitted = [fasten.emit("USER_UPDATED", f"u-{n % 3}") for n in range(25)]
        fasten.flush(10)
        seen, cursor = [], None
        while True:
            page = fasten.query(limit=7, cursor=cursor)
            seen += [row.id for row in page.rows]
            cursor = page.next
            if cursor is None:
                break

        assert emitted[::-1] == seen

    def test_filters_and_bounds(self, store_dsn: str) -> None:
        """
        Filters, a window of time and a count select the same rows on every store.
        """
        start(store_dsn)
        fasten.emit("USER_CREATED", "u-1", actor="ann", tenant_id="acme")
        fasten.emit("USER_DELETED", "u-1", actor="bob")
        fasten.emit("USER_DELETED", "u-2" + "x" * 3000, actor="bob")
        fasten.flush(10)

        assert ["ann"] == [r.actor for r in fasten.query(tenant="acme").rows]
        page = fasten.query(actor="bob", since="1h", until="2999-01-01", count="true")
        assert (2, 2) == (page.total, len(page.rows))
        assert 1 == len(fasten.query(target="u-2" + "x" * 3000).rows)
        assert [] == fasten.query(until="1h").rows

    def test_reading_creates_no_store(self, tmp_path: Path) -> None:
        """
        Asking a store that does not exist yet creates nothing and finds nothing.
        """
        start(f"sqlite:///{tmp_path}/audit.db")

        assert [] == fasten.query().rows
        assert [] == list(tmp_path.glob("audit.db*"))

    def test_durable_log_and_api_streams(self, store_dsn: str, tmp_path: Path) -> None:
        """
        With a DSN of their own, log lines and requests are read from the store.
        """
        extra = "&" if "?" in store_dsn else "?"
        start(
            store_dsn,
            sys_dsn=f"{store_dsn}{extra}table=sys_log",
            api_dsn=f"{store_dsn}{extra}table=api_log",
        )
        with fasten.bind("req-9"):
            fasten.log.info("something", n=1, password="x")
            fasten.record_api(method="GET", path="/a", status=200, duration_ms=1.5)
        assert fasten.flush(10)

        line, request = fasten.trail("req-9")
        assert ("something", {"n": 1, "password": "***"}) == (line.event, line.fields)
        assert ("/a", 200, 1.5, True) == (
            request.path,
            request.status,
            request.duration_ms,
            request.complete,
        )
        assert "store" == fasten.query("sys").completeness
