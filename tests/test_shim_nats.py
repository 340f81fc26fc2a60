# SPDX-License-Identifier: Apache-2.0
"""
NATS: nats-py through a real nats-server.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import nats as client
import pytest

import fasten
from fasten_shims import nats
from tests import brokers


@pytest.fixture(scope="module")
def url():
    """
    Run one server for this file.
    """
    with brokers.nats() as port:
        yield f"nats://127.0.0.1:{port}"


@asynccontextmanager
async def connected(url):
    """
    Open a connection, and collect what its callbacks raise.
    """
    errors = []

    async def failed(error):
        errors.append(error)

    connection = await client.connect(url, error_cb=failed)
    try:
        yield connection, errors
    finally:
        await connection.close()


def run(coroutine):
    """
    Run to the end, or fail after 20 seconds.
    """
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def test_the_id_arrives(url, fasten_trail):
    """
    A handler runs under the publisher's id, in nobody's name, from its subject.
    """
    router, done = nats.Router(), asyncio.Event()

    @router.handler("orders.*")
    async def on_order(_msg, _ctx):
        fasten.emit("ORDER_PLACED", "ord-1")
        done.set()

    async def main():
        async with connected(url) as (connection, _):
            await connection.subscribe("orders.>", cb=router.dispatch)
            with fasten.bind("req-1", actor="ann"):
                await nats.publish(connection, "orders.eu", b"{}", headers={"a": "b"})
            await done.wait()

    run(main())

    row = fasten_trail.assert_emitted("ORDER_PLACED")
    assert ("req-1", "nats", "orders.eu", "system") == (
        *(row["request_id"], row["method"], row["client"]),
        row["actor"],
    )


def test_a_loop_opens_the_scope_itself(url):
    """
    `scope(message)` serves code that reads its subscription by hand, replies included.
    """

    async def main():
        async with connected(url) as (connection, _):
            subscription = await connection.subscribe("work")
            found = []
            with fasten.bind("req-2"):
                await nats.publish(connection, "work", b"1", reply="inbox")
                await nats.publish(
                    connection, "work", b"2", headers={"X-Request-ID": "theirs"}
                )
            await nats.publish(connection, "work", b"3")
            for _ in range(3):
                message = await subscription.next_msg(timeout=10)
                with nats.scope(message) as ctx:
                    found.append((ctx.request_id, message.headers, message.reply))
            return found

    first, second, third = run(main())

    assert ("req-2", {"X-Request-ID": "req-2"}, "inbox") == first
    assert "theirs" == second[0]
    assert (32, None) == (len(third[0]), third[1])
    assert fasten.current() is None


def test_what_a_handler_raises_leaves_dispatch(url):
    """
    The client's own error callback gets the error as it is, and goes on.
    """
    router, error = nats.Router(), ValueError("mine")
    seen = asyncio.Queue()

    @router.handler("bad")
    def on_bad(_msg, _ctx):
        raise error

    @router.handler(">")
    async def on_any(message, _ctx):
        await seen.put(message.subject)

    async def main():
        async with connected(url) as (connection, errors):
            await connection.subscribe(">", cb=router.dispatch)
            await nats.publish(connection, "bad")
            await nats.publish(connection, "good")
            return await seen.get(), errors

    subject, errors = run(main())

    assert "good" == subject
    assert [error] == errors


def test_hostile_ids_are_minted_over(url):
    """
    Whatever a header holds, none becomes an id, and each message is handled.
    """
    # On this wire a line end ends the header, and blanks around a value are not of it.
    texts = [value.decode("latin-1") for value in brokers.HOSTILE_IDS]
    values = [text for text in texts if text == text.strip() and "\n" not in text]

    async def main():
        async with connected(url) as (connection, _):
            subscription = await connection.subscribe("work")
            found = []
            for value in values:
                headers = {"X-Request-ID": value}
                await connection.publish("work", b"\x00", headers=headers)
                message = await subscription.next_msg(timeout=10)
                with nats.scope(message) as ctx:
                    found.append(ctx.request_id)
            return found

    found = run(main())

    assert len(values) == len(set(found))
    assert [] == [rid for rid in found if not brokers.is_minted(rid)]


@pytest.mark.parametrize(
    ("wanted", "subject", "is_match"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("a.>", "a.b", True),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a", True),
        ("*.b.>", "a.b.c.d", True),
        ("*.b.>", "a.c.c.d", False),
    ],
)
def test_subjects_match_as_the_servers_do(url, wanted, subject, is_match):
    """
    Our filters let through what a subscription of the server does.
    """

    async def main():
        async with connected(url) as (connection, _):
            subscription = await connection.subscribe(wanted)
            everything = await connection.subscribe("last")
            await connection.publish(subject, b"")
            await connection.publish("last", b"")
            await everything.next_msg(timeout=10)
            return subscription.pending_msgs - (wanted == ">")

    assert is_match == nats._matches(wanted, subject)
    assert int(is_match) == run(main())
