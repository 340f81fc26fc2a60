# SPDX-License-Identifier: Apache-2.0
"""
The proxy does to a connection what it is told to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.faults.proxy import Proxy


@pytest.fixture
def proxy(postgres_dsn: str) -> Iterator[Proxy]:
    """
    Return a proxy before a database with a table `t (n int)`.
    """
    with psycopg.connect(postgres_dsn) as connection:
        connection.execute("CREATE TABLE t (n int)")
    with Proxy(postgres_dsn) as proxy:
        yield proxy


def insert(dsn: str) -> None:
    """
    Insert a row in a transaction of its own.
    """
    with psycopg.connect(dsn, connect_timeout=2) as connection:
        connection.execute("INSERT INTO t VALUES (1)")


def count(dsn: str) -> Any:
    """
    Return how many rows there are.
    """
    with psycopg.connect(dsn) as connection:
        return connection.execute("SELECT count(*) FROM t").fetchone()[0]


@pytest.mark.parametrize("mode", ["pass", "drip"])
def test_passes(mode: Any, proxy: Proxy) -> None:
    """
    Bytes go through, all at once or a few at a time.
    """
    proxy.mode = mode
    insert(proxy.dsn)

    assert 1 == count(proxy.dsn)


@pytest.mark.parametrize(("mode", "stored"), [("lose commit", 0), ("lose reply", 1)])
def test_loses_a_commit(
    mode: Any, stored: int, proxy: Proxy, postgres_dsn: str, wait_until: Any
) -> None:
    """
    A COMMIT that is lost does nothing, one whose reply is lost is done; once.
    """
    proxy.mode = mode
    with pytest.raises(psycopg.OperationalError):
        insert(proxy.dsn)

    assert ("pass", 1) == (proxy.mode, proxy.lost)
    wait_until(lambda: stored == count(postgres_dsn))
    insert(proxy.dsn)
    assert stored + 1 == count(postgres_dsn)


@pytest.mark.parametrize("mode", ["stall", "refuse"])
def test_keeps_out_and_lets_in_again(mode: Any, proxy: Proxy) -> None:
    """
    Nothing gets through while it stalls or refuses; afterwards it does.
    """
    proxy.mode = mode
    with pytest.raises(psycopg.OperationalError):
        insert(proxy.dsn)
    proxy.mode = "pass"
    insert(proxy.dsn)

    assert 1 <= count(proxy.dsn)


def test_cuts(proxy: Proxy) -> None:
    """
    Open connections break; new ones work.
    """
    with psycopg.connect(proxy.dsn) as connection:
        proxy.cut()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")

    assert 0 == count(proxy.dsn)
