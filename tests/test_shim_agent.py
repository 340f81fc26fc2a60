# SPDX-License-Identifier: Apache-2.0
"""
Tool calls of agents: one row each, whatever their end.
"""

from __future__ import annotations

import asyncio
import inspect
from contextlib import aclosing, closing, suppress
from decimal import Decimal
from itertools import islice

import pytest

import fasten
from fasten.shim.agent import Refused, tool


def test_a_call_is_one_row(fasten_trail):
    """
    A decorated tool leaves one TOOL_CALLED row with duration and digest.
    """

    @tool
    def search(query, limit=3):
        return [query] * limit

    assert ["a", "a", "a"] == search("a")
    row = fasten_trail.assert_emitted("TOOL_CALLED", times=1, target="search")
    assert ("agent", "agent_tool", "success") == (
        row["actor_kind"],
        row["method"],
        row["outcome"],
    )
    assert None is row["detail"]["tokens"]
    wanted = {"duration_ms", "cost_usd", "tokens", "model", "args_sha256"}
    assert wanted == set(row["detail"])
    assert 64 == len(row["detail"]["args_sha256"])
    assert "search" == search.__name__


def test_equal_arguments_have_equal_digests(fasten_trail):
    """
    The digest tells the same call from another one; the arguments are not there.
    """

    @tool("lookup")
    def lookup(**_given):
        return None

    lookup(name="ann", age=3)
    lookup(age=3, name="ann")
    lookup(name="bob", age=3)
    first, second, third = (r["detail"]["args_sha256"] for r in fasten_trail.audit)

    assert first == second != third
    assert "ann" not in repr(fasten_trail.audit)


def test_arguments_by_option(fasten_trail):
    """
    Arguments are recorded when asked for, redacted like any detail.
    """

    @tool("pay", with_arguments=True)
    def pay(amount, api_key):
        return amount

    pay(5, api_key="xyz")
    row = fasten_trail.assert_emitted("TOOL_CALLED")

    assert {"args": [5], "kwargs": {"api_key": "***"}} == row["detail"]["arguments"]


def test_costs_add_up_exactly(fasten_trail):
    """
    What a call records is summed, money without rounding.
    """
    with tool("summarise") as call:
        call.record(cost_usd=0.1, tokens=100, model="m-1")
        call.record(cost_usd=0.2, tokens=50)
    with tool("exact") as call:
        call.record(cost_usd=Decimal("0.10000000000000000001"))

    first, second = (row["detail"] for row in fasten_trail.audit)
    assert (0.3, 150, "m-1") == (first["cost_usd"], first["tokens"], first["model"])
    assert "0.10000000000000000001" == second["cost_usd"]


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (Refused("not allowed"), "denied", "not allowed"),
        (PermissionError(), "denied", "refused"),
        (ValueError("secret words"), "failure", "ValueError"),
        (asyncio.CancelledError(), "unknown", "cancelled"),
    ],
)
def test_other_ends(fasten_trail, error, outcome, reason):
    """
    A refusal, an error and a cancellation are recorded and leave as they came.
    """

    @tool
    async def act():
        raise error

    with pytest.raises(type(error)) as raised:
        asyncio.run(act())

    row = fasten_trail.assert_emitted("TOOL_CALLED", times=1)
    assert (outcome, reason) == (row["outcome"], row["reason"])
    if not isinstance(error, asyncio.CancelledError):
        assert error is raised.value


@tool("count")
def count(last, error=None):
    """
    Count, recording each number.
    """
    for number in range(last):
        fasten.emit("SENSOR_UPDATED", number)
        yield number
    if error:
        raise error


@tool("count")
async def count_later(last, error=None):
    """
    Count, letting others have their turn.
    """
    for number in range(last):
        await asyncio.sleep(0)
        fasten.emit("SENSOR_UPDATED", number)
        yield number
    if error:
        raise error


async def read_later(pieces, most):
    """
    Read a stream as `read` does.
    """
    found = []
    async with aclosing(pieces):
        async for piece in pieces:
            found.append((piece, fasten.current()))
            if len(found) == most:
                break
    return found


def read(pieces, most):
    """
    Read so many pieces of a stream, each with the Context of whoever reads.
    """
    if inspect.isasyncgen(pieces):
        return asyncio.run(read_later(pieces, most))
    with closing(pieces):
        return [(piece, fasten.current()) for piece in islice(pieces, most)]


@pytest.mark.parametrize("kind", [count, count_later], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("error", "most", "outcome", "reason"),
    [
        (None, 9, "success", None),
        (ValueError(), 9, "failure", "ValueError"),
        (Refused("enough"), 9, "denied", "enough"),
        (None, 1, "unknown", "cancelled"),
    ],
)
def test_streams(fasten_trail, kind, error, most, outcome, reason):
    """
    A tool that answers in pieces is one call up to the last, and its rows are the
    agent's; one whose reader leaves is given up.
    """
    with suppress(ValueError, Refused):
        found = read(kind(2, error), most)
        assert [(number, None) for number in range(len(found))] == found

    *steps, row = fasten_trail.audit
    assert ("TOOL_CALLED", outcome, reason) == (
        *(row["code"], row["outcome"], row["reason"]),
    )
    assert min(most, 2) == len(steps)
    assert {("agent", row["request_id"])} == {
        (step["actor_kind"], step["request_id"]) for step in steps
    }


def test_objects_that_are_awaited(fasten_trail):
    """
    An object whose call is a coroutine function is a call until that has ended.
    """

    class Search:
        async def __call__(self, words):
            await asyncio.sleep(0)
            raise Refused("no")

    with pytest.raises(Refused):
        asyncio.run(tool("search")(Search())("x"))

    assert "denied" == fasten_trail.assert_emitted("TOOL_CALLED")["outcome"]


def test_a_generators_result(fasten_trail):
    """
    What a generator returns is still what it returns.
    """

    @tool("quick")
    def quick():
        yield 1
        return 2

    def asking():
        return (yield from quick())

    pieces = asking()

    assert 1 == next(pieces)
    with pytest.raises(StopIteration) as end:
        next(pieces)
    assert 2 == end.value.value


def test_hand_over_from_agent_to_agent(fasten_trail):
    """
    Agent A calls agent B calls a tool: one request id, each in its own name.
    """

    @tool("lookup")
    def lookup():
        return 1

    @tool("researcher", actor="agent-b")
    def researcher():
        return lookup()

    @tool("planner", actor="agent-a")
    def planner():
        return researcher()

    with fasten.bind("req-7", actor="u-42", method="http"):
        planner()
        assert "u-42" == fasten.current().actor

    assert "req-7" == fasten_trail.assert_correlated()
    who = [
        (row["target"], row["actor"], row["on_behalf_of"]) for row in fasten_trail.audit
    ]
    assert [
        ("lookup", "agent-b", "u-42"),
        ("researcher", "agent-b", "u-42"),
        ("planner", "agent-a", "u-42"),
    ] == who
