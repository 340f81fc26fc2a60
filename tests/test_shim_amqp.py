# SPDX-License-Identifier: Apache-2.0
"""
AMQP: aio-pika through a real RabbitMQ.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import aio_pika
import pytest

import fasten
from fasten_shims import amqp
from tests import brokers

pytestmark = pytest.mark.xdist_group("rabbitmq")


@asynccontextmanager
async def bound(url, pattern):
    """
    Open a topic exchange with one queue below *pattern*; yield both.
    """
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(
            "shop", aio_pika.ExchangeType.TOPIC, auto_delete=True
        )
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(exchange, pattern)
        yield exchange, queue


def run(coroutine):
    """
    Run to the end, or fail after 20 seconds.
    """
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def message(body=b"{}", **options):
    """
    Make a message.
    """
    return aio_pika.Message(body, **options)


class TestRoundTrip:
    def test_the_id_arrives(self, rabbitmq_url, fasten_trail):
        """
        A handler runs under the publisher's id, the routing key as its client.
        """
        router, done = amqp.Router(), asyncio.Event()

        @router.handler("orders.*")
        async def on_order(_msg, _ctx):
            fasten.emit("ORDER_PLACED", "ord-1")
            done.set()

        async def main():
            async with bound(rabbitmq_url, "orders.#") as (exchange, queue):
                await queue.consume(router.dispatch, no_ack=True)
                with fasten.bind("req-1", actor="ann"):
                    sent = message(correlation_id="mine", headers={"a": 1})
                    await amqp.publish(exchange, sent, "orders.eu")
                await done.wait()
                return sent

        sent = run(main())
        row = fasten_trail.assert_emitted("ORDER_PLACED")

        assert {"a": 1, "x-request-id": "req-1"} == sent.headers
        assert "mine" == sent.correlation_id
        assert ("req-1", "amqp", "orders.eu", "system") == (
            *(row["request_id"], row["method"], row["client"]),
            row["actor"],
        )

    def test_a_loop_opens_the_scope_itself(self, rabbitmq_url):
        """
        `scope(message)` serves code that reads its queue by hand.
        """

        async def main():
            async with bound(rabbitmq_url, "#") as (exchange, queue):
                with fasten.bind("req-2"):
                    await amqp.publish(exchange, message(), "a")
                await amqp.publish(exchange, message(), "b")
                found = []
                for _ in range(2):
                    received = await queue.get(timeout=10)
                    with amqp.scope(received) as ctx:
                        found.append((ctx.request_id, dict(received.headers)))
                return found

        (rid, headers), (minted, no_headers) = run(main())

        assert ("req-2", {"x-request-id": "req-2"}) == (rid, headers)
        assert (32, {}) == (len(minted), no_headers)
        assert fasten.current() is None

    def test_what_a_handler_raises_leaves_dispatch(self, rabbitmq_url):
        """
        aio-pika's `process()` sees the error as it is, and rejects the message.
        """
        router, error = amqp.Router(), ValueError("mine")

        @router.handler("#")
        def on_any(_msg, _ctx):
            raise error

        async def main():
            async with bound(rabbitmq_url, "#") as (exchange, queue):
                await amqp.publish(exchange, message(), "a")
                async with queue.iterator() as messages:
                    async for received in messages:
                        async with received.process():
                            await router.dispatch(received)

        with pytest.raises(ValueError, match="mine") as raised:
            run(main())

        assert error is raised.value

    def test_a_header_of_the_caller_stays(self, rabbitmq_url):
        """
        Who forwards a message keeps the id that it came with.
        """
        sent = message(headers={"x-request-id": "theirs"})

        async def main():
            async with bound(rabbitmq_url, "#") as (exchange, queue):
                with fasten.bind("req-3"):
                    await amqp.publish(exchange, sent, "a", timeout=10)
                received = await queue.get(timeout=10)
                with amqp.scope(received) as ctx:
                    return ctx.request_id

        assert "theirs" == run(main())


def test_hostile_ids_are_minted_over(rabbitmq_url):
    """
    Whatever a header holds, none becomes an id, and each message is handled.
    """
    short = [value for value in brokers.HOSTILE_IDS if len(value) < 100_000]
    texts = [value.decode("latin-1") for value in short]
    values = [*map(bytearray, short), *texts, 7, True, ["a"], {"a": "b"}]

    async def main():
        async with bound(rabbitmq_url, "#") as (exchange, queue):
            found = []
            for value in values:
                await exchange.publish(message(headers={"x-request-id": value}), "a")
                received = await queue.get(timeout=10)
                with amqp.scope(received) as ctx:
                    found.append(ctx.request_id)
            return found

    found = run(main())

    assert len(values) == len(set(found))
    assert [] == [rid for rid in found if not brokers.is_minted(rid)]


@pytest.mark.parametrize(
    ("pattern", "key", "is_match"),
    [
        ("a.b", "a.b", True),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.*", "a", False),
        ("a.#", "a", True),
        ("a.#", "a.b.c", True),
        ("#", "", True),
        ("#.c", "a.b.c", True),
        ("#.b.#", "a.b.c", True),
        ("#.b.#", "a.c", False),
        ("*.#.c", "c", False),
        ("*.#.c", "a.c", True),
        ("#.#", "a", True),
        ("*", "", False),
        ("", "", True),
        ("a", "b", False),
    ],
)
def test_patterns_match_as_the_brokers_do(rabbitmq_url, pattern, key, is_match):
    """
    Our patterns let through what a topic exchange of RabbitMQ does.
    """

    async def main():
        async with bound(rabbitmq_url, pattern) as (exchange, queue):
            await exchange.publish(message(), key)
            return await queue.get(fail=False, timeout=10) is not None

    assert is_match == amqp._matches(pattern, key)
    assert is_match == run(main())
