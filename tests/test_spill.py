# SPDX-License-Identifier: Apache-2.0
"""
Tests of sorting with a file: nothing is lost, and memory does not grow.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasten import spill
from fasten.evidence import verify_ndjson
from fasten.spill import Spill
from tests.ledger import Ledger, wire_line


@pytest.fixture(autouse=True)
def _little_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "HELD", 7)
    monkeypatch.setattr(spill, "PIECE", 3)


def _first(item: tuple[int, int]) -> int:
    return item[0]


@given(st.lists(st.integers(0, 30)))
def test_it_sorts_as_sorted_does(numbers):
    """
    Equal keys stay in the order in which they came.
    """
    items = [(number, at) for at, number in enumerate(numbers)]
    sorting = Spill(_first)
    for item in items:
        sorting.add(item)

    assert sorted(items, key=_first) == list(sorting)


def test_what_comes_in_order_is_one_run():
    """
    However many pieces it has.
    """
    sorting = Spill(_first)
    for number in range(100):
        sorting.add((number, 0))
    runs = len(sorting._runs)
    sorting.close()

    assert 1 == runs


def test_what_is_left_unread_holds_no_file_open():
    """
    Closing it once more does no harm.
    """
    sorting = Spill(_first)
    for number in range(50):
        sorting.add((-number, 0))
    next(iter(sorting))
    sorting.close()
    sorting.close()

    assert [] == list(sorting)


def test_verifying_a_file_takes_no_more_memory_for_more_rows(monkeypatch):
    """
    Also where its lines are in no order at all; held in memory each takes a kilobyte.
    """
    monkeypatch.setattr(spill, "HELD", 100)
    peaks = [_peak(number) for number in (200, 2000)]

    assert peaks[1] - peaks[0] < 400_000


def _peak(number: int) -> int:
    log = Ledger(number)
    for _ in range(number // 50):
        log.emit("n1", *["short"] * 50)
    rows = list(log.rows)
    log.random.shuffle(rows)

    def lines() -> Iterator[str]:
        for row in rows:
            yield wire_line(row)

    tracemalloc.start()
    report = verify_ndjson(lines())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert (number, True) == (report.rows, report.ok)
    return peak
