# SPDX-License-Identifier: Apache-2.0
"""
Audit rows as a store took them: in pages, from any place on, late ones last.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import pytest

from fasten.errors import InvalidQuery
from fasten.rows import END, AuditRow, Query, encode_cursor
from tests.stores import Kept

STORED = Query(order="stored", limit=3)


@pytest.fixture
def kept(store_dsn: str) -> Iterator[Kept]:
    """
    Give a store with rows of two nodes.
    """
    made = Kept(store_dsn)
    made.emit("n1", *["short", "long"] * 4)
    made.emit("n2", "medium")
    yield made
    made.close()


def pages(kept: Kept, query: Query) -> tuple[list[AuditRow], str]:
    """
    Read on until a page is not full; return the rows, and the cursor behind them.
    """
    rows: list[AuditRow] = []
    while True:
        page = kept.repository.query(query)
        rows += page.rows

        assert page.next is not None
        if query.is_last(page):
            return rows, page.next
        query = attrs.evolve(query, cursor=page.next, offset=0)


def numbers(rows: list[AuditRow]) -> list[tuple[str, int | None]]:
    """
    Return where rows stand.
    """
    return [(row.source_node_id, row.monotonic_seq) for row in rows]


ALL = [*(("n1", n) for n in range(1, 9)), ("n2", 1)]


class TestPages:
    def test_all_rows_node_by_node(self, kept):
        """
        From the beginning, whatever the size of a page: each row once, in its order.
        """
        for limit in (1, 3, 8, 9, 100):
            rows, _ = pages(kept, attrs.evolve(STORED, limit=limit))

            assert ALL == numbers(rows)

    def test_what_a_page_looks_through_is_bounded(self, kept, monkeypatch):
        """
        A filter that finds little has pages without a row, and goes on behind them.
        """
        monkeypatch.setattr("fasten.repository.arrivals.LOOKED_THROUGH", 3)
        asked = attrs.evolve(STORED, filters={"retention_class": "medium"})
        first = kept.repository.query(asked)
        rows, _ = pages(kept, asked)

        assert [] == first.rows
        assert not asked.is_last(first)
        assert [("n2", 1)] == numbers(rows)
        assert ALL == numbers(pages(kept, STORED)[0])

    def test_what_comes_later_follows(self, kept):
        """
        The cursor of the last page leads to what is stored then, on any node.
        """
        _, cursor = pages(kept, STORED)
        kept.emit("n1", "short")
        kept.emit("n0", "short")
        rows, again = pages(kept, attrs.evolve(STORED, cursor=cursor))

        assert [("n0", 1), ("n1", 9)] == numbers(rows)
        assert ([], again) == pages(kept, attrs.evolve(STORED, cursor=again))

    def test_from_the_end(self, kept):
        """
        `end` is behind everything that is there, and tells its place.
        """
        page = kept.repository.query(attrs.evolve(STORED, cursor=END))
        kept.emit("n2", "long")
        rows, _ = pages(kept, attrs.evolve(STORED, cursor=page.next))

        assert [] == page.rows
        assert [("n2", 2)] == numbers(rows)

    def test_filters_offset_and_count(self, kept):
        """
        They mean what they mean in any order.
        """
        asked = Query(
            order="stored",
            filters={"retention_class": "long"},
            offset=1,
            limit=2,
            count=True,
        )
        page = kept.repository.query(asked)

        assert [("n1", 4), ("n1", 6)] == numbers(page.rows)
        assert 4 == page.total
        assert [("n1", 8)] == numbers(
            pages(kept, attrs.evolve(asked, cursor=page.next, offset=0))[0]
        )

    def test_a_store_that_went_back(self, kept, monkeypatch):
        """
        Behind a store that was emptied, what it takes from then on is told.
        """
        monkeypatch.setattr("fasten.repository.arrivals.UNSETTLED_US", -1_000)
        for begun in (END, pages(kept, STORED)[1]):
            page = kept.repository.query(attrs.evolve(STORED, cursor=begun))
            kept.sql("UPDATE audit_log_node SET seq = seq - 1")
            rows, cursor = pages(kept, attrs.evolve(STORED, cursor=page.next))
            kept.sql("UPDATE audit_log_node SET seq = seq + 1")
            kept.emit("n1", "long")
            later, _ = pages(kept, attrs.evolve(STORED, cursor=cursor))

            assert [] == rows
            assert kept.repository.positions()["shop", "n1"] == later[-1].monotonic_seq

    @pytest.mark.parametrize(
        "cursor", ["", "x", "endless", "bm9u", "\xe9", encode_cursor("audit", "evt-1")]
    )
    def test_a_cursor_from_elsewhere(self, kept, cursor):
        """
        It is refused by name, not read as some place or other.
        """
        with pytest.raises(InvalidQuery, match="order=stored") as caught:
            kept.repository.query(attrs.evolve(STORED, cursor=cursor))

        assert "cursor" == caught.value.parameter
