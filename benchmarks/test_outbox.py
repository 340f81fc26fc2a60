# SPDX-License-Identifier: Apache-2.0
"""
What a row inside the caller's own transaction costs, beside the caller's own INSERT.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

import fasten
from benchmarks.reference import events, median, settle
from benchmarks.test_emit import running
from tests.transactions import (
    CoreConnection,
    DjangoConnection,
    OrmSession,
    Psycopg,
    PsycopgAsync,
    Sqlite3,
    opened,
)

ROUNDS = 7
EACH = 300
TABLE = (
    "CREATE TABLE mine (id text PRIMARY KEY, b text, c text, d text, e text, f text)"
)
COLUMNS = ("id", "b", "c", "d", "e", "f")


def statement(way: Any) -> Callable[[tuple[str, ...]], Any]:
    """
    Return the caller's own INSERT of a row of six columns, as its kind spells it.
    """
    into = f"INSERT INTO mine ({', '.join(COLUMNS)}) VALUES"
    if isinstance(way, DjangoConnection):
        return lambda row: way.connection.cursor().execute(
            f"{into} (%s{', %s' * 5})", row
        )
    if isinstance(way, CoreConnection):
        made = sa.text(f"{into} ({', '.join(f':{c}' for c in COLUMNS)})")
        return lambda row: way.connection.execute(
            made, dict(zip(COLUMNS, row, strict=True))
        )
    if isinstance(way, Sqlite3):
        return lambda row: way.connection.execute(f"{into} (?{', ?' * 5})", row)
    if isinstance(way, PsycopgAsync):
        return lambda row: way.run(
            way.connection.execute(f"{into} (%s{', %s' * 5})", row)
        )
    return lambda row: way.connection.execute(f"{into} (%s{', %s' * 5})", row)


def emitter(way: Any) -> Callable[[dict[str, Any]], Any]:
    """
    Return what records an event in the transaction of *way*.
    """
    if isinstance(way, PsycopgAsync):
        return lambda event: way.run(fasten.aemit(**event, connection=way.connection))
    return lambda event: fasten.emit(**event, connection=way.connection)


def per_call_us(call: Callable[[Any], Any], given: list[Any]) -> float:
    """
    Return the microseconds that one call takes, on the average of a round.
    """
    settle()
    before = time.perf_counter()
    for each in given:
        call(each)
    return (time.perf_counter() - before) / len(given) * 1e6


WAYS = [
    (Sqlite3, "sqlite"),
    (CoreConnection, "sqlite"),
    (OrmSession, "sqlite"),
    (DjangoConnection, "sqlite"),
    (Psycopg, "postgres"),
    (PsycopgAsync, "postgres"),
    (CoreConnection, "postgres"),
    (OrmSession, "postgres"),
    (DjangoConnection, "postgres"),
]


@pytest.mark.parametrize(
    ("way", "store"), WAYS, ids=lambda given: getattr(given, "__name__", given)
)
def test_beside_the_callers_own_insert(
    benchmark: Any, request: Any, tmp_path: Any, capsys: Any, way: Any, store: str
) -> None:
    """
    One emit(connection=) against one INSERT of the caller, in the same transaction.
    """
    dsn = f"sqlite:///{tmp_path / 'bench.db'}"
    if store == "postgres":
        dsn = request.getfixturevalue("durable_postgres")
    ratios, inserts, emits = [], [], []
    with running(audit_dsn=dsn), opened(way, dsn) as mine:
        mine.sql(TABLE)
        insert, emit = statement(mine), emitter(mine)
        for number in range(ROUNDS):
            start = 10**7 + number * EACH
            given = list(events(EACH, start=start))
            rows = [(f"{start + n}", *["value of a column"] * 5) for n in range(EACH)]
            inserts.append(per_call_us(insert, rows))
            emits.append(per_call_us(emit, given))
            ratios.append(emits[-1] / inserts[-1])
        mine.sql("DROP TABLE mine")
        mine.roll_back()
    benchmark.pedantic(lambda: None, rounds=1)
    with capsys.disabled():
        print(
            f"\n{way.__name__:18}{store:10}INSERT {median(inserts):7.0f} us   "
            f"emit(connection=) {median(emits):7.0f} us   ratio {median(ratios):5.2f}"
        )
