# SPDX-License-Identifier: Apache-2.0
"""
MQTT through a real mosquitto: 3.1.1 and 5, paho and aiomqtt.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading

import aiomqtt
import paho.mqtt.client as paho
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

import fasten
from fasten_shims import mqtt
from tests import brokers

VERSIONS = [paho.MQTTv311, paho.MQTTv5]


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """
    Run one broker for this file.
    """
    with brokers.mosquitto(tmp_path_factory.mktemp("mosquitto")) as running:
        yield running


class Subscriber:
    """
    A paho client whose handlers belong to a router of its own.
    """

    def __init__(self, port, version, topic):
        self.router = mqtt.Router()
        self.seen = queue.Queue()
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=version)
        ready = threading.Event()
        self.client.on_subscribe = lambda *_: ready.set()
        self.router.attach(self.client)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        self.client.subscribe(topic, qos=1)
        assert ready.wait(10)

    def close(self):
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture(params=VERSIONS, ids=["3.1.1", "5"])
def version(request):
    """
    Speak each version of the protocol in turn.
    """
    return request.param


@pytest.fixture
def subscriber(port, version):
    """
    Listen below devices/.
    """
    made = Subscriber(port, version, "devices/#")
    yield made
    made.close()


def send(port, version, topic, payload, **options):
    """
    Publish one message with a client of its own, raw.
    """
    client = connected(port, version)
    publish = options.pop("publish", None) or paho.Client.publish
    publish(client, topic, payload, qos=1, **options).wait_for_publish(10)
    disconnect(client)


def connected(port, version):
    """
    Return a client whose thread runs.
    """
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=version)
    client.connect("127.0.0.1", port)
    client.loop_start()
    return client


def disconnect(client):
    """
    End a client and its thread.
    """
    client.disconnect()
    client.loop_stop()


class TestRoundTrip:
    def test_the_id_arrives(self, port, version, subscriber, fasten_trail):
        """
        A handler runs under the publisher's id, its topic as the client.
        """

        @subscriber.router.handler("devices/+/setpoint")
        def on_setpoint(msg, ctx):
            fasten.emit("DEVICE_SETPOINT_UPDATED", "dev-42")
            subscriber.seen.put((ctx.request_id, json.loads(msg.payload)))

        with fasten.bind("req-1"):
            send(
                port,
                version,
                "devices/42/setpoint",
                {"target_temp_c": 22.5},
                publish=mqtt.publish_sync,
            )
        rid, payload = subscriber.seen.get(timeout=10)
        row = fasten_trail.assert_emitted("DEVICE_SETPOINT_UPDATED")

        assert "req-1" == rid == row["request_id"]
        assert {"_req": "req-1", "target_temp_c": 22.5} == payload
        assert ("mqtt", "devices/42/setpoint") == (row["method"], row["client"])

    @pytest.mark.parametrize(
        "payload",
        [
            *(b"\xff\x00{", "[1,2]", "", "{broken", "7", b'{"\xff":1}'),
            *('{"a":"é"}'.encode("utf-16-le"), '{"a":1}'.encode("utf-8-sig")),
            *("{" * 100_000, f'{{"x":"{"y" * (256 * 1024)}"}}'),
        ],
        ids=lambda payload: repr(payload[:12]),
    )
    def test_other_payloads_stay_as_they_are(self, port, version, subscriber, payload):
        """
        Arrays, binary and text payloads are not touched; MQTT 5 still has the id.
        """

        @subscriber.router.handler("devices/#")
        def on_any(msg, ctx):
            subscriber.seen.put((ctx.request_id, msg.payload))

        with fasten.bind("req-2"):
            send(port, version, "devices/1", payload, publish=mqtt.publish_sync)
        rid, received = subscriber.seen.get(timeout=10)

        raw = payload.encode() if isinstance(payload, str) else payload
        assert raw == received
        if version == paho.MQTTv5:
            assert "req-2" == rid
        else:
            assert 32 == len(rid)

    def test_the_property_wins_over_the_payload(self, port, subscriber, version):
        """
        Property, then `_req`, then a minted id.
        """
        if version != paho.MQTTv5:
            pytest.skip("properties are of MQTT 5")

        @subscriber.router.handler("devices/#")
        def on_any(_msg, ctx):
            subscriber.seen.put(ctx.request_id)

        properties = Properties(PacketTypes.PUBLISH)
        properties.UserProperty = ("request_id", "from-property")
        send(
            port, version, "devices/1", '{"_req":"from-payload"}', properties=properties
        )
        send(port, version, "devices/1", '{"_req":"from-payload"}')
        send(port, version, "devices/1", "{}")

        assert "from-property" == subscriber.seen.get(timeout=10)
        assert "from-payload" == subscriber.seen.get(timeout=10)
        assert 32 == len(subscriber.seen.get(timeout=10))

    def test_an_async_handler_and_one_that_fails(
        self, port, version, subscriber, caplog
    ):
        """
        In paho's thread coroutines run, and an exception is logged and survived.
        """

        @subscriber.router.handler("devices/bad")
        def on_bad(_msg, _ctx):
            raise ValueError

        @subscriber.router.handler("devices/good")
        async def on_good(_msg, ctx):
            await asyncio.sleep(0)
            subscriber.seen.put(ctx.request_id)

        send(port, version, "devices/bad", "{}")
        send(port, version, "devices/good", '{"_req":"req-3"}')

        assert "req-3" == subscriber.seen.get(timeout=10)
        assert any("devices/bad" in record.getMessage() for record in caplog.records)


def test_hostile_ids_are_minted_over(port, version, subscriber):
    """
    Whatever payload or property hold, none becomes an id, and each message is handled.
    """

    @subscriber.router.handler("devices/#")
    def on_any(_msg, ctx):
        subscriber.seen.put(ctx.request_id)

    sent = [(json.dumps({"_req": value}), None) for value in brokers.HOSTILE_VALUES]
    if version == paho.MQTTv5:
        sent += [("{}", properties) for properties in hostile_properties()]
    client = connected(port, version)
    for payload, properties in sent:
        client.publish("devices/1", payload, qos=1, properties=properties)
    found = [subscriber.seen.get(timeout=10) for _ in sent]
    disconnect(client)

    assert [] == [rid for rid in found if not brokers.is_minted(rid)]
    assert len(sent) == len(set(found))


def hostile_properties():
    """
    Return user properties with what fits into one: a text without NUL, up to 64 KiB.
    """
    for value in brokers.HOSTILE_VALUES:
        if isinstance(value, str) and "\0" not in value and len(value) < 60_000:
            properties = Properties(PacketTypes.PUBLISH)
            properties.UserProperty = ("request_id", value)
            yield properties


def test_a_megabyte_is_passed_on_unread(port):
    """
    A payload over the cap is delivered, under a minted id.
    """
    subscriber = Subscriber(port, paho.MQTTv5, "big/#")
    payload = json.dumps({"_req": "req-9", "x": "y" * 1_000_000})

    @subscriber.router.handler("big/#")
    def on_any(msg, ctx):
        subscriber.seen.put((len(msg.payload), ctx.request_id))

    try:
        send(port, paho.MQTTv5, "big/x", payload)
        size, rid = subscriber.seen.get(timeout=10)
    finally:
        subscriber.close()

    assert len(payload) == size
    assert "req-9" != rid


@pytest.mark.parametrize(
    "protocol", [aiomqtt.ProtocolVersion.V311, aiomqtt.ProtocolVersion.V5]
)
def test_aiomqtt(port, protocol, fasten_trail):
    """
    `await publish` and `await dispatch` carry the id; errors leave as they came.
    """
    router, error = mqtt.Router(), ValueError("mine")

    @router.handler("rooms/+/light")
    async def on_light(_msg, _ctx):
        fasten.emit("SETPOINT_REQUESTED", "light")
        raise error

    async def main():
        async with aiomqtt.Client("127.0.0.1", port, protocol=protocol) as client:
            await client.subscribe("rooms/#", qos=1)
            with fasten.bind("req-4"):
                await mqtt.publish(client, "rooms/1/light", {"on": True}, qos=1)
            async for message in client.messages:
                await router.dispatch(message)

    with pytest.raises(ValueError, match="mine") as raised:
        asyncio.run(asyncio.wait_for(main(), 20))

    assert error is raised.value
    assert "req-4" == fasten_trail.assert_emitted("SETPOINT_REQUESTED")["request_id"]


@pytest.mark.parametrize(
    ("topic_filter", "topic", "is_match"),
    [
        ("a/b", "a/b", True),
        ("a/+", "a/b", True),
        ("a/+", "a/b/c", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("#", "a/b", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("$share/g/a/+", "a/b", True),
        ("a", "a/b", False),
        ("+", "", True),
    ],
)
def test_topic_filters(topic_filter, topic, is_match):
    """
    Filters match as the standard says, which paho agrees with.
    """
    if not topic_filter.startswith("$share") and topic:
        assert is_match == paho.topic_matches_sub(topic_filter, topic)
    assert is_match == mqtt._matches(topic_filter, topic)


def test_publish_outside_a_scope_adds_nothing(port, fasten_trail):
    """
    Where there is no request, there is no id to carry.
    """
    subscriber = Subscriber(port, paho.MQTTv5, "plain/#")

    @subscriber.router.handler("plain/#")
    def on_any(msg, _ctx):
        subscriber.seen.put(msg.payload)

    try:
        send(port, paho.MQTTv5, "plain/x", {"a": 1}, publish=mqtt.publish_sync)

        assert b'{"a":1}' == subscriber.seen.get(timeout=10)
    finally:
        subscriber.close()
