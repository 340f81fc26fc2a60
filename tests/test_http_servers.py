# SPDX-License-Identifier: Apache-2.0
"""
The servers of production, each in its own processes, and all of them at once.

What they serve is in `web`; what each shim does by itself, in `test_shim_*`.
"""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.outside import wait_until
from tests.servers import HOSTILE, attack, gunicorn, pick, talk, uvicorn_process

THREADS: Final = ("--threads", "4", "-k", "gthread")

Server = Callable[[dict[str, str]], AbstractContextManager[str]]

SERVERS: Final[dict[str, Server]] = {
    "uvicorn, FastAPI": lambda env: uvicorn_process("tests.web.fastapi_app:app", env),
    "uvicorn, Starlette": lambda env: uvicorn_process(
        "tests.web.starlette_app:app", env
    ),
    "uvicorn, Django": lambda env: uvicorn_process(
        "tests.web.django_app:asgi", {**env, "WEB_ASYNC": "1"}
    ),
    "gunicorn with threads, Flask": lambda env: gunicorn(
        "tests.web.flask_app:app", *THREADS, env=env
    ),
    "gunicorn with preload, Django": lambda env: gunicorn(
        "tests.web.django_app:wsgi", *THREADS, "-w", "2", "--preload", env=env
    ),
}
WORKS: Final = ("work", "thread", "stream", "boom")


class Store:
    """
    The SQLite files into which a server under test writes.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.env = {
            "FASTEN_SERVICE_ID": name,
            "FASTEN_AUDIT_DSN": f"sqlite:///{self.folder}/audit.db",
            "FASTEN_API_DSN": f"sqlite:///{self.folder}/api.db",
            "FASTEN_STDOUT": "",
        }

    def wait(self, number: int) -> None:
        """
        Wait until the server has delivered *number* rows to each stream.
        """
        for stream in ("audit", "api"):
            wait_until(lambda: len(self.rows(stream)) >= number, 60)  # noqa: B023

    def rows(self, stream: str) -> list[dict[str, Any]]:
        """
        Return what is stored; nothing before the drainer has made the table.
        """
        if not (self.folder / f"{stream}.db").exists():
            return []
        with closing(sqlite3.connect(self.folder / f"{stream}.db")) as database:
            database.row_factory = sqlite3.Row
            with suppress(sqlite3.OperationalError):
                return list(map(dict, database.execute(f"SELECT * FROM {stream}_log")))
        return []


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """
    Return the store of one server.
    """
    return Store(tmp_path, "web")


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
class TestEachServer:
    def test_one_id_in_every_part_of_a_request(self, server, store):
        """
        View, thread, stream, background task, failure: rows and answer agree.
        """
        with server(store.env) as url, httpx.Client(base_url=url) as client:
            for work in WORKS:
                answer = client.get(f"/{work}/t-{work}", headers=_id(f"id-{work}"))
                lines = set(answer.text.split()) if work != "boom" else {f"id-{work}"}

                assert [f"id-{work}"] == answer.headers.get_list("x-request-id")
                assert {f"id-{work}"} == lines
            store.wait(len(WORKS))
        audit, api = store.rows("audit"), store.rows("api")

        assert {(f"t-{work}", f"id-{work}") for work in WORKS} == set(
            pick(audit, "target", "request_id")
        )
        assert [(f"id-{work}", 500 if work == "boom" else 200) for work in WORKS] == (
            sorted(pick(api, "request_id", "status"), key=_order)
        )
        assert {"actor-t-thread"} == {
            row["actor"] for row in audit + api if row["request_id"] == "id-thread"
        }

    def test_attackers_inject_nothing(self, server, store):
        """
        The whole corpus, over sockets: refused by the server, or replaced by us.
        """
        with server(store.env) as url:
            named = [rid for header in HOSTILE.values() for rid in attack(url, header)]
            ok = talk(url, b"GET /work/t HTTP/1.0\r\nHost: x\r\n\r\n")
            store.wait(len(named) + 1)
        stored = set(pick(store.rows("audit"), "request_id"))

        assert b"200" == ok.split(b" ")[1]
        assert len(named) > 5
        assert set(named) <= stored
        assert all(len(rid) == 32 or rid in ("a", "abc") for rid in stored)


def test_uvicorn_delivers_before_it_dies(store):
    """
    It ends by the signal that it caught: what waits is delivered at the lifespan's end.
    """
    with SERVERS["uvicorn, FastAPI"](store.env) as url:
        httpx.get(f"{url}/thread/t1")
        store.wait(1)
        for number in range(2, 51):
            httpx.get(f"{url}/thread/t{number}")

    assert (50, 50) == (len(store.rows("audit")), len(store.rows("api")))


def _id(rid: str | None) -> dict[str, str]:
    return {} if rid is None else {"X-Request-ID": rid}


def _order(row: tuple[str, int]) -> int:
    return WORKS.index(row[0].removeprefix("id-"))


@pytest.mark.slow
def test_two_thousand_requests_mix_no_id(tmp_path):
    """
    All servers at once, half of the requests with an id: none gets another's.
    """
    dice = random.Random(7)
    stores = {name: Store(tmp_path, f"web{n}") for n, name in enumerate(SERVERS)}
    asked = [
        (dice.choice(list(SERVERS)), dice.choice(WORKS), f"t{n}", dice.random() < 0.5)
        for n in range(2000)
    ]
    with ExitStack() as running:
        clients = {
            name: running.enter_context(
                httpx.Client(
                    base_url=running.enter_context(server(stores[name].env)),
                    timeout=60,
                    limits=httpx.Limits(max_connections=8),
                )
            )
            for name, server in SERVERS.items()
        }

        def ask(request: tuple[str, str, str, bool]) -> tuple[str, str]:
            name, work, token, is_named = request
            sent = f"id-{token}" if is_named else None
            headers = _id(sent)
            if work == "boom":  # uvicorn hangs up after an exception
                headers["Connection"] = "close"
            answer = clients[name].get(f"/{work}/{token}", headers=headers)
            (rid,) = answer.headers.get_list("x-request-id")
            seen = {rid} if work == "boom" else set(answer.text.split())
            if sent not in (None, rid) or seen != {rid}:
                mixed.append((request, rid, seen))
            return token, rid

        mixed: list[Any] = []
        with ThreadPoolExecutor(16) as pool:
            answered = list(pool.map(ask, asked))
        for name, store in stores.items():
            store.wait(sum(name == request[0] for request in asked))
    audit = [row for store in stores.values() for row in store.rows("audit")]
    api = [row for store in stores.values() for row in store.rows("api")]

    assert [] == mixed
    assert 2000 == len({rid for _, rid in answered})
    assert Counter(answered) == Counter(pick(audit, "target", "request_id"))
    assert Counter(rid for _, rid in answered) == Counter(pick(api, "request_id"))
    assert {f"actor-{t}" for _, w, t, _ in asked if w == "thread"} == {
        row["actor"] for row in audit if row["actor"].startswith("actor-")
    }
