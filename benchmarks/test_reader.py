# SPDX-License-Identifier: Apache-2.0
"""
Rows 14 and 17: reading at a million rows, by request id and page by page.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fasten
from benchmarks.reference import median, settle
from benchmarks.test_emit import running
from fasten import reader
from fasten.rows import (
    AUDIT_COLUMNS,
    UlidMinter,
    canonical_json,
    encode_cursor,
    format_timestamp,
)

ROWS = 1_000_000
PER_REQUEST = 4
PAGE = 100
ROUNDS = 7
ASKED = 300

START_NS = 1_776_861_296_000_000_000


def request_id(number: int) -> str:
    """
    Return the id that request *number* was given: in order of time, as minted ones are.
    """
    return f"{START_NS // 10**6 + number:012x}7{number * 7919 % 4093:03x}{'8' * 16}"


def stored_rows() -> Iterator[tuple[Any, ...]]:
    """
    Yield a million rows as their columns; every value differs from row to row.
    """
    mint = UlidMinter(bytes)
    for n in range(ROWS):
        ns = START_NS + n * 250_000
        id_ = mint(ns)
        detail = canonical_json(
            {
                "amount": n * 37 % 100_003 / 100,
                "currency": "EUR",
                "items": n % 17,
                "note": f"left at door {n}",
                "express": n % 3 == 0,
                "ship": {"city": f"town-{n % 8191}", "zip": str(10_000 + n % 89_999)},
            }
        )
        values = {
            "wire_version": "2",
            "id": id_,
            "origin_id": id_,
            "timestamp": format_timestamp(ns // 1000),
            "monotonic_seq": n + 10,
            "code": "ORDER_PLACED",
            "action": "placed",
            "severity": "info",
            "outcome": "success",
            "actor": f"u-{n * 104_729 % 99_991}",
            "actor_kind": "user",
            "service_id": "bench",
            "source_node_id": "bench-1",
            "target": f"ord-{n * 7919 % 9_999_991}",
            "category": "commerce",
            "domain": "commerce",
            "method": "http",
            "request_id": request_id(n // PER_REQUEST),
            "detail": detail,
            "retention_class": "long",
            "stored_at": format_timestamp(ns // 1000 + 3000),
            "canonical_form_id": "3",
            "prev_hash": f"{n * 2654435761 % 2**64:064x}",
            "hash": f"{(n + 1) * 2654435761 % 2**64:064x}",
            "salt": f"{n * 40503 % 2**64:032x}",
            "commitment": f"{n * 69069 % 2**64:064x}",
        }
        yield tuple(values.get(name) for name in AUDIT_COLUMNS)


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    Return a store of fasten's own making, filled with a million rows.
    """
    path = tmp_path_factory.mktemp("million") / "bench.db"
    fasten.init(service_id="bench", audit_dsn=f"sqlite:///{path}", stdout="")
    fasten.emit("ORDER_PLACED", "warm-up")
    assert fasten.flush(30)
    fasten.close()
    connection = sqlite3.connect(path)
    marks = ", ".join("?" * len(AUDIT_COLUMNS))
    connection.execute("DELETE FROM audit_log")
    connection.executemany(f"INSERT INTO audit_log VALUES ({marks})", stored_rows())
    connection.commit()
    connection.close()
    return path


def times_s(call: Callable[[int], Any], numbers: range) -> list[float]:
    """
    Time each call, in seconds.
    """
    taken = []
    for number in numbers:
        before = time.perf_counter()
        call(number)
        taken.append(time.perf_counter() - before)
    return taken


@pytest.mark.slow
def test_request_id(benchmark: Any, figure: Callable[..., None], million: Path) -> None:
    """
    Row 14: the rows of one request among a million, against raw `sqlite3`.
    """
    raw = sqlite3.connect(million)
    sql = "SELECT * FROM audit_log WHERE request_id = ? ORDER BY id DESC LIMIT 101"
    step = ROWS // PER_REQUEST // (ROUNDS * ASKED)

    def by_hand(number: int) -> None:
        assert len(raw.execute(sql, (request_id(number),)).fetchall()) == PER_REQUEST

    def by_library(number: int) -> None:
        assert len(fasten.query(request_id=request_id(number)).rows) == PER_REQUEST

    with running(audit_dsn=f"sqlite:///{million}"):
        for turn in range(ROUNDS):
            numbers = range(turn * step, ROWS // PER_REQUEST, ROUNDS * step)
            settle()
            by_hand(0), by_library(0)
            theirs = times_s(by_hand, numbers)
            figure("14", median(times_s(by_library, numbers)) / median(theirs))
        benchmark.pedantic(by_library, args=(1000,), rounds=200)
    raw.close()


@pytest.mark.slow
def test_keyset_pages(
    benchmark: Any, figure: Callable[..., None], million: Path
) -> None:
    """
    Row 17: page 10,000 of a million rows through the reader, against page 1.
    """
    router = reader.router("none")

    def read(cursor: str) -> None:
        response = router.handle("GET", "/audit", f"limit={PAGE}{cursor}")
        assert response.status == 200
        assert isinstance(response.body, bytes)
        assert response.body.count(b'"wire_version"') == PAGE

    with running(audit_dsn=f"sqlite:///{million}"):
        connection = sqlite3.connect(million)
        (before,) = connection.execute(
            "SELECT id FROM audit_log ORDER BY id LIMIT 1 OFFSET ?", (PAGE,)
        ).fetchone()
        connection.close()
        last = f"&cursor={encode_cursor('audit', before)}"
        for _ in range(ROUNDS):
            settle()
            first = median(times_s(lambda _: read(""), range(50)))
            figure("17", median(times_s(lambda _: read(last), range(50))) / first)
        benchmark.pedantic(read, args=(last,), rounds=50)
