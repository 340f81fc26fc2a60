# SPDX-License-Identifier: Apache-2.0
"""
Who gets into the reader, and which streams they may read.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import traceback
from types import FunctionType, ModuleType

import pytest

import fasten
from fasten import reader
from fasten.reader import ALL_TENANTS, Principal, bearer
from fasten.reader.parameters import PARAMETERS
from fasten.testing import capture

CANARY = "canary-7f3a91c2"
ROUTES = sorted(PARAMETERS)


def ask(router, path="/audit", token=None, headers=None, method="GET"):
    """
    Send one request; return the response.
    """
    given = dict(headers or {})
    if token is not None:
        given["Authorization"] = f"Bearer {token}"
    query = "request_id=r" if path == "/correlate" else ""
    return router.handle(method, path, query, given)


def detail(response):
    """
    Return what a problem document says.
    """
    return json.loads(response.body)["detail"]


def _reachable(root):
    """
    Return what *root* holds, and what that holds; modules, classes and code left out.
    """
    found, waiting = {}, [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in found or isinstance(thing, type | FunctionType | ModuleType):
            continue
        found[id(thing)] = thing
        waiting += gc.get_referents(thing)
    return list(found.values())


@pytest.fixture
def running():
    """
    Run fasten in memory.
    """
    with capture() as trail:
        yield trail


class TestPrincipal:
    @pytest.mark.parametrize("tenant", ["acme", None, ALL_TENANTS])
    def test_sees_all_streams_by_default(self, tenant):
        """
        A principal has a name, a tenant, and all three streams.
        """
        principal = Principal("ann", tenant)

        assert ("ann", tenant) == (principal.name, principal.tenant)
        assert {"audit", "sys", "api"} == principal.scopes

    def test_a_tenant_is_required(self):
        """
        Nobody forgets the tenant and lets in the world.
        """
        with pytest.raises(TypeError, match="tenant"):
            Principal("ann")

    @pytest.mark.parametrize(
        ("tenant", "error"),
        [
            ("", ValueError),
            (0, TypeError),
            (True, TypeError),
            (b"acme", TypeError),
            (["acme"], TypeError),
            (..., TypeError),
        ],
    )
    def test_a_tenant_is_a_name_or_none_or_all(self, tenant, error):
        """
        What is no tenant is refused when the principal is made.
        """
        with pytest.raises(error, match="tenant"):
            Principal("ann", tenant)

    def test_the_text_all_tenants_is_a_tenant_of_that_name(self):
        """
        No string opens everything.
        """

        assert not Principal("ann", "ALL_TENANTS").sees_everything
        assert not Principal("ann", ALL_TENANTS.value).sees_everything

    @pytest.mark.parametrize(("name", "error"), [("", ValueError), (None, TypeError)])
    def test_a_name_is_required(self, name, error):
        """
        Reads are recorded under the name: there has to be one.
        """
        with pytest.raises(error, match="name"):
            Principal(name, "acme")

    @pytest.mark.parametrize(
        ("scopes", "error"),
        [("audit", TypeError), ({"audits"}, ValueError), ({"audit", 1}, ValueError)],
    )
    def test_scopes_are_streams(self, scopes, error):
        """
        A misspelt scope is an error, not a closed door.
        """
        with pytest.raises(error, match="scope"):
            Principal("ann", "acme", scopes)

    def test_any_collection_of_scopes_does(self):
        """
        A list is as good as a set.
        """

        assert frozenset({"sys"}) == Principal("ann", "acme", ["sys"]).scopes

    def test_cannot_be_changed(self):
        """
        Nothing widens a principal afterwards.
        """
        with pytest.raises(AttributeError):
            Principal("ann", "acme").tenant = ALL_TENANTS


class TestDeniedByDefault:
    @pytest.mark.parametrize("path", [*ROUTES, "/nope", "/"])
    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
    def test_every_route_is_401(self, running, path, method):
        """
        Without auth= and without a token nobody learns so much as what routes exist.
        """
        response = ask(reader.router(), path, method=method)

        assert 401 == response.status
        assert 'Bearer realm="fasten"' == response.header("www-authenticate")

    @pytest.mark.parametrize("token", [None, "", "x", "None", "none"])
    def test_no_token_opens_it(self, running, token):
        """
        Where no token is set, none is right.
        """
        response = ask(reader.router(), token=token)

        assert 401 == response.status
        assert "FASTEN_READER_TOKEN" in detail(response)
        assert "auth=" in detail(response)

    def test_before_init(self):
        """
        Before init() there is no token either.
        """

        assert 401 == ask(reader.router(), token="x").status
        assert 401 == reader.handle("GET", "/audit").status


class TestOwnToken:
    def test_opens_the_reader(self):
        """
        FASTEN_READER_TOKEN lets in who carries it, and no other.
        """
        with capture(reader_token=CANARY):
            opened = reader.router()

            assert 200 == ask(opened, token=CANARY).status
            assert 401 == ask(opened, token=CANARY[:-1]).status
            assert 401 == ask(opened, token=CANARY + "x").status
            assert 401 == ask(opened).status

    def test_is_read_from_the_environment(self, monkeypatch):
        """
        The variable is all it takes, whenever init() is called.
        """
        opened = reader.router()
        monkeypatch.setenv("FASTEN_READER_TOKEN", CANARY)
        fasten.init(service_id="shop", stdout="")

        assert 200 == ask(opened, token=CANARY).status
        assert (
            200
            == reader.handle(
                "GET", "/audit", "", {"authorization": f"bearer {CANARY}"}
            ).status
        )

    def test_several_for_rotation(self):
        """
        The old token and the new one are right at the same time.
        """
        with capture(reader_token="old-1,new-2"):
            opened = reader.router()

            assert 200 == ask(opened, token="old-1").status
            assert 200 == ask(opened, token="new-2").status
            assert 401 == ask(opened, token="old-1,new-2").status

    def test_follows_a_new_init(self):
        """
        After init() with another token the one before is wrong.
        """
        opened = reader.router()
        with capture(reader_token="one"):
            assert 200 == ask(opened, token="one").status
        with capture(reader_token="two"):
            assert 401 == ask(opened, token="one").status
            assert 200 == ask(opened, token="two").status
        assert 401 == ask(opened, token="two").status

    @pytest.mark.parametrize(
        ("tenant", "targets"), [(None, ["none", "acme"]), ("acme", ["acme"])]
    )
    def test_sees_all_tenants_unless_the_service_has_one(
        self, sqlite_dsn, tenant, targets
    ):
        """
        FASTEN_TENANT_ID bounds the service's own token.
        """
        fasten.init(service_id="s", stdout="", audit_dsn=sqlite_dsn)
        fasten.emit("USER_CREATED", "acme", tenant_id="acme")
        fasten.emit("USER_CREATED", "none")
        assert fasten.flush(20)
        fasten.init(
            service_id="s",
            stdout="",
            audit_dsn=sqlite_dsn,
            tenant_id=tenant,
            reader_token=CANARY,
        )
        headers = {"Authorization": f"Bearer {CANARY}"}
        response = reader.router().handle("GET", "/audit", "code=USER_CREATED", headers)

        assert targets == [row["target"] for row in json.loads(response.body)["rows"]]

    def test_rows_of_a_service_with_a_tenant_are_the_tenants(self, sqlite_dsn):
        """
        What such a service records without a tenant carries FASTEN_TENANT_ID.
        """
        fasten.init(
            service_id="s",
            stdout="",
            audit_dsn=sqlite_dsn,
            tenant_id="acme",
            reader_token=CANARY,
        )
        with fasten.bind("req-1"):
            fasten.emit("USER_CREATED", "u-1")
            fasten.log.info("hello")
            fasten.record_api(method="GET", path="/", status=200)
        fasten.flush(20)
        headers = {"Authorization": f"Bearer {CANARY}"}
        response = reader.handle("GET", "/correlate", "request_id=req-1", headers)
        rows = json.loads(response.body)["rows"]

        assert [("audit", "acme"), ("sys", "acme"), ("api", "acme")] == [
            (row["shape"], row["tenant_id"]) for row in rows
        ]


class TestBearer:
    def test_knows_each_by_a_token(self, running):
        """
        Each token is its own principal.
        """
        opened = reader.router(
            auth=bearer({"a": Principal("ann", "x"), "b": Principal("bob", "y")})
        )
        ask(opened, token="b")

        assert "bob" == running.assert_emitted("AUDIT_READ", times=1)["actor"]

    def test_a_mapping_is_enough(self, running):
        """
        `auth={token: Principal}` is bearer(...) of it.
        """
        opened = reader.router(auth={"t": Principal("ann", "acme")})

        assert [200, 401] == [ask(opened, token=t).status for t in ("t", "u")]

    def test_the_services_own_token_is_another_door(self):
        """
        With auth= only who is in it gets in.
        """
        with capture(reader_token=CANARY):
            opened = reader.router(auth={"t": Principal("ann", "acme")})

            assert 401 == ask(opened, token=CANARY).status

    @pytest.mark.parametrize(
        ("value", "status"),
        [
            ("Bearer tok", 200),
            ("bearer tok", 200),
            ("BEARER   tok  ", 200),
            ("Bearer tok tok", 401),
            ("Bearer tok, Bearer tok", 401),
            ("Bearer", 401),
            ("Bearer ", 401),
            ("Bearer\ttok", 401),
            ("Basic tok", 401),
            ("tok", 401),
            ("Bearer t\xf6k", 401),
            ("Bearer tok\0", 401),
            ("Bearer tok\n", 401),
            ("Bearer " + "t" * 1_000_000, 401),
            ("", 401),
        ],
    )
    def test_the_header(self, running, value, status):
        """
        Scheme in any case, one token, nothing else.
        """
        opened = reader.router(auth={"tok": Principal("ann", "acme")})

        assert status == ask(opened, headers={"authorization": value}).status

    def test_two_headers_are_none(self, running):
        """
        Who sends two tokens is not guessed at.
        """
        opened = reader.router(auth={"tok": Principal("ann", "acme")})
        twice = [("Authorization", "Bearer tok"), ("authorization", "Bearer tok")]

        assert 401 == opened.handle("GET", "/audit", "", twice).status

    def test_a_wrong_token_is_told_from_none(self, running):
        """
        RFC 6750: invalid_token where one was sent.
        """
        opened = reader.router(auth={"tok": Principal("ann", "acme")})
        without, wrong = ask(opened), ask(opened, token="x")

        assert "error" not in without.header("www-authenticate")
        assert 'error="invalid_token"' in wrong.header("www-authenticate")

    @pytest.mark.parametrize("token", ["", "a b", "tök", "a\n", 5, b"x"])
    def test_a_token_no_header_carries(self, token):
        """
        It is refused when the service starts, and not shown.
        """
        with pytest.raises(ValueError, match="visible ASCII") as caught:
            bearer({token: Principal("ann", "acme")})

        assert repr(token) not in str(caught.value) or token == ""

    def test_a_value_that_is_no_principal(self):
        """
        A name alone is nobody.
        """
        with pytest.raises(TypeError, match="Principal"):
            bearer({CANARY: "ann"})

    def test_only_hashes_are_kept(self):
        """
        Nothing that the reader holds leads to a token.
        """
        opened = reader.router(auth=bearer({CANARY: Principal("ann", "acme")}))
        held = _reachable(opened._reader)

        assert CANARY not in [thing for thing in held if isinstance(thing, str)]
        assert "ann" in [thing for thing in held if isinstance(thing, str)]
        assert CANARY not in repr(opened._reader._authenticate)

    def test_each_token_is_compared(self, monkeypatch):
        """
        The answer takes as long whichever token is right, and in constant time each.
        """
        compared = []

        def compare(one, other):
            compared.append((one, other))
            return one == other

        monkeypatch.setattr("fasten.reader.auth.compare_digest", compare)
        known = bearer({str(n): Principal("p", None) for n in range(5)})
        for token in ("0", "4", "x"):
            known({"authorization": f"Bearer {token}"})

        assert 15 == len(compared)
        assert {32} == {len(digest) for pair in compared for digest in pair}


class TestCallable:
    def test_gets_the_headers(self, running):
        """
        Lower-case names, values as they came.
        """
        seen = []

        def auth(headers):
            seen.append(dict(headers))
            return Principal(headers["x-user"], "acme")

        ask(reader.router(auth=auth), headers={"X-User": "ann", "Cookie": "a=b"})

        assert [{"x-user": "ann", "cookie": "a=b"}] == seen
        assert "ann" == running.assert_emitted("AUDIT_READ")["actor"]

    def test_none_is_nobody(self, running):
        """
        A callable that knows nobody lets in nobody.
        """

        assert 401 == ask(reader.router(auth=lambda headers: None)).status

    @pytest.mark.parametrize("answer", [True, "ann", 1, {"tenant": "acme"}, ...])
    def test_anything_else_is_no_principal(self, running, answer, caplog):
        """
        A truthy answer opens nothing; the log says what to return.
        """
        with caplog.at_level(logging.ERROR, logger="fasten"):
            response = ask(reader.router(auth=lambda headers: answer))

        assert 503 == response.status
        assert "fasten.reader.Principal" in caplog.text

    def test_an_exception_lets_in_nobody(self, running, caplog):
        """
        A directory that is down is a 503, and its message stays inside.
        """

        def auth(headers):
            raise RuntimeError(CANARY)

        with caplog.at_level(logging.ERROR, logger="fasten"):
            response = ask(reader.router(auth=auth))

        assert 503 == response.status
        assert CANARY not in response.body.decode() + caplog.text
        assert "RuntimeError" in caplog.text

    def test_is_asked_for_every_route(self, running):
        """
        There is no route beside the door.
        """
        asked = []
        opened = reader.router(auth=asked.append)
        for path in [*ROUTES, "/nope"]:
            assert 401 == ask(opened, path).status

        assert len(ROUTES) + 1 == len(asked)

    def test_a_coroutine_function_is_refused(self):
        """
        It would return something truthy and never run.
        """

        async def auth(headers):
            return None

        class Auth:
            async def __call__(self, headers):
                return None

        for given in (auth, Auth(), functools.partial(auth)):
            with pytest.raises(TypeError, match="coroutine"):
                reader.router(auth=given)


class TestAuthArgument:
    @pytest.mark.parametrize("auth", ["", "None", CANARY, 1, True, object(), ["t"]])
    def test_what_could_not_tell_is_refused(self, auth):
        """
        A token in place of a map is a mistake, and is not shown.
        """
        with pytest.raises(TypeError, match="auth=") as caught:
            reader.router(auth=auth)

        assert CANARY not in str(caught.value)

    def test_none_as_text_opens_it(self, running):
        """
        `auth="none"` opens the reader on purpose; reads are on record all the same.
        """

        assert 200 == ask(reader.router(auth="none")).status
        assert "anonymous" == running.assert_emitted("AUDIT_READ")["actor"]

    def test_an_empty_map_lets_in_nobody(self, running):
        """
        No tokens, nobody.
        """

        assert 401 == ask(reader.router(auth={}), token="").status

    def test_no_secret_in_a_traceback(self):
        """
        What is raised over a bad map shows none of its tokens.
        """
        try:
            bearer({CANARY: None})
        except TypeError as error:
            told = traceback.TracebackException.from_exception(error)

        assert CANARY not in "".join(told.format())


class TestScopes:
    @pytest.mark.parametrize("scope", ["audit", "sys", "api"])
    def test_a_stream_outside_is_403(self, running, scope):
        """
        A principal reads the streams in its scopes and no other.
        """
        opened = reader.router(auth={"t": Principal("ann", "acme", {scope})})
        found = {
            p: ask(opened, p, token="t").status for p in ("/audit", "/sys", "/api")
        }

        assert {path: 200 if path == f"/{scope}" else 403 for path in found} == found

    def test_comes_before_any_judgement_of_the_query(self, running):
        """
        Who may not read a stream is told nothing of its parameters.
        """
        opened = reader.router(auth={"t": Principal("ann", "acme", {"sys"})})
        headers = {"Authorization": "Bearer t"}

        assert 403 == opened.handle("GET", "/audit", "nonsense=1", headers).status

    def test_correlate_leaves_out_what_is_outside(self, sqlite_dsn):
        """
        /correlate holds the streams that may be read; the cursor opens no other.
        """
        fasten.init(service_id="s", stdout="", audit_dsn=sqlite_dsn)
        with fasten.bind("r", tenant_id="acme"):
            for _ in range(3):
                fasten.emit("USER_CREATED", "u-1")
                fasten.log.info("hello")
        fasten.flush(20)
        opened = reader.router(
            auth={
                "all": Principal("a", "acme"),
                "sys": Principal("s", "acme", {"sys"}),
            }
        )

        def rows(token, query):
            headers = {"Authorization": f"Bearer {token}"}
            found = opened.handle("GET", "/correlate", f"request_id=r{query}", headers)
            return json.loads(found.body)

        first = rows("all", "&limit=1")
        stolen = rows("sys", f"&cursor={first['next']}")

        assert ["sys"] * 3 == [row["shape"] for row in rows("sys", "")["rows"]]
        assert {"sys"} == {row["shape"] for row in stolen["rows"]}

    def test_no_scope_at_all(self, running):
        """
        Such a principal may ask how the service is, and nothing else.
        """
        opened = reader.router(auth={"t": Principal("probe", None, set())})
        found = {path: ask(opened, path, token="t").status for path in ROUTES}

        assert {"/health", "/openapi.json"} == {p for p, s in found.items() if s == 200}
        assert {403} == {s for p, s in found.items() if s != 200}

    def test_reasons_are_for_who_runs_the_place(self):
        """
        /health tells a tenant the state, and an operator what explains it.
        """
        fasten.init(
            service_id="s",
            stdout="",
            audit_dsn="postgres://user:pw@127.0.0.1:1/app",
        )
        opened = reader.router(
            auth={"op": Principal("op", ALL_TENANTS), "t": Principal("t", "acme")}
        )
        told = {
            t: json.loads(ask(opened, "/health", token=t).body) for t in ("op", "t")
        }

        assert ["state"] == list(told["t"])
        assert {"state", "reasons", "spool", "emitted"} < told["op"].keys()
