# SPDX-License-Identifier: Apache-2.0
"""
A store set up by its owner: each role does its work, and nothing else.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fasten
from fasten.chain import COMMITTED_FIELDS
from fasten.repository.roles import init_sql, stream_sql, trigger_statements
from fasten.repository.stream import StreamRepository
from fasten.rows import Query, canonical_json
from fasten.settings import parse_dsn
from tests.cli_runs import run
from tests.ledger import SEED
from tests.outside import wait_until
from tests.stores import Kept

CANARY = 'canary "4711"\\\n\t\x01\x7f\u2028ümläut😀'
PASSWORD = "secret"


@pytest.fixture
def roles(postgres_dsn: str) -> Iterator[Callable[[str], str]]:
    """
    Set a database up as its owner would; give the DSN of a login in one of the roles.
    """
    with psycopg.connect(postgres_dsn, autocommit=True) as owner:
        owner.execute(init_sql(parse_dsn(postgres_dsn, cwd=Path.cwd())))
        database = owner.info.dbname
        logins = []

        def login(role: str) -> str:
            name = f"{role}_{database}"
            owner.execute(
                f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}' IN ROLE {role}"
            )
            logins.append(name)
            parts = urlsplit(postgres_dsn)
            place = parts.netloc.rpartition("@")[2]
            return parts._replace(netloc=f"{name}:{PASSWORD}@{place}").geturl()

        yield login
        for name in logins:
            owner.execute(f"DROP ROLE {name}")


@pytest.fixture
def app(roles: Callable[[str], str]) -> Iterator[Kept]:
    """
    Give the store as a service has it.
    """
    made = Kept(roles("fasten_app"))
    yield made
    made.close()


def refused(kept: Kept, *statements: str) -> list[str]:
    """
    Return the statements that were not refused.
    """
    done = []
    for statement in statements:
        try:
            kept.sql(statement)
        except psycopg.errors.InsufficientPrivilege:
            continue
        done.append(statement)
    return done


class TestStreams:
    @pytest.mark.parametrize("stream", ["sys", "api"])
    def test_its_rows_come_and_go(self, postgres_dsn, roles, stream):
        """
        A service inserts, reads and sweeps the rows of its streams, and owns nothing.
        """
        with psycopg.connect(postgres_dsn, autocommit=True) as owner:
            place = parse_dsn(postgres_dsn, cwd=Path.cwd(), table=f"{stream}_log")
            owner.execute(stream_sql(place, stream))
            owner.execute(stream_sql(place, stream))  # it may be run again
        mine = parse_dsn(roles("fasten_app"), cwd=Path.cwd(), table=f"{stream}_log")
        repository = StreamRepository(mine, stream)
        row = {"shape": stream, "timestamp": "2026-01-01T00:00:00Z", "service_id": "s"}
        repository.append([row, row])
        page = repository.query(Query.parse(stream, {}, now_us=0))
        swept = repository.sweep(2**52)
        repository.database.release()

        assert 2 == len(page.rows)
        assert 2 == swept

    def test_a_right_is_missing(self, postgres_dsn, roles):
        """
        It is named by doctor before the first row is refused.
        """
        place = parse_dsn(postgres_dsn, cwd=Path.cwd(), table="sys_log")
        with psycopg.connect(postgres_dsn, autocommit=True) as owner:
            owner.execute(stream_sql(place, "sys"))
            owner.execute("REVOKE DELETE ON sys_log FROM fasten_app")
        env = {"FASTEN_SERVICE_ID": "svc", "FASTEN_SYS_DSN": roles("fasten_app")}
        done = run("doctor", **env)

        assert 1 == done.exit_code
        assert "lacks DELETE ON sys_log" in done.stdout


class TestApp:
    def test_it_stores_signs_and_sweeps(self, app):
        """
        The whole work of a service, without owning anything.
        """
        app.policy = attrs.evolve(app.policy, short=1)
        app.maker.us = 1_700_000_000_000_000
        app.emit("n1", *["short"] * 5, "medium")
        app.emit("n2", "short", "long")
        notes = app.checkpoint()
        app.age(1)
        done = app.sweep(limit=2)

        assert 4 == len(notes)
        assert {"short": 6} == done.by_class
        assert app.verify(given=notes).ok

    def test_it_changes_nothing_else(self, app):
        """
        No row, head or checkpoint can be edited, and none deleted.
        """
        app.emit("n1", "short", "medium")
        row = tuple(app.maker.pending())
        app.repository.append(app.writer(), [(1, row)], 1)
        app.checkpoint()
        done = refused(
            app,
            "UPDATE audit_log SET actor = 'mallory'",
            "DELETE FROM audit_log",
            "TRUNCATE audit_log",
            "DELETE FROM audit_log_head",
            "UPDATE audit_log_head SET seq = seq - 1",
            "UPDATE audit_log_head SET pruned_seq = seq + 1",
            "UPDATE audit_log_node SET seq = 0",
            "UPDATE audit_log_writer SET watermark = watermark - 1",
            "DELETE FROM audit_log_checkpoint",
            "UPDATE audit_log_checkpoint SET note = 'x'",
            "DELETE FROM audit_log_meta",
            "INSERT INTO audit_log_erasure VALUES ('id', 's', 'd', now(), '', '')",
            "SELECT fasten_erase('x', ARRAY['x'], ARRAY['actor'])",
            "SET session_replication_role = replica",
            "DROP TRIGGER fasten_update ON audit_log",
        )

        assert [] == done
        assert 3 == app.verify().rows

    def test_it_may_say_what_was_shipped(self, app):
        """
        The one column that is outside of the seal.
        """
        app.emit("n1", "medium")
        app.sql("UPDATE audit_log SET shipped_at = now()")

        assert app.verify().ok

    @pytest.mark.parametrize("lie", ["young", "held", "unrecorded", "beyond"])
    def test_the_function_enforces_the_cut(self, app, lie):
        """
        Only what has expired, is not held, and stands in a record of a sweep.
        """
        app.policy = attrs.evolve(app.policy, short=86_400)
        app.maker.us = 1_700_000_000_000_000
        rows = app.emit("n1", *["short"] * 3)
        app.sweep(limit=1, is_dry=True)
        app.sql(
            "INSERT INTO audit_log_meta (key, value) VALUES (?, ?)",
            "retention:shop",
            json.dumps({"short": 10**11 if lie == "young" else 60}),
        )
        if lie == "held":
            app.hold("target", rows[1][16])
        cut = {"service": "shop", "node": "n1", "class": "short", "to_seq": 3}
        said = {"cuts": [] if lie == "unrecorded" else [cut]}
        record = app.append(
            "n1",
            [
                app.maker.pending(
                    "long",
                    code="RETENTION_SWEEP_RAN",
                    domain="fasten",
                    detail=canonical_json(said),
                )
            ],
        )
        through = 5 if lie == "beyond" else 3
        with pytest.raises(psycopg.errors.RaiseException):
            app.sql(
                "SELECT fasten_prune(?, 'shop', 'n1', 'short', ?, '')",
                record[0][1],
                through,
            )

        assert 3 == len(app.columns("id", where="retention_class = 'short'"))

    def test_its_sweep_tidies_up(self, app, postgres_dsn):
        """
        Erasures of before the longest period are dropped, by the function.
        """
        app.sweep()
        owner = Kept(postgres_dsn)
        owner.sql(
            "INSERT INTO audit_log_erasure (field, salt, digest, erased_at) "
            "SELECT 'actor', 's', days::text, now() - make_interval(days => days) "
            "FROM unnest(ARRAY[1094, 1096]) AS days"
        )
        app.sweep()

        assert [("1094",)] == app.sql("SELECT digest FROM audit_log_erasure")

    def test_without_the_right_to_erase_a_sweep_goes_on(self, app):
        """
        It names the right that is missing.
        """
        app.policy = attrs.evolve(app.policy, short=1)
        app.maker.us = 1_700_000_000_000_000
        rows = app.emit("n1", *["short"] * 3)
        app.age(1)
        app.hold("target", rows[1][16])
        done = app.sweep()

        assert (1, 0) == (done.deleted, done.erased)
        assert "fasten_erase" in done.missing[0]


class TestRetention:
    @pytest.fixture
    def retention(self, roles: Callable[[str], str]) -> Iterator[Kept]:
        """
        Give the store as who erases has it.
        """
        made = Kept(roles("fasten_retention"))
        yield made
        made.close()

    def test_it_erases(self, retention):
        """
        What the function leaves of a row is what `chain.erase` would.
        """
        for _ in range(3):
            retention.emit("n1", "medium", "long")
            retention.emit("n1", "medium", actor=CANARY, detail='{"a":1.5,"ü":"é"}')
        done = retention.erase("actor", CANARY)
        again = retention.columns("id", where="actor IS NULL")[0]
        retention.erase("id", again, "target", "reason")
        retention.erase("id", again, *COMMITTED_FIELDS)

        assert 3 == done.rows
        assert retention.verify().ok
        assert [(None,) * 6] == [
            row
            for row in retention.columns(*COMMITTED_FIELDS)
            if row[COMMITTED_FIELDS.index("target")] is None
        ]

    def test_any_text_can_be_erased(self, retention):
        """
        Postgres spells a text as JSON just as the seal did.
        """

        @given(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
        )
        def check(text: str) -> None:
            stored = retention.emit("n1", "medium", target=text or "x", reason=text)
            retention.erase("id", stored[0][1], "target", "reason")

        check()

        assert retention.verify().ok

    def test_it_erases_on_record_only(self, retention):
        """
        Without a record that names row and field, nothing goes.
        """
        stored = retention.emit("n1", "medium")
        with pytest.raises(psycopg.errors.RaiseException, match="no such erasure"):
            retention.sql(
                "SELECT fasten_erase(?, ARRAY[?], ARRAY['actor'])",
                stored[0][1],
                stored[0][1],
            )

    def test_it_does_what_a_service_does(self, retention):
        """
        It is a member of fasten_app; expired rows behind a hold are erased.
        """
        retention.policy = attrs.evolve(retention.policy, short=1)
        retention.maker.us = 1_700_000_000_000_000
        rows = retention.emit("n1", *["short"] * 3)
        retention.age(1)
        hold = retention.hold("target", rows[1][16])
        done = retention.sweep()
        retention.lift(hold)

        assert (1, 1) == (done.deleted, done.erased)
        assert 2 == retention.sweep().deleted
        assert retention.verify().ok


class TestReader:
    def test_it_reads_and_verifies(self, app, roles):
        """
        And stores nothing.
        """
        app.emit("n1", "medium")
        reader = Kept(roles("fasten_reader"))

        assert reader.verify().ok
        assert [] == refused(
            reader,
            "INSERT INTO audit_log SELECT * FROM audit_log",
            "UPDATE audit_log SET shipped_at = now()",
            "UPDATE audit_log_meta SET value = ''",
        )
        reader.close()


class TestWholePath:
    """
    What a service and its operators do, each logged in as what it is.
    """

    @pytest.fixture
    def logins(
        self, roles: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
    ) -> dict[str, str]:
        """
        Give the DSN of each role, and the environment of a service.
        """
        monkeypatch.setenv("FASTEN_SERVICE_ID", "shop")
        monkeypatch.setenv("FASTEN_NODE_ID", "n1")
        monkeypatch.setenv("FASTEN_SPOOL_DIR", str(Path.cwd() / "spool"))
        monkeypatch.setenv("FASTEN_AUDIT_RETENTION_CLASS_SHORT", "1s")
        monkeypatch.setenv("FASTEN_SIGNING_KEY", SEED)
        names = ("fasten_app", "fasten_retention", "fasten_reader")
        return {name.removeprefix("fasten_"): roles(name) for name in names}

    def test_emit_sweep_erase_verify(self, logins):
        """
        Nobody owns anything, and everything is done.
        """
        app, retention = logins["app"], logins["retention"]
        fasten.init(audit_dsn=app, stdout="")
        for number in range(5):
            fasten.emit("TRIGGER_FIRED", f"t-{number}", actor="ann")
            fasten.emit("USER_CREATED", f"u-{number}", actor="ann", detail={"n": 1})
        assert fasten.flush(10)
        fasten.close()
        gone: list[int] = []

        def have_gone() -> bool:
            # A second old is not what all of them become in the same moment.
            done = run("sweep", "--dsn", app, "-o", "json")
            gone.append(json.loads(done.stdout)["deleted"])
            return sum(gone) == 5

        wait_until(have_gone, 10)
        words = ("--actor", "ann", "--reason", "r", "--yes")
        refused = run("erase", "--dsn", app, *words)
        erased = run("erase", "--dsn", retention, *words)
        proof = run("verify", "--dsn", logins["reader"], "--require-anchor")

        assert (1, 0, 0) == (refused.exit_code, erased.exit_code, proof.exit_code)
        assert "Postgres 42501: a right is missing" in refused.stderr
        assert "erased 5 rows: 5 long" in erased.stdout

    def test_doctor_tells_who_is_logged_in(self, logins, postgres_dsn):
        """
        An app role is well, an owner could rewrite the log, a reader lacks rights.
        """
        fasten.init(audit_dsn=logins["app"], stdout="")
        fasten.emit("USER_CREATED", "u-1")
        fasten.close()
        told = {
            name: run("doctor", FASTEN_AUDIT_DSN=dsn).stdout
            for name, dsn in {**logins, "owner": postgres_dsn}.items()
        }

        assert "does not own audit_log, and has all that it needs" in told["app"]
        assert "does not own audit_log, and has all that it needs" in told["retention"]
        assert "✗ emit roundtrip failed" in told["reader"]
        assert 'lacks INSERT ON "public"."audit_log"' in told["reader"]
        assert "⚠ role postgres is a superuser: it can drop" in told["owner"]


class TestOwner:
    """
    Triggers hold against the owner, too, as long as they are there.
    """

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE audit_log SET code = 'X'",
            "UPDATE audit_log SET actor = 'mallory'",
            "UPDATE audit_log SET actor = NULL",
            "UPDATE audit_log SET salt = NULL",
            "DELETE FROM audit_log",
            "TRUNCATE audit_log",
            "TRUNCATE audit_log_checkpoint",
            "UPDATE audit_log_head SET count = count - 1",
            "DELETE FROM audit_log_node",
            "SET session_replication_role = replica; DELETE FROM audit_log",
            "SET session_replication_role = replica; TRUNCATE audit_log",
        ],
    )
    def test_it_is_stopped(self, app, postgres_dsn, statement):
        """
        A slip with the owner's password changes nothing.
        """
        app.emit("n1", "medium")
        owner = Kept(postgres_dsn)
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="fasten"):
            owner.sql(statement)

        assert app.verify().ok

    def test_the_script_may_run_again(self, app, postgres_dsn):
        """
        Nothing is lost by it.
        """
        app.emit("n1", "medium")
        sql = init_sql(parse_dsn(postgres_dsn, cwd=Path.cwd()))
        with psycopg.connect(postgres_dsn, autocommit=True) as owner:
            owner.execute(sql)

        assert 1 == app.verify().rows

    def test_tables_of_another_name_have_functions_of_their_own(self, postgres_dsn):
        """
        Several logs may stand in one schema, or in one of their own.
        """
        for more in ("?table=trail", "?table=vault.audit_log"):
            dsn = f"{postgres_dsn}{more}"
            with psycopg.connect(postgres_dsn, autocommit=True) as owner:
                owner.execute(init_sql(parse_dsn(dsn, cwd=Path.cwd())))
            kept = Kept(dsn)
            kept.policy = attrs.evolve(kept.policy, short=1)
            kept.maker.us = 1_700_000_000_000_000
            kept.emit("n1", "short", "medium")
            kept.age(1)
            swept = kept.sweep().deleted
            kept.close()

            assert 1 == swept
            assert kept.verify().ok


class TestSqlite:
    @pytest.fixture
    def guarded(self, sqlite_dsn: str) -> Iterator[Kept]:
        """
        Give a SQLite store with its triggers.
        """
        made = Kept(sqlite_dsn)
        made.repository.schema.ensure()
        for statement in trigger_statements(made.dsn):
            made.sql(statement)
        yield made
        made.close()

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE audit_log SET code = 'X'",
            "UPDATE audit_log SET actor = 'mallory'",
            "UPDATE audit_log SET actor = NULL",
            "DELETE FROM audit_log",
            "UPDATE audit_log_head SET seq = 0",
            "DELETE FROM audit_log_head",
            "UPDATE audit_log_node SET seq = 0",
            "DELETE FROM audit_log_checkpoint",
            "UPDATE audit_log_checkpoint SET note = 'x'",
        ],
    )
    def test_slips_are_stopped(self, guarded, statement):
        """
        Whoever holds the file may drop the triggers; nobody does that by accident.
        """
        guarded.emit("n1", "medium")
        guarded.checkpoint()
        with pytest.raises(sqlite3.IntegrityError, match="fasten"):
            guarded.sql(statement)

    def test_its_own_work_is_let_through(self, guarded):
        """
        Sweeps, holds and erasures are the transitions that triggers know.
        """
        rows = guarded.emit("n1", *["short"] * 4, "medium")
        guarded.checkpoint()
        guarded.hold("target", rows[1][16])
        guarded.age(31)
        done = guarded.sweep()
        guarded.erase("id", rows[4][1], "actor")
        guarded.erase("id", rows[4][1], *COMMITTED_FIELDS)

        assert (1, 2) == (done.deleted, done.erased)
        assert guarded.verify().ok


def test_the_sql_is_whole_statements(sqlite_dsn: str) -> None:
    """
    What is printed for SQLite can be run as it is.
    """
    dsn = parse_dsn(sqlite_dsn, cwd=Path.cwd())
    connection: Any = sqlite3.connect(str(dsn.path))
    connection.executescript(init_sql(dsn))
    connection.executescript(init_sql(dsn))
    names = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'")
    found = [row[0] for row in names]
    connection.close()

    assert 8 == len(found)
