# SPDX-License-Identifier: Apache-2.0
"""
The reader's answers: routes, filters, pages, lines and problem documents.

Who gets in is in `test_reader_auth`, what tenants see in `test_reader_tenants`, servers
and frameworks in `test_reader_mounts`.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import tracemalloc
from base64 import urlsafe_b64encode
from contextlib import closing, contextmanager
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fasten
from fasten import reader
from fasten.reader import ALL_TENANTS, Principal
from fasten.reader.parameters import PARAMETERS
from fasten.rows import AUDIT_COLUMNS
from fasten.testing import capture

ENVELOPE = ["rows", "limit", "offset", "next", "total", "completeness"]
LINES = {"Accept": "application/x-ndjson"}


@pytest.fixture
def start(sqlite_dsn):
    """
    Return what starts fasten on a SQLite file, with nothing printed.
    """

    def init(**settings):
        given = {"service_id": "shop", "node_id": "n-1", "audit_dsn": sqlite_dsn}
        return fasten.init(**given, **{"stdout": "", **settings})

    return init


@pytest.fixture
def stored(start):
    """
    Run fasten over a store with one row of each stream, under request id `req-1`.
    """
    start()
    with fasten.bind("req-1", actor="ann", tenant_id="acme"):
        fasten.emit("USER_CREATED", "u-42", detail={"email": "a@ex.com"})
        fasten.log.info("user_created", user_id="u-42")
        fasten.record_api(method="POST", path="/users", route="/users", status=201)
    assert fasten.flush(20)


def ask(route, /, headers=(), *, router=None, verb="GET", **parameters):
    """
    Send one request to a router that lets everybody in; return the response.
    """
    opened = router or reader.router(auth="none")
    return opened.handle(verb, route, urlencode(parameters), headers)


def page(route, /, **parameters):
    """
    Return the envelope of a page.
    """
    response = ask(route, **parameters)
    assert 200 == response.status, response.body
    return json.loads(response.body)


def problem(response):
    """
    Return a problem document, once it is seen to be one.
    """
    assert "application/problem+json" == response.header("content-type")
    body = json.loads(response.body)
    assert response.status == body["status"]
    return body


def lines(response):
    """
    Return the rows of an NDJSON answer.
    """
    assert "application/x-ndjson" == response.header("content-type")
    return [json.loads(line) for line in b"".join(response.body).splitlines()]


class TestRoutes:
    def test_audit(self, stored):
        """
        /audit gives the wire form of the stored row, every key, in order.
        """
        row, *others = page("/audit", request_id="req-1")["rows"]

        assert [] == others
        assert list(AUDIT_COLUMNS) == list(row)
        assert ("USER_CREATED", "u-42", "ann", "acme") == (
            row["code"],
            row["target"],
            row["actor"],
            row["tenant_id"],
        )
        assert {"email": "a@ex.com"} == row["detail"]

    def test_sys(self, stored):
        """
        /sys gives log lines with their free fields.
        """
        (row,) = page("/sys", request_id="req-1")["rows"]

        assert ("sys", "user_created", "u-42") == (
            row["shape"],
            row["event"],
            row["user_id"],
        )

    def test_api(self, stored):
        """
        /api gives requests.
        """
        (row,) = page("/api", request_id="req-1")["rows"]

        assert ("api", "/users", 201) == (row["shape"], row["path"], row["status"])

    def test_correlate(self, stored):
        """
        /correlate gives the three streams in time order, each row with its shape.
        """
        found = page("/correlate", request_id="req-1")
        times = [row["timestamp"] for row in found["rows"]]

        assert ["audit", "sys", "api"] == [row["shape"] for row in found["rows"]]
        assert sorted(times) == times
        assert ENVELOPE == [key for key in found if key != "source"]

    def test_health(self, stored):
        """
        /health tells whether rows are delivered.
        """
        response = ask("/health")

        assert 200 == response.status
        assert "ok" == json.loads(response.body)["state"]

    def test_openapi(self):
        """
        /openapi.json describes all routes, and needs no engine.
        """
        document = json.loads(ask("/openapi.json").body)

        assert "3.1.0" == document["openapi"]
        assert sorted(PARAMETERS) == sorted(document["paths"])

    @pytest.mark.parametrize("path", ["audit", "/audit", "/audit/"])
    def test_slashes_round_a_route_do_not_matter(self, stored, path):
        """
        What a framework leaves of the path differs by a slash.
        """

        assert 200 == ask(path).status

    @pytest.mark.parametrize(
        "path", ["", "/", "/nope", "/audit/x", "/../audit", "/é\0"]
    )
    def test_an_unknown_route_is_404(self, stored, path):
        """
        The problem names the routes that there are.
        """
        response = ask(path)

        assert 404 == response.status
        assert "/correlate" in problem(response)["detail"]

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "WOMBAT"])
    def test_other_methods_are_405(self, stored, method):
        """
        The reader only reads, and says so in Allow.
        """
        response = ask("/audit", verb=method)

        assert 405 == response.status
        assert "GET, HEAD" == response.header("allow")
        assert problem(response)

    @pytest.mark.parametrize("headers", [{}, LINES])
    def test_head_is_get_without_a_body(self, stored, headers):
        """
        HEAD answers with the headers of GET.
        """
        head = ask("/sys", headers, verb="HEAD")

        assert b"" == head.body
        assert ask("/sys", headers).headers == head.headers

    def test_nothing_may_be_cached(self, stored):
        """
        Who did what is nothing for a proxy to keep.
        """
        headers = dict(ask("/audit").headers)

        assert "no-store" == headers["Cache-Control"]
        assert "nosniff" == headers["X-Content-Type-Options"]

    def test_without_an_engine(self):
        """
        Mounted and not initialised: a 503 that says what to call.
        """
        response = ask("/audit")

        assert 503 == response.status
        assert "fasten.init()" in problem(response)["detail"]

    def test_with_an_engine_of_its_own(self, start):
        """
        An engine that is given is asked, whatever the default one is.
        """
        engine = start()
        engine.emit("USER_CREATED", "u-1")
        engine.flush()
        other = reader.router("none", engine=engine)
        fasten.engine.install(None)
        found = json.loads(ask("/audit", router=other).body)
        engine.close()

        assert ["u-1"] == [row["target"] for row in found["rows"]]


class TestEnvelope:
    @pytest.mark.parametrize("path", ["/audit", "/sys", "/api"])
    def test_has_the_same_keys_everywhere(self, stored, path):
        """
        One envelope for all streams; a ring also names its process.
        """
        found = page(path)

        assert ENVELOPE == [key for key in found if key != "source"]
        assert (100, 0, None, None) == tuple(found[key] for key in ENVELOPE[1:5])

    def test_a_store_says_so(self, stored):
        """
        Rows of a store are everybody's rows.
        """
        found = page("/audit")

        assert "store" == found["completeness"]
        assert "source" not in found

    @pytest.mark.parametrize("path", ["/sys", "/api"])
    def test_a_ring_names_its_process(self, stored, path):
        """
        A ring answers for its own process only.
        """
        found = page(path)

        assert ("ring", f"n-1/{os.getpid()}") == (
            found["completeness"],
            found["source"],
        )

    def test_audit_rows_without_a_store_are_a_ring(self):
        """
        Without a DSN the audit stream is what this process remembers.
        """
        fasten.init(service_id="shop", node_id="n-1", stdout="")
        fasten.emit("USER_CREATED", "u-1")
        fasten.flush(20)
        found = page("/audit", code="USER_CREATED", count="true")

        assert ("ring", f"n-1/{os.getpid()}", 1) == (
            found["completeness"],
            found["source"],
            found["total"],
        )

    def test_total_only_when_asked_for(self, stored):
        """
        A count costs a scan; nobody pays for it unasked.
        """

        assert 1 == page("/audit", code="USER_CREATED", count="true")["total"]
        assert page("/audit", code="USER_CREATED", count="false")["total"] is None

    def test_before_the_first_row(self, start):
        """
        A store that does not exist yet has no rows, and is none that is whole.
        """
        start()
        found = page("/audit")

        assert ([], "store-degraded") == (found["rows"], found["completeness"])


KEYS = {"/audit": "target", "/sys": "event", "/api": "path"}


class TestPaging:
    @pytest.fixture(autouse=True)
    def _rows(self, start):
        start()
        with fasten.bind("req-1"):
            for number in range(25):
                fasten.emit("ORDER_PLACED", f"o-{number}")
                fasten.log.info(f"line-{number}")
                fasten.record_api(method="GET", path=f"/{number}", status=200)
        assert fasten.flush(20)

    def all(self, path, key, **parameters):
        """
        Follow `next` to the end.
        """
        found, cursor = [], {}
        while cursor is not None:
            one = page(path, **parameters, **cursor)
            found += [row[key] for row in one["rows"]]
            cursor = {"cursor": one["next"]} if one["next"] else None
        return found

    @pytest.mark.parametrize("path", KEYS)
    def test_newest_first(self, path):
        """
        The newest row stands first, on each route.
        """
        rows = page(path, request_id="req-1", limit=2)["rows"]

        assert ["24", "23"] == [row[KEYS[path]].strip("o-line/") for row in rows]

    @pytest.mark.parametrize("path", KEYS)
    @pytest.mark.parametrize("limit", [1, 7, 25, 26])
    def test_a_cursor_leads_to_the_end(self, path, limit):
        """
        Each row is met once, whatever a page holds.
        """
        key = KEYS[path]
        found = self.all(path, key, request_id="req-1", limit=limit)

        assert 25 == len(found) == len(set(found))

    @pytest.mark.parametrize("path", KEYS)
    def test_offset_skips(self, path):
        """
        `offset` counts from the newest row.
        """
        key = KEYS[path]
        whole = self.all(path, key, request_id="req-1", limit=1000)
        found = page(path, request_id="req-1", offset=20, limit=10)

        assert whole[20:] == [row[key] for row in found["rows"]]
        assert (20, 10, None) == (found["offset"], found["limit"], found["next"])

    def test_oldest_first(self):
        """
        /audit also reads in the order of emission.
        """
        found = self.all("/audit", "target", request_id="req-1", order="asc", limit=10)

        assert [f"o-{number}" for number in range(25)] == found

    @pytest.mark.parametrize("limit", [1, 2, 10, 74, 75, 1000])
    def test_correlate_pages_through_all_streams(self, limit):
        """
        Each row of the three streams is met once, oldest first.
        """
        found, cursor = [], {}
        while cursor is not None:
            one = page("/correlate", request_id="req-1", limit=limit, **cursor)
            assert len(one["rows"]) <= limit
            found += one["rows"]
            cursor = {"cursor": one["next"]} if one["next"] else None
        times = [row["timestamp"] for row in found]

        assert 75 == len({json.dumps(row) for row in found}) == len(found)
        assert sorted(times) == times

    @pytest.mark.parametrize("path", [*KEYS, "/correlate"])
    def test_lines_have_all_rows(self, path):
        """
        NDJSON is the same rows as JSON, to the end.
        """
        expected = page(path, request_id="req-1", limit=1000)["rows"]
        found = lines(ask(path, LINES, request_id="req-1"))

        assert expected == found

    @pytest.mark.parametrize("path", [*KEYS, "/correlate"])
    def test_lines_with_a_limit_are_a_page(self, path):
        """
        With `limit` NDJSON ends there, and a header has the cursor.
        """
        first = ask(path, LINES, request_id="req-1", limit=10)
        cursor = first.header("fasten-next")
        second = ask(path, LINES, request_id="req-1", limit=10, cursor=cursor)
        rows = [*lines(first), *lines(second)]

        assert 20 == len(rows) == len({json.dumps(row) for row in rows})

    def test_lines_say_what_the_envelope_says(self):
        """
        Completeness, source and total of NDJSON are headers.
        """
        ring = ask("/sys", LINES)
        counted = ask("/audit", LINES, code="ORDER_PLACED", count="true", limit=1)

        assert "ring" == ring.header("fasten-completeness")
        assert f"n-1/{os.getpid()}" == ring.header("fasten-source")
        assert "25" == counted.header("fasten-total")

    @pytest.mark.parametrize(
        ("accept", "is_lines"),
        [
            ("application/x-ndjson", True),
            ("APPLICATION/X-NDJSON; q=0.5, text/html", True),
            ("application/x-ndjson, application/json", True),
            ("application/json, application/x-ndjson;q=0.9", False),
            ("application/x-ndjson;q=0", False),
            ("application/x-ndjson;q=wombat", False),
            ("*/*", False),
            ("text/html", False),
            ("", False),
            (",;,q=" * 1000, False),
        ],
    )
    def test_accept(self, accept, is_lines):
        """
        Lines are for who asks for them by name and likes JSON no better.
        """
        response = ask("/audit", {"Accept": accept})

        assert is_lines is (response.header("content-type") == "application/x-ndjson")


class TestFilters:
    @pytest.fixture(autouse=True)
    def _rows(self, store_dsn):
        tables = {
            f"{stream}_dsn": f"{store_dsn}?table={stream}_log"
            for stream in ("audit", "sys")
        }
        fasten.init(service_id="shop", node_id="n-1", stdout="", **tables)
        with fasten.bind("req-1", actor="ann", actor_kind="admin", tenant_id="acme"):
            fasten.emit(
                "USER_CREATED",
                "ü & ?=%",
                reason="a b+c",
                client="10.0.0.1",
                on_behalf_of="bob",
                outcome="denied",
                severity="warn",
                method="cli",
            )
            fasten.log.warning("disk low", path="/var")
            fasten.record_api(method="GET", path="/a b", route="/{x}", status=404)
        with fasten.bind("req-2", actor="bob"):
            fasten.emit("ORDER_PLACED", "o-1")
            fasten.log.info("hello")
            fasten.record_api(method="PUT", path="/o", status=200)
        assert fasten.flush(20)

    def test_every_wire_key_of_an_audit_row(self):
        """
        Each key but detail and the seal finds its row by the row's own value.
        """
        row = next(r for r in page("/audit")["rows"] if r["code"] == "USER_CREATED")
        names = [name for name in PARAMETERS["/audit"] if row.get(name) is not None]
        missed = [
            name
            for name in names
            if row not in page("/audit", **{name: row[name]})["rows"]
        ]

        assert [] == missed
        assert {"id", "tenant_id", "stored_at", "monotonic_seq", "wire_version"} < set(
            names
        )

    @pytest.mark.parametrize(
        ("name", "value"),
        [("tenant", "acme"), ("node", "n-1"), ("service", "shop"), ("seq", "1")],
    )
    def test_short_forms(self, name, value):
        """
        tenant, node, service and seq stand for the longer names.
        """
        rows = page("/audit", **{name: value}, code="USER_CREATED")["rows"]

        assert ["ü & ?=%"] == [row["target"] for row in rows]

    @pytest.mark.parametrize(
        ("parameters", "events"),
        [
            ({"level": "warning"}, ["disk low"]),
            ({"event": "hello"}, ["hello"]),
            ({"logger": "nobody"}, []),
            ({"service": "shop"}, ["hello", "disk low"]),
            ({"q": "DISK"}, ["disk low"]),
            ({"q": "/var"}, ["disk low"]),
            ({"q": "100%"}, []),
        ],
    )
    def test_sys(self, parameters, events):
        """
        /sys filters by its fixed keys, and searches text.
        """

        assert events == [row["event"] for row in page("/sys", **parameters)["rows"]]

    @pytest.mark.parametrize(
        ("parameters", "paths"),
        [
            ({"method": "PUT"}, ["/o"]),
            ({"path": "/a b"}, ["/a b"]),
            ({"route": "/{x}"}, ["/a b"]),
            ({"status": "404"}, ["/a b"]),
            ({"actor": "bob"}, ["/o"]),
            ({"request_id": "req-3"}, []),
        ],
    )
    def test_api(self, parameters, paths):
        """
        /api filters by what a request was.
        """

        assert paths == [row["path"] for row in page("/api", **parameters)["rows"]]

    @pytest.mark.parametrize("path", ["/audit", "/sys", "/api"])
    @pytest.mark.parametrize(
        ("window", "number"),
        [
            ({"since": "1h"}, 2),
            ({"since": "1970-01-01"}, 2),
            ({"since": "0001-01-01"}, 2),
            ({"since": "999y"}, 2),
            ({"until": "1h"}, 0),
            ({"until": "0001-01-01"}, 0),
            ({"until": "9999-12-31"}, 2),
            ({"since": "1h", "until": "9999-12-31"}, 2),
        ],
    )
    def test_window(self, path, window, number):
        """
        `since` and `until` take times and durations back from now, in any century.
        """
        rows = page(path, **window)["rows"]

        assert number == len([r for r in rows if r.get("code") != "AUDIT_READ"])

    @pytest.mark.parametrize("path", ["/sys", "/api"])
    def test_a_cursor_from_elsewhere(self, path):
        """
        A cursor of another stream, or of no number, is refused by ring and store.
        """
        other = page("/audit", limit=1)["next"]
        far = urlsafe_b64encode(f"{path[1]}{'9' * 40}".encode()).decode().rstrip("=")

        assert 400 == ask(path, cursor=other).status
        assert ask(path, cursor=far).status in {200, 400}

    def test_a_long_value_fits(self):
        """
        The longest value there may be, every character escaped, is no 414.
        """
        response = reader.router("none").handle(
            "GET", "/audit", "actor=" + "%F0%9F%98%80" * 4096
        )

        assert 200 == response.status

    @given(
        path=st.sampled_from(["/audit", "/sys", "/api", "/correlate"]), data=st.data()
    )
    def test_any_value_is_answered(self, path, data):
        """
        No value of a known parameter makes the reader fail.
        """
        name = data.draw(st.sampled_from(PARAMETERS[path]))
        value = data.draw(st.text(max_size=40))
        query = f"request_id=r&{name}={quote(value, safe='')}"
        response = reader.router("none").handle("GET", path, query)

        assert response.status in {200, 400}


class TestRefusals:
    @pytest.fixture(autouse=True)
    def _running(self):
        with capture():
            yield

    @pytest.mark.parametrize("name", ["detail", "hash", "salt", "prev_hash"])
    def test_detail_and_seal_are_no_filters(self, name):
        """
        What is inside a row is not searched.
        """
        response = ask("/audit", **{name: "x"})

        assert (400, name) == (response.status, problem(response)["parameter"])

    @pytest.mark.parametrize(
        ("path", "name"),
        [
            *(
                ("/sys", name)
                for name in ("order", "count", "code", "tenant", "status")
            ),
            *(("/api", name) for name in ("order", "count", "q", "level", "service")),
            *(("/correlate", name) for name in ("since", "offset", "order", "code")),
            ("/audit", "q"),
            ("/audit", "level"),
            ("/health", "limit"),
            ("/openapi.json", "limit"),
        ],
    )
    def test_each_route_takes_its_own(self, path, name):
        """
        A parameter of another route is unknown here.
        """
        response = ask(path, **{"request_id": "r", name: "1"})
        if path in {"/health", "/openapi.json"}:
            response = ask(path, **{name: "1"})

        assert (400, name) == (response.status, problem(response)["parameter"])

    def test_a_misspelt_name_is_told_the_real_one(self):
        """
        Who mistypes is told what was meant.
        """

        assert "'request_id'" in problem(ask("/audit", requst_id="x"))["detail"]

    @pytest.mark.parametrize(
        ("query", "name"),
        [
            ("limit=0", "limit"),
            ("limit=1001", "limit"),
            ("limit=-1", "limit"),
            ("limit=1e2", "limit"),
            ("limit=%C2%B2", "limit"),
            ("limit=", "limit"),
            ("limit", "limit"),
            ("limit=1&limit=1", "limit"),
            ("actor=a&actor=b", "actor"),
            ("tenant=a&tenant_id=b", "tenant_id"),
            ("offset=-1", "offset"),
            ("offset=99999999999", "offset"),
            ("order=up", "order"),
            ("count=1", "count"),
            ("since=yesterday", "since"),
            ("until=2026-13-01", "until"),
            ("since=99999y", "since"),
            ("timestamp=now", "timestamp"),
            ("severity=loud", "severity"),
            ("monotonic_seq=one", "monotonic_seq"),
            ("seq=99999999999999999999", "monotonic_seq"),
            ("cursor=!", "cursor"),
            ("cursor=%F0%9F%98%80", "cursor"),
            ("cursor=c3lz", "cursor"),
            ("actor=%FF", "actor"),
            ("actor=%E9", "actor"),
            ("actor=%ED%A0%80", "actor"),
            ("actor=%", "actor"),
            ("actor=%zz", "actor"),
            ("actor=%00", "actor"),
            ("actor=" + "a" * 4097, "actor"),
            ("%FF=1", "%FF"),
            ("=1", ""),
        ],
    )
    def test_a_bad_value_is_400_that_names_it(self, query, name):
        """
        What cannot be meant is refused, and the problem says which.
        """
        response = reader.router("none").handle("GET", "/audit", query)

        assert 400 == response.status, response.body
        assert name == problem(response)["parameter"]

    @pytest.mark.parametrize(
        "places",
        [
            {},
            [],
            "x",
            {"audit": None},
            {"audit": ["x", 0]},
            {"audit": [None, -1]},
            {"audit": [None, True]},
            {"audit": [None, "1"]},
            {"audit": [1, 1]},
            {"audit": [None, 2**70]},
            {"other": [None, 1]},
        ],
    )
    def test_a_made_up_cursor_of_correlate(self, places):
        """
        What somebody wrote into a cursor is judged as any parameter.
        """
        cursor = urlsafe_b64encode(json.dumps(places).encode()).decode().rstrip("=")
        response = ask("/correlate", request_id="req-1", cursor=cursor)

        assert (400, "cursor") == (response.status, problem(response)["parameter"])

    def test_correlate_needs_an_id(self):
        """
        /correlate without an id is no question.
        """
        response = ask("/correlate")

        assert (400, "request_id") == (response.status, problem(response)["parameter"])

    def test_a_query_string_may_be_too_long(self):
        """
        A megabyte is not looked at.
        """
        response = reader.router("none").handle("GET", "/audit", "a=" + "b" * 2**20)

        assert 414 == response.status
        assert problem(response)

    @given(path=st.sampled_from(sorted(PARAMETERS)), query=st.binary(max_size=60))
    def test_any_bytes_are_answered(self, path, query):
        """
        No query string makes the reader fail.
        """
        response = reader.router("none").handle("GET", path, query)

        assert response.status in {200, 400}


class TestReadsAreAudited:
    @contextmanager
    def running(self, **settings):
        with capture(**settings) as trail:
            yield trail, reader.router("none")

    def test_a_read_is_a_row(self):
        """
        Who reads audit rows is on record: the principal, and what it asked for.
        """
        auth = reader.bearer({"t": Principal("auditor", "acme")})
        with capture() as trail:
            opened = reader.router(auth=auth)
            token = {"Authorization": "Bearer t", "X-Request-ID": "from-outside"}
            ask("/audit", token, router=opened, actor="ann", since="7d", limit=5)
        row = trail.assert_emitted("AUDIT_READ", times=1)

        assert ("auditor", "user", "acme", "http", "audit", "fasten") == tuple(
            row[k]
            for k in ("actor", "actor_kind", "tenant_id", "method", "target", "domain")
        )
        assert "from-outside" == row["request_id"]
        assert {"route": "/audit", "filters": {"actor": "ann", "since": "7d"}} == row[
            "detail"
        ]

    def test_the_same_read_is_on_record_once_in_five_minutes(self):
        """
        A dashboard that asks every second does not fill the log.
        """
        with self.running() as (trail, opened):
            for seconds in (0, 1, 298, 2, 1):
                trail.clock.advance(seconds)
                ask("/audit", router=opened, actor="ann")
        assert 2 == len(trail.rows("AUDIT_READ"))

    def test_a_clock_that_steps_back_silences_nothing(self):
        """
        A read at an earlier time than the last one is written down.
        """
        with self.running() as (trail, opened):
            ask("/audit", router=opened)
            trail.clock.advance(-3600)
            ask("/audit", router=opened)

        assert 2 == len(trail.rows("AUDIT_READ"))

    def test_paging_is_one_read(self):
        """
        The pages of an answer are one answer.
        """
        with self.running() as (trail, opened):
            for parameters in (
                {},
                {"limit": 5},
                {"offset": 5},
                {"order": "asc"},
                {"count": "true"},
            ):
                ask("/audit", router=opened, **parameters)

        assert 1 == len(trail.rows("AUDIT_READ"))

    def test_another_question_is_another_read(self):
        """
        Other filters, another route, another principal: each is on record.
        """
        tokens = {
            "a": Principal("ann", ALL_TENANTS),
            "b": Principal("bob", ALL_TENANTS),
        }
        with capture() as trail:
            opened = reader.router(auth=tokens)
            for token in tokens:
                headers = {"Authorization": f"Bearer {token}"}
                ask("/audit", headers, router=opened)
                ask("/audit", headers, router=opened, request_id="r")
                ask("/correlate", headers, router=opened, request_id="r")

        assert 6 == len(trail.rows("AUDIT_READ"))

    def test_what_is_no_read_of_audit_rows(self):
        """
        Log lines, requests, health, refusals and mistakes leave no row.
        """
        tokens = {"s": Principal("sam", "acme", {"sys", "api"})}
        with capture() as trail:
            opened = reader.router(auth=tokens)
            headers = {"Authorization": "Bearer s"}
            for path in ("/sys", "/api", "/health", "/openapi.json", "/audit"):
                ask(path, headers, router=opened)
            ask("/correlate", headers, router=opened, request_id="r")
            ask("/audit", router=opened)
            ask("/audit", router=reader.router("none"), limit="x")

        trail.assert_not_emitted("AUDIT_READ")

    def test_it_is_not_recursive(self, start):
        """
        Reading the record of reads adds one row, not one for each.
        """
        start()
        opened = reader.router("none")
        for _ in range(5):
            ask("/audit", router=opened, code="AUDIT_READ")
            fasten.flush(20)
        found = json.loads(ask("/audit", router=opened, code="AUDIT_READ").body)

        assert 1 == len(found["rows"])

    def test_a_failure_to_record_fails_no_read(self, start, caplog):
        """
        Rows can be read where none can be taken; the log says what was not recorded.
        """
        engine = start(spool=False, queue_capacity=1, on_full="raise")
        with (
            engine.delivery.drainer.guard(),
            caplog.at_level(logging.WARNING, logger="fasten"),
        ):
            engine._queue = _Full()
            response = ask("/audit")

        assert 200 == response.status
        assert "was not recorded (QueueFull)" in caplog.text

    def test_memory_is_bounded(self, monkeypatch):
        """
        Of a million different questions some thousand hashes are remembered.
        """
        monkeypatch.setattr("fasten.reader.reads.REMEMBERED", 64)
        with self.running() as (trail, opened):
            for number in range(100):
                ask("/audit", router=opened, target=f"t-{number}")
            noted = opened._reader._reads._noted
            ask("/audit", router=opened, target="t-0")
            ask("/audit", router=opened, target="t-99")

        assert 64 == len(noted)
        assert 101 == len(trail.rows("AUDIT_READ"))

    def test_threads_record_one_read(self):
        """
        Requests that come at the same time are one read.
        """
        with self.running() as (trail, opened):
            threads = [
                threading.Thread(
                    target=ask, args=("/audit",), kwargs={"router": opened}
                )
                for _ in range(16)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        assert 1 == len(trail.rows("AUDIT_READ"))

    def test_another_engine_is_another_log(self):
        """
        After init() everything is read for the first time.
        """
        opened = reader.router("none")
        for _ in range(2):
            with capture() as trail:
                ask("/audit", router=opened)
            trail.assert_emitted("AUDIT_READ", times=1)


class _Full:
    """
    A queue that takes nothing.
    """

    def append(self, payload, row):
        return 0


class TestTrouble:
    @pytest.mark.parametrize(
        "text", ["no json", "[1]", '"x"', "1 ", "{", "", "[" * 100_000]
    )
    def test_an_edited_detail(self, start, text):
        """
        One row that somebody wrote nonsense into does not hide the others.
        """
        engine = start()
        for target in ("edited", "whole"):
            fasten.emit("USER_CREATED", target, detail={"a": 1})
        assert fasten.flush(20)
        with closing(sqlite3.connect(engine.settings.audit_dsn.path)) as store, store:
            store.execute(
                "UPDATE audit_log SET detail = ? WHERE target = 'edited'", (text,)
            )
        rows = page("/audit", code="USER_CREATED")["rows"]

        assert ["whole", "edited"] == [row["target"] for row in rows]
        assert {"a": 1} == rows[0]["detail"]
        assert ["value"] == list(rows[1]["detail"])

    def test_a_store_that_cannot_be_read(self, start, tmp_path):
        """
        A broken store is a 503 that tells an operator why, and others nothing of it.
        """
        start()
        (tmp_path / "audit.db").write_bytes(b"this is no database at all" * 100)
        tokens = {"op": Principal("op", ALL_TENANTS), "t": Principal("t", "acme")}
        opened = reader.router(auth=tokens)
        said = {
            token: ask("/audit", {"Authorization": f"Bearer {token}"}, router=opened)
            for token in tokens
        }

        assert [503, 503] == [response.status for response in said.values()]
        assert "not a database" in problem(said["op"])["detail"]
        assert "audit.db" not in problem(said["t"])["detail"]
        assert "5" == said["op"].header("retry-after")

    @pytest.mark.parametrize("path", ["/audit", "/correlate?request_id=r"])
    def test_no_secret_is_told(self, path):
        """
        A server that refuses is a 503 without the password.
        """
        fasten.init(
            service_id="shop",
            stdout="",
            audit_dsn="postgres://user:hunter2@127.0.0.1:1/app",
        )
        route, _, query = path.partition("?")
        response = reader.router("none").handle("GET", route, query)

        assert 503 == response.status
        assert b"hunter2" not in response.body
        assert b"not reachable" in response.body

    def test_a_query_that_takes_too_long(self, start, monkeypatch, tmp_path):
        """
        A scan is stopped at the end of its budget.
        """
        start()
        fasten.emit("USER_CREATED", "u-1")
        assert fasten.flush(20)
        monkeypatch.setattr("fasten.reader.routes.BUDGET_S", -1.0)
        monkeypatch.setattr("fasten.repository.database.STEPS", 1)
        response = ask("/audit")

        assert 503 == response.status
        assert "took too long" in problem(response)["detail"]

        monkeypatch.undo()

        assert 200 == ask("/audit").status

    @pytest.mark.slow
    def test_a_stopped_server(self, private_postgres, monkeypatch):
        """
        A Postgres that answers nothing costs the budget, and comes back by itself.
        """
        monkeypatch.setattr("fasten.reader.routes.BUDGET_S", 0.5)
        fasten.init(service_id="shop", stdout="", audit_dsn=private_postgres.dsn())
        fasten.emit("USER_CREATED", "u-1")
        assert fasten.flush(20)
        assert 200 == ask("/audit").status
        assert fasten.flush(20)
        private_postgres.pause()
        stopped = ask("/sys"), ask("/audit")
        private_postgres.resume()

        assert [200, 503] == [response.status for response in stopped]
        assert 200 == ask("/audit").status

    def test_a_store_that_fails_while_lines_are_read(self, start):
        """
        What was promised and cannot be sent is an error, not an early end.
        """
        engine = start()
        for number in range(250):
            fasten.emit("USER_CREATED", f"u-{number}")
        assert fasten.flush(20)
        body = ask("/audit", LINES).body
        first = next(body)
        with closing(sqlite3.connect(engine.settings.audit_dsn.path)) as store:
            store.execute("ALTER TABLE audit_log RENAME TO gone")

        assert 200 == len(first.splitlines())
        with pytest.raises(fasten.AuditStoreError, match="cannot be read"):
            list(body)

    def test_a_bug_is_a_500_without_a_traceback(self, stored, monkeypatch, caplog):
        """
        Should the reader itself fail, the log has the traceback and the caller none.
        """
        opened = reader.router("none")
        monkeypatch.delattr(opened._reader, "_reads")
        with caplog.at_level(logging.ERROR, logger="fasten"):
            response = ask("/audit", router=opened)

        assert 500 == response.status
        assert b"_reads" not in response.body
        assert "_reads" in caplog.text

    def test_rows_that_json_has_no_form_for(self, start):
        """
        Whatever a log line held, it comes out as JSON.
        """
        start()
        fasten.log.info("odd", text="\ud800", number=float("nan"), thing=object())
        rows = page("/sys")["rows"]

        assert "odd" == rows[0]["event"]


class TestMemory:
    @pytest.mark.slow
    def test_lines_take_constant_memory(self, start):
        """
        Eight times as many rows take no more memory.
        """
        start(spool_max_bytes="1GiB", queue_capacity=100_000)
        peaks = []
        for number in (1_000, 8_000):
            for _ in range(number):
                fasten.emit("USER_CREATED", "u", detail={"text": "x" * 200})
            assert fasten.flush(60)
            tracemalloc.start()
            size = sum(len(piece) for piece in ask("/audit", LINES).body)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert size > number * 800

        assert peaks[1] < 1.5 * peaks[0] < 10_000_000
