# SPDX-License-Identifier: Apache-2.0
"""
`fasten report cost`: what tool calls cost, on SQLite and on Postgres.
"""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

import fasten
from fasten.shim.agent import tool
from tests.cli_runs import fasten_on, run


def call(name, actor, cost_usd):
    """
    Call a tool in some agent's name, at some cost.
    """
    with fasten.bind(actor=actor), tool(name) as done:
        if cost_usd is not None:
            done.record(cost_usd=cost_usd, tokens=7, model="m")


@pytest.fixture
def store(store_dsn):
    """
    Return the DSN of a store with a few calls and other rows.
    """
    with fasten_on(store_dsn):
        for _ in range(10):
            call("search", "planner", 0.1)
        call("search", "writer", "0.00000000000000000001")
        call("fetch", "writer", 2)
        call("fetch", "=cmd()", None)
        fasten.emit("USER_CREATED", "u-1", actor="ann")
        fasten.emit("BATCH_PROCESSED", "b-1", actor="ann", detail={"cost_usd": "0.30"})
        fasten.emit("BATCH_PROCESSED", "b-2", actor="ann", detail={"cost_usd": "much"})
    return store_dsn


def costs(*words):
    """
    Return what is reported, as JSON whose numbers keep all their digits.
    """
    done = run("report", "cost", *words, "-o", "json")

    assert 0 == done.exit_code, done.output

    return json.loads(done.stdout, parse_float=Decimal, parse_int=Decimal)


class TestCost:
    def test_by_actor(self, store):
        """
        Sums are exact, the dearest come first, and rows about no cost are left out.
        """
        found = costs("--by", "actor", "--dsn", store)

        assert [
            ("writer", 2, Decimal("2.00000000000000000001")),
            ("planner", 10, Decimal(1)),
            ("ann", 2, Decimal("0.3")),
            ("=cmd()", 1, Decimal(0)),
        ] == [(row["actor"], row["calls"], row["cost_usd"]) for row in found]

    @pytest.mark.parametrize(
        ("by", "calls"),
        [
            ("target", {"search": 11, "fetch": 2, "b-1": 1, "b-2": 1}),
            ("code", {"TOOL_CALLED": 13, "BATCH_PROCESSED": 2}),
        ],
    )
    def test_by_others(self, store, by, calls):
        """
        The key has the name that was asked for.
        """
        found = costs("--by", by, "--dsn", store)

        assert calls == {row[by]: row["calls"] for row in found}

    def test_since(self, store):
        """
        Only what was since then.
        """
        assert [] == costs("--since", "2100-01-01T00:00:00Z", "--dsn", store)

    def test_what_cannot_be_read_is_told(self, store):
        """
        A cost that is no amount is taken as nothing, and said to be.
        """
        done = run("report", "cost", "--dsn", store)

        assert "cost_usd is no amount: 1 row\n" in done.stderr
        assert [
            "cost_usd  calls  actor",
            "2.00000000000000000001  2  writer",
            "1  10  planner",
            "0.3  2  ann",
            "0  1  =cmd()",
        ] == ["  ".join(line.split()) for line in done.stdout.splitlines()]

    def test_csv_is_no_formula(self, store):
        """
        A name that a spreadsheet would run is quoted.
        """
        done = run("report", "cost", "--dsn", store, "-o", "csv")

        assert "actor,calls,cost_usd" == done.stdout.splitlines()[0]
        assert "'=cmd(),1,0" == done.stdout.splitlines()[-1]

    def test_nothing_there_yet(self, sqlite_dsn):
        """
        No store is no cost.
        """
        assert [] == costs("--dsn", sqlite_dsn)
