# SPDX-License-Identifier: Apache-2.0
"""
The Django middlewares, sync and async, and the application that calls `init()`.

uvicorn and the standard library's server run it here, gunicorn in
`test_http_servers`.
"""

from __future__ import annotations

import asyncio
import gc
import io
import re
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from asgiref.sync import async_to_sync, iscoroutinefunction, sync_to_async
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import FileResponse, HttpResponse, StreamingHttpResponse
from django.urls import include, path, re_path

import fasten
from fasten.shim import django as shim
from fasten.shim import http, wsgi
from tests.outside import run_python, wait_until
from tests.servers import HOSTILE, asgi_thread, attack, dial, pick, wsgi_thread
from tests.web.django_project import configure

MINTED = re.compile(r"[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}")
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
OURS = ("fasten.shim.django.RequestIDMiddleware", "fasten.shim.django.APILogger")
USERS = (
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
)
SERVERS = {
    "WSGI": lambda: wsgi_thread(WSGIHandler()),
    "ASGI": lambda: asgi_thread(ASGIHandler(), lifespan="off"),
}
ORDERS = {"logger inside": OURS, "logger outside": OURS[::-1]}

# --- the project ------------------------------------------------------------------

gone, closed = threading.Event(), threading.Event()


def here() -> str:
    """
    Return the id under which this code runs.
    """
    return fasten.current_request_id() or "none"


def work(request: Any, uid: int = 0) -> HttpResponse:
    """
    Emit a row and log a line, from a sync view.
    """
    fasten.emit(code="USER_CREATED", target=uid)
    fasten.log.info("created")
    return HttpResponse(here())


async def awork(request: Any) -> HttpResponse:
    """
    Do the same from an async view, which may not touch the database lazily.
    """
    await asyncio.sleep(0)
    fasten.emit(code="USER_CREATED", target="async")
    return HttpResponse(here() + await sync_to_async(here)())


def login(request: Any) -> HttpResponse:
    """
    Log ann in, and let a row say who that was.
    """
    from django.contrib import auth
    from django.contrib.auth.models import User

    auth.login(request, User.objects.get_or_create(username="ann")[0])
    return HttpResponse()


def stream(request: Any) -> StreamingHttpResponse:
    """
    Answer piece by piece; the client may leave after the first.
    """

    def pieces() -> Iterator[str]:
        try:
            yield here()
            gone.wait(0 if "leave" not in request.GET else 10)
            for _ in range(1000 if "leave" in request.GET else 0):
                yield "x" * 65536
            yield here()
            if "break" in request.GET:
                raise ZeroDivisionError
        finally:
            closed.set()

    return StreamingHttpResponse(pieces())


async def astream(request: Any) -> StreamingHttpResponse:
    """
    The same from an async view.
    """

    async def pieces() -> AsyncIterator[str]:
        yield here()
        await asyncio.to_thread(gone.wait, 0 if "leave" not in request.GET else 10)
        for _ in range(1000 if "leave" in request.GET else 0):
            yield "x" * 65536
            await asyncio.sleep(0)
        yield here()
        if "break" in request.GET:
            raise ZeroDivisionError

    return StreamingHttpResponse(pieces())


def boom(request: Any) -> HttpResponse:
    """
    Fail.
    """
    raise ZeroDivisionError


def outsider(get_response: Any) -> Any:
    """
    Be a middleware outside ours that answers with a response of its own.
    """

    def answer(request: Any) -> HttpResponse:
        inner = get_response(request)
        return HttpResponse(inner.content, headers=inner.headers)

    return answer


urlpatterns = [
    path("users/<int:uid>/", work),
    path("async", awork),
    path("login", login),
    path("stream", stream),
    path("astream", astream),
    path("boom", boom),
    path("file", lambda _: FileResponse(io.BytesIO(b"f" * 5000), filename="f.txt")),
    path("own", lambda _: HttpResponse(headers={"x-request-id": "own"})),
    re_path(r"^old/(?P<year>[0-9]{4})/$", lambda _, year: HttpResponse(year)),
    path("api/<version>/", include([path("who", lambda _, version: HttpResponse())])),
]


@pytest.fixture(autouse=True)
def project() -> Iterator[None]:
    """
    Have Django serve the views above, with both middlewares and users.
    """
    configure()
    from django.test import override_settings

    for event in (gone, closed):
        event.clear()
    with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[*OURS, *USERS]):
        yield


def get(server: Any, *paths: str, **options: Any) -> list[httpx.Response]:
    """
    Have *server* answer one request after the other, with cookies kept.
    """
    with server() as url, httpx.Client(base_url=url, timeout=20) as client:
        return [client.get(path, **options) for path in paths]


def override(**settings: Any) -> Any:
    """
    Override settings for a with-block or a test.
    """
    from django.test import override_settings

    return override_settings(**settings)


both_servers = pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)

# --- tests ------------------------------------------------------------------------


@both_servers
class TestRequestId:
    @pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
    @pytest.mark.parametrize("place", ["/users/7/", "/async"])
    def test_takes_over_the_callers(self, fasten_trail, server, order, place):
        """
        Rows, log lines and the answer carry the caller's id, in sync and async views.
        """
        with override(MIDDLEWARE=[*order, *USERS]):
            (answer,) = get(server, place, headers={"X-Request-ID": "abc"})
        wait_until(lambda: fasten_trail.api)
        rows = fasten_trail.audit + fasten_trail.sys + fasten_trail.api

        assert {"abc"} == set(pick(rows, "request_id"))
        assert answer.text in ("abc", "abcabc")
        assert ["abc"] == answer.headers.get_list("x-request-id")

    def test_mints_where_there_is_none(self, fasten_trail, server):
        """
        A request without an id gets a new one, the same everywhere.
        """
        (answer,) = get(server, "/users/7/")

        assert MINTED.fullmatch(answer.text)
        assert answer.text == answer.headers["x-request-id"]

    @pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
    def test_attackers_inject_nothing(self, fasten_trail, server, header):
        """
        What is no id is replaced by a new one; nothing of it is repeated.
        """
        urls = [path("work/attacked", work)]
        with override(ROOT_URLCONF=tuple(urls)), server() as url:
            ids = attack(url, header)
            wait_until(lambda: len(ids) == len(fasten_trail.api))

        assert ids == pick(fasten_trail.api, "request_id")
        assert all(MINTED.fullmatch(rid) or rid in ("a", "abc") for rid in ids)

    def test_a_views_own_header_is_replaced(self, server):
        """
        The answer names one id, whatever the view put there.
        """
        (answer,) = get(server, "/own", headers={"X-Request-ID": "abc"})

        assert ["abc"] == answer.headers.get_list("x-request-id")

    def test_a_traceparent_will_do(self, fasten_trail, server):
        """
        Without an id of its own the request takes the trace's.
        """
        headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
        (answer,) = get(server, "/users/7/", headers=headers)

        assert TRACE == answer.text

    def test_a_public_edge_trusts_nobody(self, fasten_trail, server):
        """
        With FASTEN_TRUST_REQUEST_ID=off the id is ours; theirs stands in the api row.
        """
        fasten.init(service_id="edge", trust_request_id="off", stdout="")
        (answer,) = get(server, "/users/7/", headers={"X-Request-ID": "theirs"})
        wait_until(lambda: fasten_trail.api)

        assert MINTED.fullmatch(answer.text)
        assert ["theirs"] == pick(fasten_trail.api, "client_request_id")


@both_servers
class TestCaller:
    @pytest.mark.parametrize("place", ["/users/7/", "/async"])
    def test_the_actor_is_the_user_who_is_logged_in(self, fasten_trail, server, place):
        """
        Looked at late, and in an async view before it: there it could not be.
        """
        get(server, "/login", place)
        wait_until(lambda: len(fasten_trail.api) == 2)

        assert ["ann"] == pick(fasten_trail.audit, "actor")
        assert ["ann", "ann"] == pick(fasten_trail.api, "actor")

    @pytest.mark.parametrize("place", ["/users/7/", "/async"])
    def test_nobody_logged_in_is_anonymous(self, fasten_trail, server, place):
        """
        Without a session nobody is looked up.
        """
        get(server, place)
        wait_until(lambda: fasten_trail.api)

        assert ["anonymous"] * 2 == pick(fasten_trail.audit + fasten_trail.api, "actor")
        assert ["127.0.0.1"] == pick(fasten_trail.api, "client")

    def test_a_session_that_cannot_be_read_costs_no_request(self, fasten_trail, server):
        """
        A view that needs no user is answered, whatever state the sessions are in.
        """
        with override(SESSION_ENGINE="tests.test_shim_django"):
            cookies = {"Cookie": "sessionid=x"}
            (answer,) = get(server, "/async", headers=cookies)
            wait_until(lambda: fasten_trail.api)

        assert 200 == answer.status_code
        assert ["anonymous"] == pick(fasten_trail.api, "actor")

    def test_settings_name_other_callables(self, fasten_trail, server):
        """
        `settings.FASTEN` takes functions, and dotted paths to them.
        """
        settings = {
            "ACTOR": lambda request: request.headers.get("X-User"),
            "TENANT": "tests.test_shim_django.tenant",
            "FASTEN_CLIENT": lambda request: None,
        }
        with override(FASTEN=settings):
            get(server, "/users/7/", headers={"X-User": "bob"})
            wait_until(lambda: fasten_trail.api)

        assert [("bob", "127.0.0.1:acme", "127.0.0.1")] == pick(
            fasten_trail.api, "actor", "tenant_id", "client"
        )


class SessionStore:
    """
    Sessions of a store that is down, as SESSION_ENGINE names them.
    """

    accessed = modified = False

    def __init__(self, key: str | None = None) -> None:
        self.session_key = key

    def __getitem__(self, key: str) -> Any:
        raise ConnectionError

    def is_empty(self) -> bool:
        """
        Have nothing to save.
        """
        return False

    async def aget(self, key: str, default: Any = None) -> Any:
        """
        Fail, as the store does.
        """
        raise ConnectionError


def tenant(request: Any) -> str:
    """
    Name a tenant after the host.
    """
    return str(request.get_host().split(":")[0]) + ":acme"


@both_servers
class TestApiRow:
    @pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume synchronous")
    def test_says_what_was_answered(self, fasten_trail, server):
        """
        Route, status and bytes of each kind of answer.
        """
        places = {
            "/users/7/": ("/users/<int:uid>/", 200, 32),
            "/api/v1/who": ("/api/<version>/who", 200, 0),
            "/old/1999/": ("^old/(?P<year>[0-9]{4})/$", 200, 4),
            "/file": ("/file", 200, 5000),
            "/none": (None, 404, 179),
        }
        get(server, *places)
        wait_until(lambda: len(fasten_trail.api) == len(places))
        rows = pick(fasten_trail.api, "route", "status", "bytes")

        assert list(places) == pick(fasten_trail.api, "path")
        assert list(places.values()) == rows
        assert all(pick(fasten_trail.api, "complete"))

    def test_skips_paths(self, fasten_trail, server):
        """
        Those of `settings.FASTEN["SKIP"]`: entries of MIDDLEWARE take no arguments.
        """
        with override(FASTEN={"SKIP": ["/old/*", "/none"]}):
            get(server, "/old/1999/", "/none", "/own")
            wait_until(lambda: fasten_trail.api)

        assert ["/own"] == pick(fasten_trail.api, "path")

    def test_an_unhandled_exception_is_a_500(self, fasten_trail, server):
        """
        Django answers it inside: the answer names the id, and is whole.
        """
        (answer,) = get(server, "/boom", headers={"X-Request-ID": "abc"})
        wait_until(lambda: fasten_trail.api)

        assert (500, "abc") == (answer.status_code, answer.headers["x-request-id"])
        assert [(500, "/boom", True)] == pick(
            fasten_trail.api, "status", "route", "complete"
        )

    @pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
    def test_an_answer_that_is_replaced_further_out(self, fasten_trail, server, order):
        """
        The row comes with the answer that was sent, which need not be ours.
        """
        middlewares = ["tests.test_shim_django.outsider", *order, *USERS]
        with override(MIDDLEWARE=middlewares):
            get(server, "/users/7/")
            wait_until(lambda: fasten_trail.api)

        assert [200] == pick(fasten_trail.api, "status")

    def test_one_alone_will_do(self, fasten_trail, server):
        """
        Without RequestIDMiddleware there is a row, and the answer is left alone.
        """
        with override(MIDDLEWARE=[OURS[1]]):
            (answer,) = get(server, "/users/7/")
            wait_until(lambda: fasten_trail.api)

        assert "x-request-id" not in answer.headers
        assert [answer.text] == pick(fasten_trail.api, "request_id")


class TestStreams:
    @pytest.mark.parametrize(
        ("server", "place"),
        [("WSGI", "/stream"), ("ASGI", "/astream")],
    )
    def test_pieces_are_made_under_the_id(self, fasten_trail, server, place):
        """
        Though the middlewares have returned by then.
        """
        (answer,) = get(SERVERS[server], place, headers={"X-Request-ID": "abc"})
        wait_until(lambda: fasten_trail.api)

        assert "abcabc" == answer.text
        assert [(6, True)] == pick(fasten_trail.api, "bytes", "complete")

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.parametrize(
        ("server", "place"),
        [("WSGI", "/stream?break=1"), ("ASGI", "/astream?break=1")],
    )
    def test_a_200_that_breaks_is_a_500(self, fasten_trail, server, place):
        """
        The status line was sent before the body failed: still not a success.
        """
        if server == "ASGI":
            with pytest.raises(httpx.RemoteProtocolError):
                get(SERVERS[server], place)
        else:
            get(SERVERS[server], place)
        wait_until(lambda: fasten_trail.api)
        gc.collect()  # Django forgets to close the body of such a request

        assert [(500, False)] == pick(fasten_trail.api, "status", "complete")

    @pytest.mark.parametrize(
        ("server", "place"),
        [("WSGI", b"/stream?leave=1"), ("ASGI", b"/astream?leave=1")],
    )
    def test_a_client_that_leaves_makes_the_row_incomplete(
        self, fasten_trail, server, place
    ):
        """
        Half an answer was sent, with status 200, and the row says both.
        """
        with SERVERS[server]() as url:
            with dial(url) as connection:
                connection.sendall(b"GET " + place + b" HTTP/1.1\r\nHost: x\r\n\r\n")
                connection.recv(65536)
            gone.set()
            wait_until(lambda: fasten_trail.api)

        assert [(200, False)] == pick(fasten_trail.api, "status", "complete")

    def test_a_client_that_leaves_before_the_answer(self, fasten_trail):
        """
        Django cancels the async view: nothing was answered, and nobody failed.
        """
        waiting = asyncio.Event()

        async def wait(request: Any) -> HttpResponse:
            waiting.set()
            await asyncio.Event().wait()
            return HttpResponse()

        async def receive() -> dict[str, Any]:
            if not started:
                started.append(1)
                return {"type": "http.request", "body": b""}
            await waiting.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError(message)

        started: list[int] = []
        scope = {"type": "http", "method": "GET", "path": "/wait", "headers": []}
        with override(ROOT_URLCONF=(path("wait", wait),)):
            asyncio.run(ASGIHandler()(scope, receive, send))

        assert [(499, False)] == pick(fasten_trail.api, "status", "complete")


class TestManners:
    def test_the_test_client_records_too(self, fasten_trail):
        """
        Django's own client closes what it gets, as servers do.
        """
        from django.test import Client

        answer = Client().get("/users/7/", headers={"X-Request-ID": "abc"})

        assert b"abc" == answer.content
        assert ["abc"] == pick(fasten_trail.api, "request_id")

    def test_the_async_test_client_records_too(self, fasten_trail):
        """
        Also the one for async tests.
        """
        from django.test import AsyncClient

        async def ask() -> Any:
            return await AsyncClient().get("/async", headers={"X-Request-ID": "abc"})

        answer = asyncio.run(ask())

        assert b"abcabc" == answer.content
        assert ["abc"] == pick(fasten_trail.api, "request_id")

    def test_nobody_is_looked_up_for_the_id_alone(self, fasten_trail):
        """
        Without rows that want an actor no query is made, nor is the session read.
        """
        from django.test import Client

        client = Client()
        client.get("/login")
        with override(MIDDLEWARE=[OURS[0], *USERS]):
            answer = client.get("/own")

        assert "Vary" not in answer.headers

    def test_nothing_is_left_behind(self, fasten_trail):
        """
        After a request the thread belongs to nobody again.
        """
        from django.test import Client

        Client(raise_request_exception=False).get("/boom")
        list(Client().get("/stream").streaming_content)

        assert fasten.current() is None

    @pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
    def test_a_stack_of_mixed_middlewares(self, fasten_trail, order):
        """
        Django moves between threads for sync and async ones: the id comes along.
        """
        middlewares = [order[0], "tests.test_shim_django.sync_only", order[1], *USERS]
        with override(MIDDLEWARE=middlewares):
            (answer,) = get(SERVERS["ASGI"], "/async", headers={"X-Request-ID": "abc"})
            wait_until(lambda: fasten_trail.api)

        assert "abcabc" == answer.text
        assert ["abc"] == pick(fasten_trail.api, "request_id")

    def test_threads_of_sync_views_are_clean(self, fasten_trail):
        """
        Under ASGI sync views share one thread: none finds the request before it.
        """
        with override(MIDDLEWARE=["tests.test_shim_django.sync_only", *OURS]):
            seen.clear()
            get(SERVERS["ASGI"], *["/users/7/", "/async"] * 5)

        assert [None] * 20 == seen

    @pytest.mark.parametrize("is_async", [False, True])
    def test_an_outer_shim_keeps_the_exchange(self, fasten_trail, is_async):
        """
        Django inside `shim.http` or `shim.wsgi`: one id, one row, with the route.
        """
        if is_async:
            outer = http.wrap(http.APILogger(ASGIHandler()))
            (answer,) = get(lambda: asgi_thread(outer, lifespan="off"), "/users/7/")
        else:
            plain = wsgi.RequestIDMiddleware(wsgi.APILogger(WSGIHandler()))
            (answer,) = get(lambda: wsgi_thread(plain), "/users/7/")
        wait_until(lambda: fasten_trail.api)

        assert [answer.text] == answer.headers.get_list("x-request-id")
        assert [(answer.text, "/users/<int:uid>/")] == pick(
            fasten_trail.api, "request_id", "route"
        )

    @pytest.mark.parametrize("given", [{"actor": "os.nope"}, {"actor": 7}])
    def test_what_cannot_be_asked_is_refused_at_once(self, given):
        """
        A mistake of the settings shows when Django loads its middlewares.
        """
        with override(FASTEN=given), pytest.raises((TypeError, ImportError)):
            shim.RequestIDMiddleware(work)

    def test_arguments_win_over_settings(self, fasten_trail):
        """
        A middleware of one's own may pass them.
        """
        with override(FASTEN={"SKIP": "/users/*", "ACTOR": "os.getcwd"}):
            logger = shim.APILogger(work, skip=(), actor=lambda _: "ann")
            self.answer(logger)

        assert ["ann"] == pick(fasten_trail.api, "actor")

    def test_an_exception_that_django_does_not_catch(self, fasten_trail):
        """
        It leaves as it is, sync or async, and the row says 500.
        """

        async def aboom(request: Any) -> None:
            raise KeyboardInterrupt

        def sboom(request: Any) -> None:
            raise KeyboardInterrupt

        for inner in (sboom, aboom):
            with pytest.raises(KeyboardInterrupt):
                self.answer(shim.APILogger(inner))

        assert [500, 500] == pick(fasten_trail.api, "status")

    def answer(self, middleware: Any) -> Any:
        from django.test import RequestFactory

        request = RequestFactory().get("/users/7/")
        if iscoroutinefunction(middleware):
            return async_to_sync(middleware)(request)
        response = middleware(request)
        request.close()
        return response


seen: list[Any] = []


def sync_only(get_response: Any) -> Any:
    """
    Be a middleware that makes Django change threads, and look around outside.
    """

    def answer(request: Any) -> HttpResponse:
        seen.append(fasten.current())
        response = get_response(request)
        seen.append(fasten.current())
        return response  # type: ignore[no-any-return]

    return answer


class TestApplication:
    """
    `INSTALLED_APPS += ["fasten.shim.django"]`, in processes of their own.
    """

    SETUP = """
        import django, fasten
        from django.conf import settings
        settings.configure(
            INSTALLED_APPS=["fasten.shim.django"],
            FASTEN={"SERVICE_ID": "from-settings", "node_id": "n1", "STDOUT": "",
                    "SKIP": ["/health"], "ACTOR": "os.getcwd"},
        )
        django.setup()
        from django.apps import apps
        """

    def test_calls_init_with_the_settings(self):
        """
        Names in either case; what is the middlewares' is not `init()`'s.
        """
        done = run_python(
            self.SETUP
            + """
        from fasten import engine
        settings = engine.current().settings
        print(apps.get_app_config("fasten").name, settings.service_id, settings.node_id)
        """
        )

        assert ("fasten.shim.django from-settings n1\n", "") == (
            done.stdout,
            done.stderr,
        )

    @pytest.mark.parametrize("form", ["", "_FILE"])
    def test_the_environment_wins(self, form, tmp_path):
        """
        A deployment overrides the settings file, also by a secret's `_FILE`.
        """
        secret = tmp_path / "secret"
        secret.write_text("from-file")
        env = {
            "FASTEN_SERVICE_ID": "from-environment",
            f"FASTEN_READER_TOKEN{form}": str(secret) if form else "from-file",
        }
        setup = self.SETUP.replace('"STDOUT"', '"READER_TOKEN": "settings", "STDOUT"')
        done = run_python(
            setup
            + """
        from fasten import engine
        settings = engine.current().settings
        print(settings.service_id, "settings" in str(settings.reader_token))
        """,
            env=env,
        )

        assert ("from-environment False\n", "") == (done.stdout, done.stderr)

    def test_settings_that_are_wrong_stop_the_start(self):
        """
        Django does not come up with half of an audit trail.
        """
        done = run_python(self.SETUP.replace('"STDOUT": ""', '"DURABILITY": "none"'))

        assert 1 == done.returncode
        assert "FASTEN_DURABILITY" in done.stderr
