# SPDX-License-Identifier: Apache-2.0
"""
Real HTTP servers, in a thread of this process or in processes of their own.

What they serve is in `web_apps`.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from operator import itemgetter
from typing import Any, Final
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, make_server

import uvicorn

from tests.outside import ROOT, wait_until

__all__ = [
    "HOSTILE",
    "asgi_thread",
    "attack",
    "dial",
    "free_port",
    "gunicorn",
    "pick",
    "running",
    "talk",
    "uvicorn_process",
    "wsgi_thread",
]

HOST: Final = "127.0.0.1"


@contextmanager
def asgi_thread(app: Any, **options: Any) -> Iterator[str]:
    """
    Serve *app* with uvicorn from a thread; yield its URL.
    """
    with socket.create_server((HOST, 0)) as listener:
        config = uvicorn.Config(app, log_level="critical", **options)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive(), 20)
            yield f"http://{HOST}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def wsgi_thread(app: Any) -> Iterator[str]:
    """
    Serve *app* with the standard library's server from one thread; yield its URL.
    """
    with make_server(HOST, 0, app, handler_class=_Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(20)


def free_port() -> int:
    """
    Return a port on which nobody listens just now.
    """
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running(
    command: list[str], port: int, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """
    Run a server's *command* until it answers on *port*; yield its URL.

    At the end it is asked to stop, and waited for.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(lambda: _answers(port) or process.poll() is not None, 60)
            if process.poll() is not None:
                output.seek(0)
                raise RuntimeError(output.read().decode())
            yield f"http://{HOST}:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


def uvicorn_process(
    app: str, env: Mapping[str, str] | None = None
) -> AbstractContextManager[str]:
    """
    Serve the application that *app* names with uvicorn; a context manager of its URL.
    """
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", app, "--port", str(port)]
    command += ["--log-level", "error", "--timeout-keep-alive", "60"]
    return running(command, port, env)


def gunicorn(
    app: str, *options: str, env: Mapping[str, str] | None = None
) -> AbstractContextManager[str]:
    """
    Serve the application that *app* names with gunicorn; a context manager of its URL.
    """
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", app, "-b", f"{HOST}:{port}"]
    command += ["--log-level", "error", "--keep-alive", "60", *options]
    return running(command, port, env)


def talk(url: str, request: bytes) -> bytes:
    """
    Send *request* over a socket as it is, and return all that comes back.
    """
    with dial(url) as connection:
        # A server may refuse, and hang up, before it has read a megabyte.
        with suppress(OSError):
            connection.sendall(request)
        answer = b""
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
        return answer


def dial(url: str) -> socket.socket:
    """
    Return a socket that is connected to the server of *url*.
    """
    place = urlsplit(url)
    return socket.create_connection((place.hostname or HOST, place.port or 80), 20)


def pick(rows: list[dict[str, Any]], *names: str) -> list[Any]:
    """
    Return the columns *names* of *rows*; of one name its values, of several tuples.
    """
    return list(map(itemgetter(*names), rows))


HOSTILE: Final = {
    "bare CR": b"X-Request-ID: a\rSet-Cookie: evil=1\r\n",
    "bare LF": b"X-Request-ID: a\nSet-Cookie: evil=1\r\n",
    "folded line": b"X-Request-ID: a\r\n Set-Cookie: evil=1\r\n",
    "percent-encoded CRLF": b"X-Request-ID: a%0d%0aSet-Cookie:%20evil=1\r\n",
    "NUL": b"X-Request-ID: a\0b\r\n",
    "a megabyte": b"X-Request-ID: " + b"a" * 2**20 + b"\r\n",
    "129 characters": b"X-Request-ID: " + b"a" * 129 + b"\r\n",
    "65 copies": b"X-Request-ID: abc\r\n" * 65,
    "two that differ": b"X-Request-ID: abc\r\nX-Request-ID: def\r\n",
    "ANSI": b"X-Request-ID: \x1b[31mred\x1b[0m\r\n",
    "right to left": "X-Request-ID: \u202egnp.exe\r\n".encode(),
    "Latin-1": b"X-Request-ID: \xe9t\xe9\r\n",
    "empty": b"X-Request-ID:\r\n",
    "a space": b"X-Request-ID: a b\r\n",
    "JSON": b'X-Request-ID: a","status":"200\r\n',
    "a sentinel": b"X-Request-ID: boot-shop-0123456789ab\r\n",
    "a row's id": b"X-Request-ID: evt-01ARZ3NDEKTSV4RRFFQ69G5FAV\r\n",
    "traceparent of zeros": b"traceparent: 00-"
    + b"0" * 32
    + b"-1234567890abcdef-01\r\n",
    "underscores": b"X_Request_ID: a\r\n",
}
"""Header lines of attackers, by what is wrong with them."""

_IDS: Final = re.compile(rb"^x-request-id: *(.*?)\r$", re.IGNORECASE | re.MULTILINE)


def attack(url: str, header: bytes) -> list[str]:
    """
    Send a request with the lines of *header*; return the ids that the answer names.

    Empty where the server itself refused the request.

    Raises:
        AssertionError: something of the header got into the answer.
    """
    start = b"GET /work/attacked HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    answer = talk(url, start + header + b"\r\n")
    head, _, _ = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    assert b"evil" not in head, head
    if status != [b"200"]:
        assert status in ([], [b"400"], [b"413"], [b"431"]), head
        return []
    return [found.decode("latin-1") for found in _IDS.findall(head + b"\r\n")]
