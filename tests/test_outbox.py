# SPDX-License-Identifier: Apache-2.0
"""
Rows in callers' own transactions: they are there if, and only if, those commit.

Who else writes, moves and dies meanwhile is in `test_outbox_processes`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fasten
from tests.checker import faults, rows_of
from tests.transactions import WAYS, Way, business, opened, prepare

PAIRS = [
    pytest.param(way, store, id=f"{way.__name__}-{store}")
    for way in WAYS
    for store in way.stores  # type: ignore[attr-defined]
]


@pytest.fixture
def dsn(request: pytest.FixtureRequest) -> str:
    """
    Return the DSN of the store that a pair names, with fasten running on it.
    """
    found: str = request.getfixturevalue(f"{request.param}_dsn")
    prepare(found)
    fasten.init(service_id="svc", node_id="host-01", stdout="", audit_dsn=found)
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
