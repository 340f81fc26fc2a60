# SPDX-License-Identifier: Apache-2.0
"""
Batches as they are inserted: whole pieces by one statement, the rest row by row.

What a batch means to the drainer is in `test_drain`, what it proves in `test_evidence`.
"""

from __future__ import annotations

import sqlite3

import pytest
import sqlalchemy as sa

from tests.stores import Kept

ROWS = 200  # whole pieces, and a part of one
MANY = 700


@pytest.fixture
def kept(store_dsn):
    """
    Return a store and whoever makes rows for it.
    """
    kept = Kept(store_dsn)
    yield kept
    kept.close()


def rows_of(kept, number=ROWS):
    """
    Return so many rows, none of them stored.
    """
    return [tuple(kept.maker.pending("short")) for _ in range(number)]


def test_pieces_keep_their_order(kept):
    """
    Rows of whole pieces and of the last part come back numbered as they were given.
    """
    rows = rows_of(kept)
    kept.append("n1", rows)

    assert [row[0] for row in rows] == kept.columns("id")
    assert list(range(1, ROWS + 1)) == kept.columns("monotonic_seq")
    assert kept.verify().ok


def test_known_id_in_the_midst_of_a_piece(kept):
    """
    A row that is stored already is left out of its piece, and nothing else is.
    """
    rows = rows_of(kept)
    kept.append("n1", rows[70:71])
    kept.append("n1", rows)

    assert sorted(row[0] for row in rows) == sorted(kept.columns("id"))
    assert kept.verify().ok


def test_row_that_is_refused_leaves_nothing(tmp_path):
    """
    Of a batch whose last whole piece holds a row that SQLite refuses, none is kept.
    """
    kept = Kept(f"sqlite:///{tmp_path}/audit.db")
    rows = rows_of(kept)
    kept.append("n1", rows[:1])
    kept.sql(
        "CREATE TRIGGER picky BEFORE INSERT ON audit_log WHEN NEW.monotonic_seq = 180 "
        "BEGIN SELECT RAISE(ABORT, 'no'); END"
    )
    with pytest.raises(sa.exc.IntegrityError):
        kept.append("n1", rows[1:])
    kept.sql("DROP TRIGGER picky")
    before = kept.columns("id")
    kept.append("n1", rows[1:])

    assert [rows[0][0]] == before
    assert [row[0] for row in rows] == kept.columns("id")
    assert kept.verify().ok
    kept.close()


def test_sqlite_that_takes_few_values(tmp_path):
    """
    Where SQLite takes no more than 999 values a statement, pieces go row by row.
    """
    kept = Kept(f"sqlite:///{tmp_path}/audit.db")
    kept.append("n1", rows_of(kept, 1))
    with kept.repository.database.transaction() as connection:
        raw = connection.connection.driver_connection
        raw.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)
    kept.append("n1", rows_of(kept))

    assert ROWS + 1 == len(kept.columns("id"))
    assert kept.verify().ok
    kept.close()


def in_pieces(kept, rows):
    """
    Store rows as the drainer does; return how often others had their turn.
    """
    turns = []
    numbered = [(0, row) for row in rows]
    kept.repository.append(kept.writer(), numbered, 0, pause=lambda: turns.append(1))
    return len(turns)


def test_others_get_their_turn(kept):
    """
    A large batch lets other threads run between its pieces, and is stored in order.
    """
    rows = rows_of(kept, MANY)

    assert in_pieces(kept, rows) >= MANY // 100
    assert [row[0] for row in rows] == kept.columns("id")
    assert kept.verify().ok


def test_row_that_cannot_be_sealed(kept):
    """
    Of a batch whose last piece cannot be sealed nothing is kept.
    """
    rows = rows_of(kept, MANY)
    bad = [*rows[:-1], (*rows[-1][:-1], "\ud800")]
    with pytest.raises(UnicodeEncodeError):
        in_pieces(kept, bad)
    in_pieces(kept, rows)

    assert [row[0] for row in rows] == kept.columns("id")
    assert kept.verify().ok
