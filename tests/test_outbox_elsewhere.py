# SPDX-License-Identifier: Apache-2.0
"""
Transactions in a database of the business, rows in another: FASTEN_OUTBOX_DSN.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

import fasten
from tests.checker import faults, rows_of
from tests.outside import wait_until
from tests.transactions import (
    CoreConnection,
    OrmSession,
    business,
    opened,
    path_of,
    prepare,
    waiting,
)

BOTH = [
    pytest.param((one, other), id=f"{one}-to-{other}")
    for one in ("sqlite", "postgres")
    for other in ("sqlite", "postgres")
]


@pytest.fixture
def other_postgres_dsn(postgres_dsn: str, postgres_admin_dsn: str) -> Any:
    """
    Return the DSN of a second empty Postgres database.
    """
    name = f"{urlsplit(postgres_dsn).path[1:]}_business"
    with psycopg.connect(postgres_admin_dsn, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    yield urlsplit(postgres_dsn)._replace(path=f"/{name}").geturl()
    fasten.close()
    with psycopg.connect(postgres_admin_dsn, autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """
    Return the DSNs of the business and of the audit store, and run fasten on them.
    """
    kind, audit_kind = request.param
    audit: str = request.getfixturevalue(f"{audit_kind}_dsn")
    mine = f"sqlite:///{tmp_path / 'business.db'}"
    if kind == "postgres":
        mine = request.getfixturevalue("other_postgres_dsn")
    prepare(mine)
    start(mine, audit)
    return mine, audit


def start(mine: str, audit: str, **settings: Any) -> fasten.Engine:
    """
    Run fasten with transactions in *mine* and rows in *audit*, quietly.
    """
    given = {"service_id": "svc", "node_id": "n", "stdout": "", "outbox_dsn": mine}
    return fasten.init(**given | {"audit_dsn": audit} | settings)


@pytest.mark.parametrize("pair", BOTH, indirect=True)
class TestEachPair:
    def test_rows_follow_their_transactions(self, pair: tuple[str, str]) -> None:
        """
        What was committed there arrives here, in order, and nothing else does.
        """
        with opened(OrmSession, pair[0]) as way:
            way.do("write 1", "emit 1", "commit", "write 2", "emit 2", "roll back")
            way.do("write 3", "emit 3", "save", "emit 4", "undo", "commit")
        assert fasten.flush(20)

        rows = rows_of(pair[1])
        assert [] == faults(rows)
        assert ["1", "3"] == [row["target"] for row in rows]
        assert [1, 3] == business(pair[0])
        assert 0 == waiting(pair[0])

    def test_a_row_that_arrived_and_was_not_deleted(
        self, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        A mover that dies between the two commits leaves no twin behind.
        """
        repository = fasten.engine.default().delivery._outbox_store()  # type: ignore[union-attr]
        delete: Callable[..., int] = repository._delete
        fails = iter([True])

        def die_once(*given: Any) -> int:
            if next(fails, False):
                raise ConnectionError("the mover dies here")
            return delete(*given)

        monkeypatch.setattr(repository, "_delete", die_once)
        with opened(CoreConnection, pair[0]) as way:
            way.do("write 1", "emit 1", "commit")
        assert fasten.flush(20)

        assert ["1"] == [row["target"] for row in rows_of(pair[1])]
        assert 0 == waiting(pair[0])
        assert 1 == fasten.stats()["retried"]

    def test_a_row_that_another_moved_and_that_expired(
        self, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        A mover that slept since it read its rows stores none that are gone.
        """
        repository = fasten.engine.default().delivery._outbox_store()  # type: ignore[union-attr]
        left = repository._still_here

        def late(ids: list[str]) -> frozenset[str]:
            with_another = (
                sqlite3.connect(path_of(pair[0]))
                if pair[0].startswith("sqlite")
                else psycopg.connect(pair[0])
            )
            with closing(with_another) as other:
                other.execute("DELETE FROM audit_log_outbox")
                other.commit()
            return left(ids)

        monkeypatch.setattr(repository, "_still_here", late)
        with opened(CoreConnection, pair[0]) as way:
            way.do("write 1", "emit 1", "commit")
        assert fasten.flush(20)

        assert [] == rows_of(pair[1])


def test_a_file_of_the_business_stays_as_it_is(tmp_path: Path, sqlite_dsn: str) -> None:
    """
    Fasten is a guest there: the journal mode of the file is its owner's.
    """
    mine = f"sqlite:///{tmp_path / 'business.db'}"
    prepare(mine)
    start(mine, sqlite_dsn)
    with opened(CoreConnection, mine) as way:
        way.do("emit 1", "commit")
    assert fasten.flush(20)

    with closing(sqlite3.connect(path_of(mine))) as connection:
        assert ("delete",) == connection.execute("PRAGMA journal_mode").fetchone()
    assert 1 == len(rows_of(sqlite_dsn))


def test_a_missing_file_of_the_business_is_not_made(
    tmp_path: Path, sqlite_dsn: str
) -> None:
    """
    Nor does a wrong FASTEN_OUTBOX_DSN leave an empty file behind.
    """
    start(f"sqlite:///{tmp_path / 'nowhere.db'}", sqlite_dsn)
    fasten.engine.default().delivery.outbox.mover.hurry()  # type: ignore[union-attr]
    fasten.emit("ORDER_PLACED", 1)
    assert fasten.flush(20)

    assert not (tmp_path / "nowhere.db").exists()


def test_the_audit_store_is_down(tmp_path: Path) -> None:
    """
    Transactions go on while the audit store is away; rows wait, and health says why.
    """
    mine = f"sqlite:///{tmp_path / 'business.db'}"
    prepare(mine)
    start(mine, "postgres://nobody@127.0.0.1:1/away", spool_dir=str(tmp_path / "spool"))
    with opened(OrmSession, mine) as way:
        way.do("write 1", "emit 1", "commit", "write 2", "emit 2", "commit")
    wait_until(lambda: fasten.health()["state"] != "ok", 10)

    assert [1, 2] == business(mine)
    assert 2 == waiting(mine)
    assert any("outbox: " in reason for reason in fasten.health()["reasons"])


@pytest.mark.parametrize("table", ["Trail", "trail"])
def test_names_of_tables(sqlite_dsn: str, table: str) -> None:
    """
    The outbox is named after the table of FASTEN_OUTBOX_DSN, whatever its case.
    """
    start(f"{sqlite_dsn}?table={table}", f"{sqlite_dsn}?table={table}")
    with opened(CoreConnection, sqlite_dsn) as way:
        way.do("emit 1", "commit")
    assert fasten.flush(20)

    assert 1 == len(rows_of(sqlite_dsn, table))


def test_a_schema_of_postgres(postgres_dsn: str) -> None:
    """
    `?table=schema.table` puts the outbox into that schema too, quoted where need be.
    """
    with psycopg.connect(postgres_dsn, autocommit=True) as owner:
        owner.execute('CREATE SCHEMA "Audit"')
    dsn = f"{postgres_dsn}?table=Audit.Trail"
    start(dsn, dsn)
    with closing(psycopg.connect(postgres_dsn)) as connection:
        fasten.emit("ORDER_PLACED", 1, connection=connection)
        connection.commit()
    assert fasten.flush(20)

    assert 1 == len(rows_of(postgres_dsn, '"Audit"."Trail"'))
