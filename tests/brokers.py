# SPDX-License-Identifier: Apache-2.0
"""
Real brokers for tests, on loopback and a free port: mosquitto, redis.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.outside import require_binary, wait_until

__all__ = ["mosquitto", "redis"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _running(command: list[str], port: int) -> Iterator[int]:
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as broker:
        try:
            wait_until(lambda: _listens(port), 20)
            yield port
        finally:
            broker.terminate()
            broker.wait(10)


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
