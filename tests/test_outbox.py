# SPDX-License-Identifier: Apache-2.0
"""
Rows in callers' own transactions: they are there if, and only if, those commit.

Who else writes, moves and dies meanwhile is in `test_outbox_processes`.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

import fasten
from fasten.codes import Meta
from tests import postgres
from tests.checker import faults, rows_of
from tests.outside import run_python, wait_until
from tests.transactions import (
    CODE,
    WAYS,
    CoreConnection,
    DjangoConnection,
    Order,
    Way,
    business,
    opened,
    path_of,
    prepare,
    url,
)

PAIRS = [
    pytest.param(way, store, id=f"{way.__name__}-{store}")
    for way in WAYS
    for store in way.stores  # type: ignore[attr-defined]
]


def start(dsn: str, **settings: Any) -> fasten.Engine:
    """
    Run fasten on *dsn*, quietly.
    """
    given = {"service_id": "svc", "node_id": "host-01", "stdout": "", "audit_dsn": dsn}
    return fasten.init(**given | settings)


@pytest.fixture
def running(store_dsn: str) -> str:
    """
    Return the DSN of a store that fasten runs on and the business has a table in.
    """
    prepare(store_dsn)
    start(store_dsn)
    return store_dsn


@pytest.fixture
def on_postgres(postgres_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """
    Return a connection to the Postgres store that fasten runs on.
    """
    prepare(postgres_dsn)
    start(postgres_dsn)
    with closing(psycopg.connect(postgres_dsn)) as connection:
        yield connection


@pytest.fixture
def dsn(request: pytest.FixtureRequest) -> str:
    """
    Return the DSN of the store that a pair names, with fasten running on it.
    """
    found: str = request.getfixturevalue(f"{request.param}_dsn")
    prepare(found)
    start(found)
    return found


@pytest.fixture
def way(request: pytest.FixtureRequest, dsn: str) -> Iterator[Way]:
    """
    Return an open connection of one kind to the store.
    """
    with opened(request.param, dsn) as made:
        yield made


def targets(dsn: str) -> list[str]:
    """
    Return the targets of what is stored, in order, once all is moved.
    """
    assert fasten.flush(20)
    if fasten.query().completeness == "store-degraded":
        return []  # nothing was ever stored: there are no tables
    rows = rows_of(dsn)
    assert [] == faults(rows)
    return [row["target"] for row in rows]


@pytest.mark.parametrize(("way", "dsn"), PAIRS, indirect=True)
class TestEachKind:
    def test_commit_leaves_exactly_one(self, way: Way, dsn: str) -> None:
        """
        The row is in the store once the transaction has committed, and once only.
        """
        way.do("write 1", "emit 1", "commit")

        assert ["1"] == targets(dsn)
        assert [1] == business(dsn)
        assert ["1"] == targets(dsn)

    def test_roll_back_leaves_nothing(self, way: Way, dsn: str) -> None:
        """
        Neither the business nor the row outlives a roll-back.
        """
        way.do("write 1", "emit 1", "roll back")

        assert [] == targets(dsn)
        assert [] == business(dsn)

    def test_emit_may_come_first(self, way: Way, dsn: str) -> None:
        """
        An emit before the first write begins the transaction, and ends none.
        """
        way.do("emit 1", "write 1", "roll back")

        assert [] == targets(dsn)
        assert [] == business(dsn)

    def test_savepoints_count(self, way: Way, dsn: str) -> None:
        """
        What was emitted behind a savepoint goes with it, what was before it stays.
        """
        way.do("write 1", "emit 1", "save", "write 2", "emit 2", "undo")
        way.do("write 3", "emit 3", "save", "write 4", "emit 4", "keep", "commit")

        assert ["1", "3", "4"] == targets(dsn)
        assert [1, 3, 4] == business(dsn)


class TestAutocommit:
    """
    Where each statement is a transaction of its own, so is the row.
    """

    @pytest.mark.parametrize("is_psycopg", [True, False])
    def test_drivers(self, request: Any, is_psycopg: bool) -> None:
        """
        The row is stored at once, through psycopg and sqlite3 in autocommit.
        """
        dsn = request.getfixturevalue("postgres_dsn" if is_psycopg else "sqlite_dsn")
        start(dsn)
        connection: Any = (
            psycopg.connect(dsn, autocommit=True)
            if is_psycopg
            else sqlite3.connect(path_of(dsn), isolation_level=None)
        )
        with closing(connection):
            fasten.emit(CODE, 1, connection=connection)

            assert ["1"] == targets(dsn)

    def test_an_engine_of_sqlalchemy(self, running: str) -> None:
        """
        create_engine(isolation_level="AUTOCOMMIT") and execution options are seen.
        """
        whole = sa.create_engine(url(running), isolation_level="AUTOCOMMIT")
        part = sa.create_engine(url(running))
        with whole.connect() as connection:
            fasten.emit(CODE, 1, connection=connection)
        with part.connect().execution_options(isolation_level="AUTOCOMMIT") as one:
            fasten.emit(CODE, 2, connection=one)
        whole.dispose()
        part.dispose()

        assert ["1", "2"] == targets(running)

    def test_django_outside_atomic(self, running: str) -> None:
        """
        Django without atomic() commits each statement, so the row too.
        """
        with opened(DjangoConnection, running) as way:
            way.do("commit", "write 1", "emit 1")

            assert ["1"] == targets(running)

    def test_a_plain_emit_on_an_async_connection_is_refused(self, running: str) -> None:
        """
        In AUTOCOMMIT nothing would ever do the insert that emit() puts off.
        """

        async def emit() -> None:
            engine = create_async_engine(
                url(running, is_async=True), isolation_level="AUTOCOMMIT"
            )
            async with engine.connect() as connection:
                with pytest.raises(fasten.AuditStoreError, match="aemit"):
                    fasten.emit(CODE, 1, connection=connection)
                await fasten.aemit(CODE, 2, connection=connection)
            await engine.dispose()

        asyncio.run(emit())

        assert ["2"] == targets(running)


class TestTransactionsOfAllKinds:
    def test_two_phases(self) -> None:
        """
        A prepared transaction keeps the row until it is committed, whoever does that.
        """
        with postgres.private_server(settings=("max_prepared_transactions=4",)) as one:
            dsn = one.dsn()
            start(dsn)
            with closing(psycopg.connect(dsn)) as connection:
                connection.tpc_begin("t-1")
                fasten.emit(CODE, 1, connection=connection)
                connection.tpc_prepare()

                assert [] == targets(dsn)
                connection.tpc_commit()
            self._commit_in_two_phases(url(dsn))

            assert ["1", "2"] == targets(dsn)
            fasten.close()

    def _commit_in_two_phases(self, address: str) -> None:
        engine = sa.create_engine(address)
        with engine.connect() as connection:
            transaction = connection.begin_twophase()
            fasten.emit(CODE, 2, connection=connection)
            transaction.prepare()
            transaction.commit()
        engine.dispose()

    def test_blocks_of_psycopg(self, on_postgres: Any, postgres_dsn: str) -> None:
        """
        transaction() blocks, nested ones too, take their rows with them.
        """
        with on_postgres.transaction():
            fasten.emit(CODE, 1, connection=on_postgres)
            with suppress(ZeroDivisionError), on_postgres.transaction():
                fasten.emit(CODE, 2, connection=on_postgres)
                raise ZeroDivisionError
            fasten.emit(CODE, 3, connection=on_postgres)

        assert ["1", "3"] == targets(postgres_dsn)

    def test_a_connection_that_goes_back_to_its_pool(self, running: str) -> None:
        """
        What was not committed is gone, and the pool's next user has nothing of it.
        """
        engine = sa.create_engine(url(running), poolclass=sa.pool.QueuePool)
        for number in (1, 2):
            with engine.connect() as connection:
                fasten.emit(CODE, number, connection=connection)
                if number == 2:
                    connection.commit()
        engine.dispose()

        assert ["2"] == targets(running)

    def test_registries_of_sessions(self, running: str) -> None:
        """
        scoped_session stands for the session of this thread.
        """
        engine = sa.create_engine(url(running))
        registry = orm.scoped_session(orm.sessionmaker(engine))
        fasten.emit(CODE, 1, connection=registry)
        registry.commit()
        registry.remove()
        engine.dispose()

        assert ["1"] == targets(running)

    def test_the_default_connection_of_django(self, running: str) -> None:
        """
        `django.db.connection` stands for this thread's connection.
        """
        with opened(DjangoConnection, running) as way:
            from django.utils.connection import ConnectionProxy

            proxy = ConnectionProxy(way.handler(), "business")
            fasten.emit(CODE, 1, connection=proxy)
            way.commit()

        assert ["1"] == targets(running)

    def test_what_a_session_has_not_flushed_stays_so(self, running: str) -> None:
        """
        Emitting does not flush the session.
        """
        engine = sa.create_engine(url(running))
        with orm.Session(engine) as session:
            order = Order(id=7)
            session.add(order)
            fasten.emit(CODE, 7, connection=session)

            assert sa.inspect(order).pending
            session.commit()
        engine.dispose()
        assert ["7"] == targets(running)
        assert [7] == business(running)

    def test_a_session_that_is_left_without_commit(self, running: str) -> None:
        """
        What plain emit put off in an AsyncSession dies with its transaction.
        """

        async def leave() -> None:
            engine = create_async_engine(url(running, is_async=True))
            async with AsyncSession(engine) as session:
                fasten.emit(CODE, 1, connection=session)
            async with AsyncSession(engine) as session, session.begin():
                fasten.emit(CODE, 2, connection=session)
            await engine.dispose()

        asyncio.run(leave())

        assert ["2"] == targets(running)

    def test_codes_that_must_be_stored(self, running: str) -> None:
        """
        `on_failure: raise` is met by the insert: the row comes with the commit.
        """
        fasten.codes.register("bank", {"MONEY_MOVED": Meta(on_failure="raise")})
        engine = sa.create_engine(url(running))
        with engine.connect() as connection:
            fasten.emit("MONEY_MOVED", "a", connection=connection)
            connection.rollback()
            fasten.emit("MONEY_MOVED", "b", connection=connection)
            connection.commit()
        engine.dispose()

        assert ["b"] == targets(running)

    def test_strategy_raise(self, store_dsn: str) -> None:
        """
        Nor does the strategy `raise` write the row beside the transaction.
        """
        prepare(store_dsn)
        start(store_dsn, audit_store_failure_strategy="raise")
        with opened(CoreConnection, store_dsn) as way:
            way.do("emit 1", "roll back", "emit 2", "commit")

        assert ["2"] == targets(store_dsn)

    def test_every_anchor_arrives(self, running: str) -> None:
        """
        A row that comes through a transaction is the row that emit was told.
        """
        engine = sa.create_engine(url(running))
        given = {
            "actor": "ann",
            "outcome": "denied",
            "reason": 'a "reason"\n\\N\x01 é 😀',
            "tenant_id": "acme",
            "client": "10.0.0.1",
        }
        with fasten.bind("req-1"), engine.begin() as connection:
            id_ = fasten.emit(
                CODE, "x", detail={"n": [1, None]}, connection=connection, **given
            )
        engine.dispose()
        fasten.flush(20)
        (row,) = rows_of(running)

        assert given == {name: row[name] for name in given}
        assert (id_, "req-1", '{"n":[1,null]}') == (
            row["id"],
            row["request_id"],
            row["detail"],
        )
        assert [] == faults([row])


class TestSoon:
    @pytest.mark.parametrize(("way", "dsn"), PAIRS, indirect=True)
    def test_a_commit_wakes_the_mover(self, way: Way, dsn: str) -> None:
        """
        Nobody has to flush: the row is in the store within a second of its commit.
        """
        way.do("write 1", "emit 1", "commit")

        wait_until(lambda: fasten.stats()["moved"], 2)

    def test_what_a_dead_process_left_is_moved(
        self, store_dsn: str, tmp_path: Path
    ) -> None:
        """
        A process that was killed after its COMMIT leaves its rows to the next one.
        """
        prepare(store_dsn)
        done = run_python(
            """
            import os, sys, fasten
            from tests.transactions import CoreConnection
            engine = fasten.init(
                service_id="svc", node_id="n", audit_dsn=sys.argv[1], stdout="",
                spool_dir=sys.argv[2],
            )
            engine.delivery.drainer._delivering.acquire()
            CoreConnection(sys.argv[1]).do("write 1", "emit 1", "commit")
            os.kill(os.getpid(), 9)
            """,
            store_dsn,
            str(tmp_path / "spool"),
        )

        assert "" == done.stderr
        start(store_dsn, spool_dir=str(tmp_path / "spool"))
        wait_until(lambda: fasten.stats()["moved"], 10)

        assert ["1"] == [row["target"] for row in rows_of(store_dsn)]
