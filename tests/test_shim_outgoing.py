# SPDX-License-Identifier: Apache-2.0
"""
The id on its way out: httpx, requests, child processes; seen by a real server.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import requests

import fasten
from fasten.shim import httpx as httpx_shim
from fasten.shim import requests as requests_shim
from fasten.shim import subprocess as subprocess_shim
from tests.brokers import HOSTILE_IDS, is_minted


@pytest.fixture
def echo():
    """
    Serve each request's X-Request-ID as the body; yield the server's URL.
    """

    class Echo(BaseHTTPRequestHandler):
        def do_GET(self):
            body = (self.headers.get("X-Request-ID") or "none").encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_httpx(echo):
    """
    A client that was installed sends the id, and none outside a scope.
    """
    with httpx_shim.install(httpx.Client(trust_env=False)) as client:
        with fasten.bind("req-1"):
            assert "req-1" == client.get(echo).text
            own = client.get(echo, headers={"X-Request-ID": "mine"})
        assert "mine" == own.text
        assert "none" == client.get(echo).text


def test_httpx_async(echo):
    """
    The async client does the same.
    """

    async def fetch():
        async with httpx_shim.install(httpx.AsyncClient(trust_env=False)) as client:
            with fasten.bind("req-2"):
                return (await client.get(echo)).text

    assert "req-2" == asyncio.run(fetch())


def test_requests(echo):
    """
    A session that was installed sends the id, unless the caller sets one.
    """
    with requests.Session() as session:
        session.trust_env = False
        requests_shim.install(session)
        with fasten.bind("req-3"):
            assert "req-3" == session.get(echo).text
            own = session.get(echo, headers={"X-Request-ID": "mine"})
        assert "mine" == own.text
        assert "none" == session.get(echo).text


CHILD = """
from fasten.shim.subprocess import inherited
with inherited() as ctx:
    print(ctx.request_id, ctx.method)
"""


def child(env):
    """
    Return what a child process says of its scope.
    """
    return subprocess.check_output([sys.executable, "-c", CHILD], env=env, text=True)


def test_child_processes():
    """
    A child finds its parent's id in the environment, and none outside a scope.
    """
    with fasten.bind("req-4"):
        env = subprocess_shim.env()
    assert "req-4 cli" == child(env).strip()
    assert 32 == len(child(subprocess_shim.env()).split()[0])
    assert {"A": "b"} == subprocess_shim.env({"A": "b", "FASTEN_REQUEST_ID": "stale"})


def test_hostile_environments(monkeypatch):
    """
    Whatever the variable holds, it becomes no id; a real child starts all the same.
    """
    # The system lets neither a NUL nor more than 128 KiB into a variable.
    values = [value[:100_000] for value in HOSTILE_IDS if b"\0" not in value]
    found = []
    for value in values:
        monkeypatch.setenv(subprocess_shim.VARIABLE, os.fsdecode(value))
        with subprocess_shim.inherited() as ctx:
            found.append(ctx.request_id)
    env = {**os.environb, subprocess_shim.VARIABLE.encode(): b"\xff" * 100_000}

    assert [] == [rid for rid in found if not is_minted(rid)]
    assert len(values) == len(set(found))
    assert is_minted(child(env).split()[0])
