# SPDX-License-Identifier: Apache-2.0
"""
Kafka: confluent-kafka and aiokafka against librdkafka's mock cluster.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import aiokafka
import confluent_kafka
import pytest

import fasten
from fasten_shims import kafka
from tests import brokers


@pytest.fixture(scope="module")
def address():
    """
    Run one cluster for this file.
    """
    with brokers.kafka() as running:
        yield running


@pytest.fixture
def producer(address):
    """
    Return a producer of confluent-kafka.
    """
    return confluent_kafka.Producer({"bootstrap.servers": address, "linger.ms": 0})


@pytest.fixture
def read(address):
    """
    Return a function that reads so many messages of a topic by confluent-kafka.
    """
    consumer = confluent_kafka.Consumer(
        {"bootstrap.servers": address, "group.id": "test"}
    )

    def messages(topic, number):
        # Assigned, not subscribed: a group takes seconds to form.
        start = confluent_kafka.OFFSET_BEGINNING
        consumer.assign([confluent_kafka.TopicPartition(topic, 0, start)])
        return consumer.consume(number, timeout=20)

    yield messages
    consumer.close()


@asynccontextmanager
async def connected(address, topic):
    """
    Open a producer and a consumer of aiokafka; yield both.
    """
    partition = aiokafka.TopicPartition(topic, 0)
    async with (
        aiokafka.AIOKafkaProducer(bootstrap_servers=address) as producer,
        aiokafka.AIOKafkaConsumer(
            bootstrap_servers=address, enable_auto_commit=False
        ) as consumer,
    ):
        await producer.partitions_for(topic)
        consumer.assign([partition])
        await consumer.seek_to_beginning(partition)
        yield producer, consumer


def run(coroutine):
    """
    Run to the end, or fail after 20 seconds.
    """
    return asyncio.run(asyncio.wait_for(coroutine, 20))


class TestConfluent:
    def test_the_id_arrives(self, producer, read, fasten_trail):
        """
        A handler runs under the producer's id, the topic as its client.
        """
        router = kafka.Router()

        @router.handler("orders")
        def on_order(_msg, _ctx):
            fasten.emit("ORDER_PLACED", "ord-1")

        @router.handler("others")
        def on_other(_msg, _ctx):
            fasten.emit("ORDER_PLACED", "ord-2")

        with fasten.bind("req-1", actor="ann"):
            sent = kafka.publish(producer, "orders", b"{}", partition=0)
        producer.flush(20)
        (message,) = read("orders", 1)
        router.dispatch_sync(message)

        row = fasten_trail.assert_emitted("ORDER_PLACED", times=1)
        assert sent is None
        assert [("request_id", b"req-1")] == message.headers()
        assert ("req-1", "kafka", "orders", "system", "ord-1") == (
            *(row["request_id"], row["method"], row["client"]),
            *(row["actor"], row["target"]),
        )

    @pytest.mark.parametrize("headers", [{"a": b"b"}, [("a", b"b")]], ids=repr)
    def test_headers_of_the_caller_stay(self, producer, read, headers):
        """
        In each form that the client takes; an id that is there is not sent again.
        """
        topic = f"headers-{type(headers).__name__}"
        given = [("a", b"b")]
        forwarded = [("request_id", b"theirs"), *given]
        with fasten.bind("req-2"):
            kafka.publish(producer, topic, b"", headers=headers, partition=0)
            kafka.publish(producer, topic, b"", headers=forwarded, partition=0)
        kafka.publish(producer, topic, b"", headers=headers, partition=0)
        producer.flush(20)
        first, second, third = read(topic, 3)

        assert [*given, ("request_id", b"req-2")] == first.headers()
        assert forwarded == second.headers()
        assert given == third.headers()
        with kafka.scope(second) as ctx:
            assert "theirs" == ctx.request_id
        with kafka.scope(third) as ctx:
            assert 32 == len(ctx.request_id)

    def test_without_headers(self, producer, read):
        """
        Outside a request nothing is added, and an id is minted where it is read.
        """
        kafka.publish(producer, "plain", b"x", key=b"k", partition=0)
        producer.flush(20)
        (message,) = read("plain", 1)

        assert message.headers() is None
        with kafka.scope(message) as ctx:
            assert 32 == len(ctx.request_id)

    def test_a_coroutine_function_is_told(self, producer, read):
        """
        Without an event loop its handler could not run; the message says what to do.
        """
        router = kafka.Router()

        @router.handler("async")
        async def on_message(_msg, _ctx):
            pass

        kafka.publish(producer, "async", b"x", partition=0)
        producer.flush(20)
        (message,) = read("async", 1)

        with pytest.raises(TypeError, match="await dispatch"):
            router.dispatch_sync(message)


class TestAiokafka:
    def test_the_id_arrives(self, address, fasten_trail):
        """
        `await publish` is done once it is there; `await dispatch` runs in its scope.
        """
        router = kafka.Router()

        @router.handler("rooms")
        async def on_room(_msg, _ctx):
            fasten.emit("SETPOINT_REQUESTED", "room-1")

        async def main():
            async with connected(address, "rooms") as (producer, consumer):
                with fasten.bind("req-3"):
                    sent = await kafka.publish(producer, "rooms", b"{}", partition=0)
                await router.dispatch(await consumer.getone())
                return sent

        sent = run(main())
        row = fasten_trail.assert_emitted("SETPOINT_REQUESTED")

        assert ("rooms", 0) == (sent.topic, sent.offset)
        assert ("req-3", "kafka", "rooms") == (
            *(row["request_id"], row["method"], row["client"]),
        )

    def test_what_a_handler_raises_leaves_dispatch(self, address):
        """
        The loop decides what a failed message means.
        """
        router, error = kafka.Router(), ValueError("mine")

        @router.handler("bad")
        def on_bad(_msg, _ctx):
            raise error

        async def main():
            async with connected(address, "bad") as (producer, consumer):
                await kafka.publish(producer, "bad", b"{}", partition=0)
                await router.dispatch(await consumer.getone())

        with pytest.raises(ValueError, match="mine") as raised:
            run(main())

        assert error is raised.value
        assert fasten.current() is None


def test_both_clients_read_each_other(address, producer, fasten_trail):
    """
    What confluent-kafka sent, aiokafka reads.
    """

    async def main():
        with fasten.bind("req-4"):
            kafka.publish(producer, "mixed", b"{}", partition=0)
        producer.flush(20)
        async with connected(address, "mixed") as (_, consumer):
            with kafka.scope(await consumer.getone()) as ctx:
                return ctx.request_id

    assert "req-4" == run(main())


def test_hostile_ids_are_minted_over(producer, read):
    """
    Whatever bytes a header holds, none becomes an id, and each message is handled.
    """
    for value in brokers.HOSTILE_IDS:
        producer.produce(
            "hostile", b"\x00", headers=[("request_id", value)], partition=0
        )
    producer.produce("hostile", b"{}", headers=[("request_id", None)], partition=0)
    producer.flush(20)
    found = []
    for message in read("hostile", len(brokers.HOSTILE_IDS) + 1):
        with kafka.scope(message) as ctx:
            found.append(ctx.request_id)

    assert len(brokers.HOSTILE_IDS) + 1 == len(set(found))
    assert [] == [rid for rid in found if not brokers.is_minted(rid)]
