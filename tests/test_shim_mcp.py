# SPDX-License-Identifier: Apache-2.0
"""
MCP: the SDK's own client and servers of both levels, over stdio, in two processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

import fasten
from fasten.shim import mcp as shim
from tests.brokers import HOSTILE_VALUES, is_minted
from tests.checker import faults, rows_of
from tests.outside import ROOT, wait_until

PROGRAM = str(ROOT / "tests" / "server_mcp.py")


@pytest.fixture
def command(monkeypatch, sqlite_dsn):
    """
    Return how a server is started, which records in a store.
    """
    monkeypatch.setenv("FASTEN_SERVICE_ID", "server")
    monkeypatch.setenv("FASTEN_AUDIT_DSN", sqlite_dsn)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    return [sys.executable, PROGRAM]


@asynccontextmanager
async def connected(command):
    """
    Start a server as a client does; yield its session, with the shim.
    """
    given = StdioServerParameters(
        command=command[0], args=command[1:], env=dict(os.environ)
    )
    async with stdio_client(given) as streams, ClientSession(*streams) as session:
        await session.initialize()
        yield shim.client(shim.client(session))


async def say(call):
    """
    Return what a tool answered, with a result or with an error.
    """
    try:
        return (await call).content[0].text
    except Exception as error:  # of a class that each SDK has its own of
        return str(error)


async def asked(session):
    """
    Ask in the scope of a request and out of it, one after the other and at once.
    """

    def add(a, b):
        return say(session.call_tool("add", {"a": a, "b": b}))

    with fasten.bind("req-1", actor="ann"):
        first = await add(1, 2)
    outside = [await add(3, 4), await add(5, 6)]
    with fasten.bind("req-2"):
        both = await asyncio.gather(add(7, 8), add(9, 9))
        failed = await say(session.call_tool("fail", {}))
    return [first, *outside, *both], failed


async def given_up(session, dsn):
    """
    Call a tool that has no end, and give it up once it has begun.
    """

    def has_begun():
        return [row for row in rows_of(dsn) if row["target"] == "pondering"]

    endless = asyncio.ensure_future(session.call_tool("ponder", {}))
    await asyncio.to_thread(wait_until, has_begun, 20)
    endless.cancel()
    await asyncio.wait([endless])


@pytest.mark.parametrize("level", ["high", "low"])
def test_the_id_goes_with_a_call(fasten_trail, command, sqlite_dsn, level):
    """
    What a tool records has the id of the request that called it, on either side one
    row says that it was called and how it ended, and nothing stays for the next call.
    What a tool refuses is `denied`, whatever the SDK makes of it, and a call that is
    given up `unknown`. Other requests carry the id, too.
    """

    async def run():
        async with connected([*command, level]) as session:
            answers = await asked(session)
            with fasten.bind("req-3"):
                await say(session.call_tool("refuse", {}))
                await given_up(session, sqlite_dsn)
                read = await session.read_resource("shop://hours")
            return *answers, read.contents[0].text

    texts, failed, read = asyncio.run(run())
    ids = [text.split()[1] for text in texts]
    rows = rows_of(sqlite_dsn)
    called = [row for row in rows if row["code"] == "TOOL_CALLED"]
    mine = fasten_trail.audit

    assert ["3", "7", "11", "15", "18"] == [text.split()[0] for text in texts]
    assert ["req-1", "req-2", "req-2", "req-3"] == [ids[0], *ids[3:], read]
    assert [32, 32] == [len(rid) for rid in ids[1:3]]
    assert 4 == len(set(ids))
    assert [] == faults(rows)
    assert "3" not in failed
    ends = [("add", rid, "success") for rid in ids]
    ends += [("fail", "req-2", "failure"), ("ponder", "req-3", "unknown")]
    there, here = (("refuse", "req-3", end) for end in ("denied", "failure"))
    assert sorted([*ends, there]) == sorted(end_of(row) for row in called)
    assert sorted([*ends, here]) == sorted(end_of(row) for row in mine)
    assert {("agent", "agent_tool")} == {
        (row["actor_kind"], row["method"]) for row in [*called, *mine]
    }
    assert {"mcp"} == {row["client"] for row in called}
    assert "ann" == mine[0]["actor"]
    reasons = [row["reason"] for row in called if row["reason"]]
    assert ["ValueError", "not today", "cancelled"] == reasons
    digest = json.loads(called[0]["detail"])["args_sha256"]
    assert digest == mine[0]["detail"]["args_sha256"]


def end_of(row):
    """
    Return which tool was called, under which id, and how it ended.
    """
    return row["target"], row["request_id"], row["outcome"]


def test_stdout_is_the_protocols(command, sqlite_dsn):
    """
    Whatever fasten prints, stdout holds messages of the protocol only; forged ids in
    them are not taken, and the server answers.
    """
    messages = [
        {
            "id": 0,
            "method": "initialize",
            "params": {
                "protocolVersion": "2025-06-18",
                "capabilities": {},
                "clientInfo": {"name": "x" * 5000, "version": "1"},
            },
        },
        {"method": "notifications/initialized"},
    ]
    messages += [
        {
            "id": number,
            "method": "tools/call",
            "params": {
                "name": "add",
                "arguments": {"a": 1, "b": number},
                "_meta": {"request_id": value},
            },
        }
        for number, value in enumerate(HOSTILE_VALUES, 1)
    ]
    with subprocess.Popen(
        [*command, "high"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as server:
        for message in messages:
            line = json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n"
            server.stdin.write(line)
            server.stdin.flush()
            if "id" in message:
                answer = json.loads(server.stdout.readline())
                assert (message["id"], True) == (answer["id"], "result" in answer)
        out, err = server.communicate(timeout=30)

    assert b"" == out
    shapes = [
        json.loads(line)["shape"] for line in err.splitlines() if b'"shape"' in line
    ]
    assert {"audit", "sys"} == set(shapes)
    called = [row for row in rows_of(sqlite_dsn) if row["code"] == "TOOL_CALLED"]
    assert len(HOSTILE_VALUES) == len({row["request_id"] for row in called})
    assert [] == [row for row in called if not is_minted(row["request_id"])]
    assert {512} == {len(row["client"]) for row in called}
