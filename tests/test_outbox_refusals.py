# SPDX-License-Identifier: Apache-2.0
"""
Rows that a caller's transaction cannot take: said at once, with the cure, and the
transaction goes on as if nobody had asked.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

import fasten
from tests.checker import rows_of
from tests.outside import wait_until
from tests.transactions import CODE, business, path_of, prepare, url

REFUSED = "not written into the transaction"


def start(dsn: str | None, **settings: Any) -> fasten.Engine:
    """
    Run fasten on *dsn*, quietly.
    """
    given = {"service_id": "svc", "node_id": "host-01", "stdout": "", "audit_dsn": dsn}
    return fasten.init(**given | settings)


def asked(dsn: str, sql: str) -> Any:
    """
    Run one statement as the owner; return its rows, if any.
    """
    with psycopg.connect(dsn, autocommit=True) as owner:
        done = owner.execute(sql)
        return done.fetchall() if done.description else None


@pytest.fixture
def app(postgres_dsn: str) -> Iterator[str]:
    """
    Return the DSN of a role that owns nothing: it may use the tables there are.
    """
    prepare(postgres_dsn)
    role = f"app_{urlsplit(postgres_dsn).path[1:]}"
    start(postgres_dsn)
    fasten.emit(CODE, "0")
    assert fasten.flush(20)
    fasten.close()
    asked(postgres_dsn, f"CREATE ROLE {role} LOGIN")
    asked(postgres_dsn, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    asked(postgres_dsn, f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    parts = urlsplit(postgres_dsn)
    yield parts._replace(netloc=f"{role}@{parts.hostname}:{parts.port}").geturl()
    fasten.close()
    asked(postgres_dsn, f"DROP OWNED BY {role}")
    asked(postgres_dsn, f"DROP ROLE {role}")


class TestSetup:
    def test_a_missing_outbox(self, app: str, postgres_dsn: str) -> None:
        """
        It is found on fasten's own connection; the caller's has not been touched.
        """
        asked(postgres_dsn, "DROP TABLE audit_log_outbox")
        start(app)
        with closing(psycopg.connect(app)) as connection:
            with pytest.raises(fasten.AuditStoreError, match=r"init-db --outbox") as it:
                fasten.emit(CODE, 1, connection=connection)

            assert (
                psycopg.pq.TransactionStatus.IDLE == connection.info.transaction_status
            )
        assert it.value.id.startswith("evt-")
        assert not it.value.ambiguous

    def test_a_missing_outbox_is_made_where_we_may(self, postgres_dsn: str) -> None:
        """
        An owner's very first row makes the tables, and is moved.
        """
        start(postgres_dsn)
        with closing(psycopg.connect(postgres_dsn)) as connection:
            fasten.emit(CODE, 1, connection=connection)
            connection.commit()

        assert fasten.flush(20)
        assert ["1"] == [row["target"] for row in rows_of(postgres_dsn)]

    @pytest.mark.parametrize("right", ["SELECT", "INSERT", "DELETE"])
    def test_a_missing_grant(self, app: str, postgres_dsn: str, right: str) -> None:
        """
        The right that is missing is named with the GRANT that cures it.
        """
        role = urlsplit(app).username
        asked(postgres_dsn, f"REVOKE {right} ON audit_log_outbox FROM {role}")
        start(app)
        with closing(psycopg.connect(app)) as connection:
            with pytest.raises(fasten.AuditStoreError, match=rf"GRANT.*{right}"):
                fasten.emit(CODE, 1, connection=connection)

            assert (
                psycopg.pq.TransactionStatus.IDLE == connection.info.transaction_status
            )
        asked(postgres_dsn, f"GRANT {right} ON audit_log_outbox TO {role}")
        with closing(psycopg.connect(app)) as connection:
            fasten.emit(CODE, 2, connection=connection)
            connection.commit()
        assert fasten.flush(20)
        assert ["0", "2"] == [row["target"] for row in rows_of(postgres_dsn)]

    def test_the_grants_of_the_contract_are_enough(
        self, app: str, postgres_dsn: str
    ) -> None:
        """
        SELECT, INSERT and DELETE on the outbox: no UPDATE, no right on a sequence.
        """
        role = urlsplit(app).username
        asked(postgres_dsn, f"REVOKE ALL ON audit_log_outbox FROM {role}")
        asked(
            postgres_dsn, f"GRANT SELECT, INSERT, DELETE ON audit_log_outbox TO {role}"
        )
        start(app)
        with closing(psycopg.connect(app)) as connection:
            fasten.emit(CODE, 1, connection=connection)
            connection.commit()

        assert fasten.flush(20)
        assert ["0", "1"] == [row["target"] for row in rows_of(postgres_dsn)]

    def test_a_missing_schema(self, app: str) -> None:
        """
        A schema that is not there is said, not made.
        """
        start(f"{app}?table=nowhere.audit_log")
        with closing(psycopg.connect(app)) as connection:
            with pytest.raises(fasten.AuditStoreError, match=r"init-db --outbox"):
                fasten.emit(CODE, 1, connection=connection)

            assert (
                psycopg.pq.TransactionStatus.IDLE == connection.info.transaction_status
            )

    def test_another_role_writes(self, app: str, postgres_dsn: str) -> None:
        """
        A business role needs INSERT and no more; without it, it is told.
        """
        role = urlsplit(app).username
        asked(postgres_dsn, f"REVOKE ALL ON audit_log_outbox FROM {role}")
        start(postgres_dsn)
        with closing(psycopg.connect(app)) as connection:
            connection.execute("INSERT INTO orders VALUES (1)")
            with pytest.raises(fasten.AuditStoreError, match="GRANT INSERT"):
                fasten.emit(CODE, 1, connection=connection)
            connection.commit()
            asked(postgres_dsn, f"GRANT INSERT ON audit_log_outbox TO {role}")
            fasten.emit(CODE, 2, connection=connection)
            connection.commit()

        assert fasten.flush(20)
        assert [1] == business(postgres_dsn)
        assert ["0", "2"] == [row["target"] for row in rows_of(postgres_dsn)]

    def test_no_store_at_all(self, sqlite_dsn: str) -> None:
        """
        Without a store there is nothing to write through, and nothing is printed.
        """
        start(None)
        with closing(sqlite3.connect(path_of(sqlite_dsn))) as connection:
            with pytest.raises(fasten.AuditStoreError, match="FASTEN_AUDIT_DSN"):
                fasten.emit(CODE, 1, connection=connection)

    def test_a_store_that_cannot_be_asked(self, postgres_dsn: str) -> None:
        """
        Where our own connection gets no answer, the caller's is believed.
        """
        start(postgres_dsn)
        fasten.emit(CODE, 1)
        assert fasten.flush(20)
        fasten.close()
        parts = urlsplit(postgres_dsn)
        closed = parts._replace(netloc=f"{parts.username}@{parts.hostname}:1").geturl()
        start(closed)
        with closing(psycopg.connect(postgres_dsn)) as connection:
            fasten.emit(CODE, 2, connection=connection)
            connection.commit()

        assert [(1,)] == asked(postgres_dsn, "SELECT count(*) FROM audit_log_outbox")


class TestElsewhere:
    """
    A connection to another database than the outbox's would lose the row there.
    """

    def test_another_sqlite_file(self, sqlite_dsn: str, tmp_path: Path) -> None:
        """
        Both files are named, and nothing is made in the wrong one.
        """
        start(sqlite_dsn)
        other = tmp_path / "business.db"
        with closing(sqlite3.connect(other)) as connection:
            connection.execute("CREATE TABLE orders (id)")
            with pytest.raises(fasten.AuditStoreError) as caught:
                fasten.emit(CODE, 1, connection=connection)
            connection.commit()
            tables = connection.execute("SELECT name FROM sqlite_schema").fetchall()

        assert [("orders",)] == tables
        assert str(other) in str(caught.value)
        assert path_of(sqlite_dsn) in str(caught.value)
        assert "FASTEN_OUTBOX_DSN" in str(caught.value)

    def test_a_database_in_memory(self, sqlite_dsn: str) -> None:
        """
        What is in memory can never be moved.
        """
        start(sqlite_dsn)
        engine = sa.create_engine("sqlite://")
        with engine.begin() as connection:
            with pytest.raises(fasten.AuditStoreError, match="in memory"):
                fasten.emit(CODE, 1, connection=connection)
        engine.dispose()

    def test_another_kind_of_database(self, sqlite_dsn: str, postgres_dsn: str) -> None:
        """
        A SQLite transaction cannot feed an outbox in Postgres, nor the other way.
        """
        start(postgres_dsn)
        with closing(sqlite3.connect(path_of(sqlite_dsn))) as connection:
            with pytest.raises(fasten.AuditStoreError, match="FASTEN_OUTBOX_DSN"):
                fasten.emit(CODE, 1, connection=connection)
        start(sqlite_dsn)
        with closing(psycopg.connect(postgres_dsn)) as connection:
            with pytest.raises(fasten.AuditStoreError, match="FASTEN_OUTBOX_DSN"):
                fasten.emit(CODE, 1, connection=connection)

    @pytest.mark.parametrize("has_outbox", [True, False])
    def test_another_postgres_database(
        self, app: str, postgres_dsn: str, postgres_admin_dsn: str, has_outbox: bool
    ) -> None:
        """
        Even one with an outbox of its own is told apart, by the table's number.
        """
        name = f"{urlsplit(postgres_dsn).path[1:]}_other"
        asked(postgres_admin_dsn, f"CREATE DATABASE {name} TEMPLATE template0")
        other = urlsplit(postgres_dsn)._replace(path=f"/{name}").geturl()
        try:
            prepare(other)
            if has_outbox:
                table = "audit_log_outbox (id text, service_id text"
                table += ", source_node_id text, payload text, created_at timestamptz)"
                asked(other, f"CREATE TABLE {table}")
            start(postgres_dsn)
            with closing(psycopg.connect(other)) as connection:
                connection.execute("INSERT INTO orders VALUES (1)")
                with pytest.raises(fasten.AuditStoreError, match=REFUSED) as caught:
                    fasten.emit(CODE, 1, connection=connection)
                connection.commit()

            wanted = "FASTEN_OUTBOX_DSN" if has_outbox else "init-db --outbox"
            assert wanted in str(caught.value)
            assert [1] == business(other)
            if has_outbox:
                assert [(0,)] == asked(other, "SELECT count(*) FROM audit_log_outbox")
        finally:
            fasten.close()
            asked(postgres_admin_dsn, f"DROP DATABASE {name} WITH (FORCE)")

    def test_an_outbox_made_anew(self, postgres_dsn: str) -> None:
        """
        A table that was dropped and made again is found again.
        """
        start(postgres_dsn)
        for number in (1, 2):
            with closing(psycopg.connect(postgres_dsn)) as connection:
                fasten.emit(CODE, number, connection=connection)
                connection.commit()
            assert fasten.flush(20)
            asked(
                postgres_dsn,
                "ALTER TABLE audit_log_outbox RENAME TO old; CREATE TABLE "
                "audit_log_outbox (LIKE old INCLUDING ALL); DROP TABLE old",
            )

        assert ["1", "2"] == [row["target"] for row in rows_of(postgres_dsn)]


class TestTransactionsThatCannot:
    def test_one_that_has_failed_before(self, postgres_dsn: str) -> None:
        """
        A failed transaction takes nothing, and is not blamed on the outbox.
        """
        start(postgres_dsn)
        with closing(psycopg.connect(postgres_dsn)) as connection:
            with pytest.raises(psycopg.errors.UndefinedTable):
                connection.execute("SELECT * FROM nowhere")
            with pytest.raises(fasten.AuditStoreError, match="failed before"):
                fasten.emit(CODE, 1, connection=connection)

    def test_one_that_may_only_read(self, postgres_dsn: str) -> None:
        """
        A read-only transaction refuses, and goes on reading.
        """
        start(postgres_dsn)
        with closing(psycopg.connect(postgres_dsn)) as connection:
            connection.read_only = True
            connection.execute("SELECT 1")
            with pytest.raises(fasten.AuditStoreError, match="read-only"):
                fasten.emit(CODE, 1, connection=connection)

            assert (1,) == connection.execute("SELECT 1").fetchone()

    @pytest.mark.parametrize("is_awaited", [True, False])
    def test_a_refusal_in_each_of_sqlalchemy(
        self, app: str, postgres_dsn: str, is_awaited: bool
    ) -> None:
        """
        A missing right leaves SQLAlchemy's transactions usable; a put-off insert
        fails the commit that it belongs to.
        """
        role = urlsplit(app).username
        asked(postgres_dsn, f"REVOKE ALL ON audit_log_outbox FROM {role}")
        start(postgres_dsn)

        async def use() -> None:
            engine = create_async_engine(url(app, is_async=True))
            async with AsyncSession(engine) as session:
                await session.execute(sa.text("INSERT INTO orders VALUES (1)"))
                if is_awaited:
                    with pytest.raises(fasten.AuditStoreError, match="GRANT INSERT"):
                        await fasten.aemit(CODE, 1, connection=session)
                    await session.commit()
                else:
                    fasten.emit(CODE, 1, connection=session)
                    with pytest.raises(fasten.AuditStoreError, match="GRANT INSERT"):
                        await session.commit()
            await engine.dispose()

        asyncio.run(use())

        assert ([1] if is_awaited else []) == business(postgres_dsn)

    def test_a_locked_sqlite_file(self, sqlite_dsn: str) -> None:
        """
        A file that another writer holds is said to be locked; nothing else changes.
        """
        start(sqlite_dsn)
        prepare(sqlite_dsn)
        holder = sqlite3.connect(path_of(sqlite_dsn), isolation_level=None)
        waiter = sqlite3.connect(path_of(sqlite_dsn), timeout=0)
        with closing(holder), closing(waiter):
            holder.execute("BEGIN IMMEDIATE")
            with pytest.raises(fasten.AuditStoreError, match="locked"):
                fasten.emit(CODE, 1, connection=waiter)

            assert not waiter.in_transaction

    def test_a_connection_that_is_closed(self, postgres_dsn: str) -> None:
        """
        A closed connection is an AuditStoreError like any other.
        """
        start(postgres_dsn)
        connection = psycopg.connect(postgres_dsn)
        connection.close()
        with pytest.raises(fasten.AuditStoreError, match=REFUSED):
            fasten.emit(CODE, 1, connection=connection)


class TestMistakes:
    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (lambda engine: engine, "engine.begin"),
            (lambda engine: object(), "builtins.object"),
            (orm.sessionmaker, "take one from it"),
            (lambda engine: engine.raw_connection().cursor(), ".connection"),
        ],
    )
    def test_what_is_no_connection(
        self, sqlite_dsn: str, given: Any, said: str
    ) -> None:
        """
        A TypeError names what was given and what could have been.
        """
        start(sqlite_dsn)
        engine = sa.create_engine(url(sqlite_dsn))
        with pytest.raises(TypeError, match=said):
            fasten.emit(CODE, 1, connection=given(engine))
        engine.dispose()

    def test_a_session_of_several_engines(self, sqlite_dsn: str) -> None:
        """
        Which of them is meant has to be said.
        """
        start(sqlite_dsn)
        with pytest.raises(TypeError, match="bind_arguments"):
            fasten.emit(CODE, 1, connection=orm.Session(binds={}))

    def test_what_must_be_awaited(self, postgres_dsn: str) -> None:
        """
        Emit names aemit for psycopg's AsyncConnection, also in a test's capture.
        """

        async def use() -> None:
            connection = await psycopg.AsyncConnection.connect(postgres_dsn)
            with pytest.raises(TypeError, match=r"await fasten\.aemit"):
                fasten.emit(CODE, 1, connection=connection)
            with fasten.testing.capture(), pytest.raises(TypeError, match="aemit"):
                fasten.emit(CODE, 1, connection=connection)
            await connection.close()

        start(postgres_dsn)
        asyncio.run(use())

    @pytest.mark.parametrize("is_awaited", [True, False])
    def test_not_strict(self, sqlite_dsn: str, is_awaited: bool) -> None:
        """
        With FASTEN_STRICT=off the row is stored on its own, marked and counted.
        """
        start(sqlite_dsn, strict=False)
        if is_awaited:
            asyncio.run(fasten.aemit(CODE, 1, detail={"a": 1}, connection=object()))
        else:
            fasten.emit(CODE, 1, detail={"a": 1}, connection=object())
        assert fasten.flush(20)
        (row,) = rows_of(sqlite_dsn)

        detail = json.loads(row["detail"])
        assert {"a": 1} == detail["detail"]
        assert "connection=" in detail["_mistake"]
        assert 1 == fasten.stats()["mistakes"]


OBJECTIONS = {
    "postgresql": "ALTER TABLE audit_log ADD CHECK (target <> '7')",
    "sqlite": "CREATE TRIGGER objection BEFORE INSERT ON audit_log "
    "WHEN NEW.target = '7' BEGIN SELECT RAISE(ABORT, 'not this one'); END",
}
FOREIGN = json.dumps(["evt-1", 1, *[""] * 19])
TIMELESS = json.dumps(["evt-0", 10**40, *[""] * 19])
HALF = json.dumps(["evt-0", 1, "\ud800", *[""] * 18])
NUL = json.dumps(["evt-0", 1, "\0", *[""] * 18])


class TestPoison:
    @pytest.mark.parametrize(
        "payload", ["", "[]", "no json", FOREIGN, TIMELESS, HALF, NUL, '{"a": 1}', "7"]
    )
    def test_a_row_that_nothing_can_be_made_of(
        self, store_dsn: str, tmp_path: Path, payload: str
    ) -> None:
        """
        What somebody else put into the outbox is set aside, and holds nobody up.
        """
        spool_dir = str(tmp_path / "spool")
        start(store_dsn, spool_dir=spool_dir)
        engine = sa.create_engine(url(store_dsn))
        for number in (1, 2):
            with engine.begin() as connection:
                fasten.emit(CODE, number, connection=connection)
                if number == 1:
                    connection.execute(
                        sa.text(
                            "INSERT INTO audit_log_outbox (id, service_id, "
                            "source_node_id, payload, created_at) VALUES "
                            "('evt-0', 'svc', 'n', :payload, '2026-01-01')"
                        ),
                        {"payload": payload},
                    )
        engine.dispose()
        wait_until(lambda: fasten.stats()["quarantined"], 20)
        assert fasten.flush(20)

        codes = [(row["code"], row["target"]) for row in rows_of(store_dsn)]
        assert {(CODE, "1"), (CODE, "2"), ("AUDIT_ROW_QUARANTINED", "evt-0")} == {
            *codes
        }
        (kept,) = fasten.spool.quarantined(Path(spool_dir))
        assert ("evt-0", payload) == (kept.row[0], kept.row[-1])

    def test_a_row_that_the_store_refuses(self, store_dsn: str, tmp_path: Path) -> None:
        """
        One bad row among good ones is found by halving, and set aside.
        """
        start(store_dsn, spool_dir=str(tmp_path / "spool"))
        fasten.emit(CODE, "first")
        assert fasten.flush(20)
        engine = sa.create_engine(url(store_dsn))
        with engine.begin() as connection:
            connection.execute(sa.text(OBJECTIONS[engine.dialect.name]))
        with engine.begin() as connection:
            for number in range(20):
                fasten.emit(CODE, number, connection=connection)
        engine.dispose()
        wait_until(lambda: fasten.stats()["quarantined"], 20)
        assert fasten.flush(20)

        stored = [row["target"] for row in rows_of(store_dsn) if row["code"] == CODE]
        assert ["first", *(str(n) for n in range(20) if n != 7)] == stored
        (kept,) = fasten.spool.quarantined(tmp_path / "spool")
        assert (CODE, "7") == (kept.row[2], kept.row[14])
        assert "ok" == fasten.health()["state"]


class TestCapture:
    def test_sees_rows_at_once(self) -> None:
        """
        capture() needs no database: such rows are there at once, and pending.
        """
        with fasten.testing.capture() as trail:
            fasten.emit(CODE, 1, connection=object())
            asyncio.run(fasten.aemit(CODE, 2, connection=object()))
            fasten.emit(CODE, 3)

        pending = [row.get("pending", False) for row in trail.audit]
        assert [True, True, False] == pending
