# SPDX-License-Identifier: Apache-2.0
"""
`make bench-growth`: emit, drain, query, verify and sweep as a store grows.

Microseconds a row, or a query, at 10 k, 100 k and 1 M rows on both stores. Nothing
but the depth of the indexes may grow. Prints a table and writes growth.json;
`ARGS="10000 100000"` names other sizes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fasten
from benchmarks.reference import events, latencies_ns, machine, median, settle
from benchmarks.test_store import held_back
from fasten.codes import Meta
from tests.postgres import private_server

SIZES = (10_000, 100_000, 1_000_000)
PART = 5_000
ROUNDS = 3
PER_REQUEST = 4
QUERIES = 200
RESULTS = Path(__file__).with_name("growth.json")
MEASURED = ("emit_us", "drain_us", "query_us", "verify_us", "sweep_us")
PRINTED = "{:10}{:>10}" + "{:>12}" * len(MEASURED)


class Store:
    """
    One store that grows, and how many rows it was given.
    """

    def __init__(self, dsn: str) -> None:
        fasten.init(
            service_id="growth",
            node_id="n",
            audit_dsn=dsn,
            stdout="",
            queue_capacity=4 * PART,
            spool_max_bytes="1GiB",
        )
        fasten.codes.register("growth", {"ROW_EXPIRES": Meta(retention_class="short")})
        self.size = 0
        self.asked = ""

    def add(self, rows: int, code: str | None = None) -> list[int]:
        """
        Emit so many rows, four a request; return how long each call took.
        """
        taken: list[int] = []
        given = list(events(rows, start=self.size))
        settle()
        for at in range(0, rows, PER_REQUEST):
            part = [{**e, "code": code or e["code"]} for e in given[at : at + 4]]
            with fasten.bind() as cell:
                taken += latencies_ns(fasten, "emit", part)
            self.asked = cell.request_id
        self.size += rows
        return taken

    def grow(self, size: int) -> None:
        """
        Add rows until there are *size*.
        """
        while self.size < size:
            self.add(min(2 * PART, size - self.size))
            assert fasten.flush(300)

    def figures(self) -> dict[str, float]:
        """
        Measure the store at its present size; the best of the rounds, where there are.
        """
        emits, drains = [], []
        for _ in range(ROUNDS):
            with held_back():
                emits.append(median(self.add(PART)) / 1000)
            drains.append(1e6 * timed(lambda: fasten.flush(300)) / PART)
        self.add(PART, code="ROW_EXPIRES")
        assert fasten.flush(300)
        return {
            "emit_us": min(emits),
            "drain_us": min(drains),
            "query_us": 1e6 * median([timed(self.ask) for _ in range(QUERIES)]),
            "verify_us": 1e6 * timed(self.verify) / self.size,
            "sweep_us": 1e6 * timed(self.sweep) / PART,
        }

    def ask(self) -> None:
        """
        Query the rows of one request.
        """
        assert len(fasten.query(request_id=self.asked).rows) == PER_REQUEST

    def verify(self) -> None:
        """
        Verify the whole store.
        """
        assert fasten.verify().ok

    def sweep(self) -> None:
        """
        Delete the rows whose time is over in 31 days.
        """
        done = fasten.sweep(datetime.now(UTC) + timedelta(days=31))
        assert done.deleted == PART
        self.size -= PART


def timed(call: Callable[[], Any]) -> float:
    """
    Return the seconds that a call takes.
    """
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def stores(folder: Path) -> Iterator[tuple[str, str]]:
    """
    Yield the name and DSN of each kind of store.
    """
    yield "SQLite", f"sqlite:///{folder / 'growth.db'}"
    with private_server(settings=("shared_buffers=128MB",)) as server:
        yield "Postgres", server.dsn()


def main() -> None:
    """
    Print the table, write the JSON.
    """
    sizes = [int(given) for given in sys.argv[1:]] or SIZES
    print(PRINTED.format("store", "rows", *(name[:-3] + ", us" for name in MEASURED)))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, dsn in stores(Path(folder)):
            store = Store(dsn)
            for size in sizes:
                store.grow(size)
                figures = {k: round(v, 2) for k, v in store.figures().items()}
                print(PRINTED.format(name, size, *figures.values()), flush=True)
                rows.append({"store": name, "rows": size, **figures})
            fasten.close(60)
    RESULTS.write_text(
        json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
