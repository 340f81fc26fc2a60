# SPDX-License-Identifier: Apache-2.0
"""
The CLI asking a reader over HTTP, and what it says when there is none.
"""

from __future__ import annotations

import json
import os
import socket

import pytest

import fasten
from fasten.cli.source import reader_url
from fasten.reader import ALL_TENANTS, Principal, router
from tests.cli_runs import (
    emit_sample,
    fasten_on,
    in_terminal,
    mounted,
    run,
    served,
)

TOKEN = "s3cret-token"


@pytest.fixture
def shop(store_dsn):
    """
    Run a service with some rows and a reader; return the reader's address.
    """
    with fasten_on(store_dsn, reader_token=TOKEN):
        emit_sample()
        with fasten.bind("a1b2c3d4"):
            fasten.log.info("user_created", user_id="u-42")
            fasten.log.warning("slow")
            fasten.record_api(method="POST", path="/users", status=201)
        assert fasten.flush(20)
        with served(mounted(router().wsgi)) as address:
            yield address


class TestReading:
    def test_a_bare_host_is_the_default_mount(self, shop):
        """
        `--url host` finds the reader at /api/v1/logs; the lines are the page's.
        """
        host = shop.removeprefix("http://")
        for url in (host, shop, f"{shop}/", f"{shop}/api/v1/logs"):
            done = run(
                *("tail", "--url", url, "--token", TOKEN, "--request-id", "a1b2c3d4")
            )

            assert (0, "") == (done.exit_code, done.stderr)
            assert ["USER_CREATED       admin   target=u-42"] == [
                line[22:] for line in done.stdout.splitlines()[:1]
            ]

    def test_the_token_can_come_from_the_environment(self, shop):
        """
        FASTEN_READER_TOKEN is what --token is; other variables do not matter.
        """
        done = run(
            *("tail", "--url", shop),
            FASTEN_READER_TOKEN=f"{TOKEN},older",
            FASTEN_AUDIT_DSN="broken",
        )

        assert 0 == done.exit_code

    def test_filters_and_windows_reach_the_reader(self, shop):
        """
        Filters, limit and window are the reader's to apply.
        """
        words = ("tail", "--url", shop, "--token", TOKEN)
        found = run(*words, "--target", "ord-9001", "-n", "1", "--since", "1h")
        none = run(*words, "--until", "2020-01-01")
        counted = run(*words, "--count", "--code", "ORDER_PLACED")

        assert ["PAYMENT_PROCESSED"] == [
            line[22:39] for line in found.stdout.splitlines()
        ]
        assert "" == none.stdout
        assert "1\n" == counted.stdout

    def test_pages_are_joined(self, store_dsn):
        """
        More rows than a page holds are fetched by cursor, in order.
        """
        with fasten_on(store_dsn, reader_token=TOKEN):
            for number in range(2_345):
                fasten.emit("JOB_COMPLETED", f"j-{number}")
            assert fasten.flush(30)
            with served(mounted(router().wsgi)) as address:
                words = ("tail", "--url", address, "--token", TOKEN)
                words += ("--code", "JOB_COMPLETED")
                every = run(*words, "-n", "all").stdout.splitlines()
                some = run(*words, "-n", "1100").stdout.splitlines()

        assert [f"j-{n}" for n in range(2_345)] == [
            line.partition("target=")[2] for line in every
        ]
        assert every[-1_100:] == some

    @pytest.mark.parametrize("stream", ["sys", "api"])
    def test_rings_are_read_too(self, shop, stream):
        """
        Sys and api rows come from the memory of the process that answers.
        """
        words = ("tail", "--stream", stream, "--url", shop, "--token", TOKEN)
        newest, every = run(*words), run(*words, "-n", "all")

        assert 0 == newest.exit_code
        assert newest.stdout == every.stdout
        assert {"sys": "user_created  user_id=u-42", "api": "POST    /users"}[
            stream
        ] in newest.stdout
        assert 0 == run(*words, *_service(stream)).exit_code

    def test_trace_asks_for_all_three(self, shop):
        """
        `trace` shows the streams of a service that keeps two of them in memory.
        """
        done = run("trace", "a1b2c3d4", "--url", shop, "--token", TOKEN, "-o", "ndjson")
        rows = [json.loads(line) for line in done.stdout.splitlines()]

        assert (0, "") == (done.exit_code, done.stderr)
        assert {"audit": 3, "sys": 2, "api": 1} == {
            shape: sum(row["shape"] == shape for row in rows)
            for shape in ("audit", "sys", "api")
        }
        assert rows == sorted(rows, key=lambda row: row["timestamp"])

    def test_stats_of_a_reader(self, shop):
        """
        The three streams are counted, and which process has two of them is told.
        """
        words = ("stats", "--url", shop, "--token", TOKEN, "--by", "outcome")
        done, told = run(*words), json.loads(run(*words, "-o", "json").stdout)

        assert 0 == done.exit_code
        assert "1  failure" in done.stdout
        assert (2, 1) == (told["sys"]["rows"], told["api"]["rows"])
        assert told["sys"]["oldest"] < told["sys"]["newest"]
        assert f"sys rows are those in the memory of host-01/{os.getpid()}" in (
            done.stderr
        )

    def test_stats_of_more_than_a_page(self, sqlite_dsn, tmp_path):
        """
        Durable log lines are counted to the last one, within the window.
        """
        sys_dsn = f"sqlite:///{tmp_path}/sys.db"
        with fasten_on(sqlite_dsn, sys_dsn=sys_dsn, reader_token=TOKEN):
            for number in range(2_100):
                fasten.log.info("line", n=number)
            assert fasten.flush(20)
            with served(mounted(router().wsgi)) as address:
                words = ("stats", "--url", address, "--token", TOKEN, "-o", "json")
                every = json.loads(run(*words).stdout)
                none = json.loads(run(*words, "--until", "2020-01-01").stdout)

        assert (2_100, 0) == (every["sys"]["rows"], none["sys"]["rows"])

    def test_stats_of_what_one_may_see(self, sqlite_dsn):
        """
        A stream outside one's scopes is named on stderr; nothing at all is exit 1.
        """
        auth = {
            "some": Principal("ann", ALL_TENANTS, scopes={"sys"}),
            "none": Principal("bob", ALL_TENANTS, scopes=frozenset()),
        }
        with fasten_on(sqlite_dsn):
            fasten.log.info("line")
            with served(mounted(router(auth).wsgi)) as address:
                words = ("stats", "--url", address, "--token")
                done, nothing = run(*words, "some"), run(*words, "none")

        assert (0, 1) == (done.exit_code, nothing.exit_code)
        assert done.stdout.startswith("sys             1 rows")
        assert "refuses audit to this token" in done.stderr

    def test_on_a_terminal(self, shop):
        """
        A remote trail is coloured like a local one.
        """
        code, seen = in_terminal(
            "trace", "a1b2c3d4", "--url", shop, FASTEN_READER_TOKEN=TOKEN
        )

        assert 0 == code
        assert "\x1b[36maudit\x1b[0m  USER_CREATED  admin -> u-42" in seen


def _service(stream: str) -> list[str]:
    return ["--service", "api-server"] if stream == "sys" else []


class TestRefusals:
    def test_without_a_token(self, shop):
        """
        401 is refused, and the cure is named.
        """
        done = run("tail", "--url", shop)

        assert 1 == done.exit_code
        assert "give --token, or set FASTEN_READER_TOKEN" in done.stderr

    def test_with_a_wrong_token(self, shop):
        """
        A wrong token is told apart from none, and never shown.
        """
        done = run("tail", "--url", shop, "--token", "hunter2")

        assert 1 == done.exit_code
        assert "it does not know this token" in done.stderr
        assert "hunter2" not in done.stderr

    def test_without_the_scope(self, sqlite_dsn):
        """
        403 says that this token may not.
        """
        auth = {TOKEN: Principal("ops", tenant=None, scopes={"sys"})}
        with (
            fasten_on(sqlite_dsn),
            served(mounted(router(auth=auth).wsgi)) as address,
        ):
            done = run("tail", "--url", address, "--token", TOKEN)

        assert 1 == done.exit_code
        assert "refuses audit to this token" in done.stderr

    def test_a_wrong_mount(self, shop):
        """
        404 says what --url should name.
        """
        done = run("tail", "--url", f"{shop}/elsewhere", "--token", TOKEN)

        assert 3 == done.exit_code
        assert "there is no reader at" in done.stderr

    def test_nobody_there(self):
        """
        A refused connection is not an empty answer.
        """
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        done = run("tail", "--url", f"127.0.0.1:{port}", "--token", TOKEN)

        assert 3 == done.exit_code
        assert "no answer from" in done.stderr
        assert "Connection refused" in done.stderr

    def test_a_name_that_does_not_exist(self):
        """
        DNS trouble is told in one line.
        """
        done = run("tail", "--url", "http://no-such-host.invalid")

        assert 3 == done.exit_code
        assert "no answer from http://no-such-host.invalid" in done.stderr

    @pytest.mark.parametrize(
        "body",
        [
            b"<html>hello</html>",
            b"{}",
            b'{"rows": 5}',
            b'{"rows": [1]}',
            b"[]",
            b"null",
            b'{"rows":' + b"[" * 100_000,
            b"\xff\xfe",
            b'{"rows": [], "total": "many"}',
        ],
    )
    def test_another_server(self, body):
        """
        What is not a reader's answer is said to be none, whatever it is.
        """

        def answer(_environ, start_response):
            start_response("200 OK", [("Content-Type", "text/html")])
            return [body]

        with served(answer) as address:
            done = run("tail", "--url", address)

        assert 3 == done.exit_code
        assert "is no fasten reader" in done.stderr

    @pytest.mark.parametrize(
        ("status", "code", "said"),
        [
            ("503 Service Unavailable", 3, "answers 503: the store sleeps"),
            ("500 Internal Server Error", 3, "answers 500: the store sleeps"),
            ("400 Bad Request", 2, "does not take the query: the store sleeps"),
        ],
    )
    def test_a_problem_is_told_in_its_own_words(self, status, code, said):
        """
        What a reader says in application/problem+json is passed on, made safe.
        """

        def answer(_environ, start_response):
            start_response(status, [("Content-Type", "application/problem+json")])
            return [b'{"detail": "the store sleeps\\u001b[2J"}']

        with served(answer) as address:
            done = run("tail", "--url", address)

        assert code == done.exit_code
        assert said in done.stderr
        assert "\x1b" not in done.stderr

    def test_a_redirect_does_not_get_the_token(self):
        """
        A token goes to the address that was given, and nowhere else.
        """
        got: list[str | None] = []

        def elsewhere(environ, start_response):
            got.append(environ.get("HTTP_AUTHORIZATION"))
            start_response("200 OK", [])
            return [b"{}"]

        with served(elsewhere) as there:

            def answer(_environ, start_response):
                start_response("302 Found", [("Location", f"{there}/logs")])
                return [b""]

            with served(answer) as address:
                done = run("tail", "--url", address, "--token", TOKEN)

        assert 3 == done.exit_code
        assert f"{there}/logs" in done.stderr
        assert [] == got

    @pytest.mark.parametrize(
        "url",
        [
            "ftp://host/logs",
            "http://",
            "http://user:hunter2@host/",
            "http://host/?token=hunter2",
            "http://host:99999/",
            "http://[::1/",
        ],
    )
    def test_what_is_no_address(self, url):
        """
        A broken address is told without what it may hide.
        """
        done = run("tail", "--url", url)

        assert 2 == done.exit_code
        assert "--url is no address" in done.stderr
        assert "hunter2" not in done.stderr

    def test_a_token_that_no_header_can_hold(self, shop):
        """
        A token with a line end is refused before it is sent, and not shown.
        """
        done = run("tail", "--url", shop, "--token", "hunter2\nX: y")

        assert 2 == done.exit_code
        assert "hunter2" not in done.stderr


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("shop.example", "https://shop.example/api/v1/logs"),
        ("shop.example:8443", "https://shop.example:8443/api/v1/logs"),
        ("localhost:8000", "http://localhost:8000/api/v1/logs"),
        ("[::1]:8000", "http://[::1]:8000/api/v1/logs"),
        ("http://shop.example/", "http://shop.example/api/v1/logs"),
        ("https://shop.example/audit/", "https://shop.example/audit"),
        ("shop.example/audit", "https://shop.example/audit"),
    ],
)
def test_what_a_url_means(given, url):
    """
    A bare host is the default mount, over TLS unless it is this machine.
    """

    assert url == reader_url(given)
