# SPDX-License-Identifier: Apache-2.0
"""
Flask: both middlewares by one call, and callables that see Flask's own request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from flask import Blueprint, Flask, Response, g, request, send_file, session
from flask import stream_with_context as with_context

import fasten
from fasten.shim.flask import APILogger, RequestIDMiddleware, init_app
from tests.servers import pick, wsgi_thread


@pytest.fixture
def app() -> Flask:
    """
    Return an application with one route, and no middleware yet.
    """
    app = Flask("shop")
    app.secret_key = "for tests only"

    @app.get("/users/<int:uid>")
    def user(uid: int) -> str:
        fasten.emit(code="USER_CREATED", target=uid)
        return fasten.current_request_id() or ""

    return app


def test_both_middlewares_are_wired(fasten_trail, app):
    """
    One call gives ids to rows and answer, and an api row with the route's rule.
    """
    init_app(app)
    with wsgi_thread(app) as url:
        answer = httpx.get(f"{url}/users/7", headers={"X-Request-ID": "abc"})
    (row,) = fasten_trail.api

    assert ("abc", ["abc"]) == (
        answer.text,
        answer.headers.get_list("x-request-id"),
    )
    assert ["abc"] == pick(fasten_trail.audit, "request_id")
    assert ("GET", "/users/7", "/users/<int:uid>", 200, 3, True, "127.0.0.1") == (
        row["method"],
        row["path"],
        row["route"],
        row["status"],
        row["bytes"],
        row["complete"],
        row["client"],
    )


def test_skips_paths(fasten_trail, app):
    """
    `skip=` is APILogger's.
    """
    init_app(app, skip={"/health", "/static/*"})
    client = app.test_client()
    for path in ("/health", "/static/none.css", "/none"):
        client.get(path)

    assert [("/none", None, 404)] == pick(fasten_trail.api, "path", "route", "status")


def test_the_middlewares_may_be_placed_by_hand(fasten_trail, app):
    """
    `app.wsgi_app` takes them one by one, in either order.
    """
    app.wsgi_app = RequestIDMiddleware(APILogger(app.wsgi_app))
    answer = app.test_client().get("/users/7")

    assert answer.headers["X-Request-ID"] == fasten_trail.api[0]["request_id"]
    assert "/users/<int:uid>" == fasten_trail.api[0]["route"]


def test_calling_it_twice_records_once(fasten_trail, app):
    """
    An application factory that runs again does no harm.
    """
    init_app(app)
    init_app(app)
    answer = app.test_client().get("/users/7")

    assert 1 == len(answer.headers.getlist("X-Request-ID"))
    assert 1 == len(fasten_trail.api)


def test_a_blueprint_keeps_its_prefix(fasten_trail, app):
    """
    The rule of a blueprint's route is the whole one.
    """
    pages = Blueprint("pages", __name__, url_prefix="/pages/<lang>")
    pages.add_url_rule("/about", view_func=lambda lang: lang)
    app.register_blueprint(pages)
    init_app(app)
    app.test_client().get("/pages/en/about")

    assert ["/pages/<lang>/about"] == pick(fasten_trail.api, "route")


class TestCaller:
    def test_callables_see_flasks_request(self, fasten_trail, app):
        """
        Also `g` and `session`, though the row is recorded when Flask has let go.
        """

        @app.before_request
        def authenticate() -> None:
            fasten.log.info("early")
            g.user = "ann"
            session["tenant"] = "acme"

        init_app(
            app,
            actor=lambda request: g.get("user"),
            tenant=lambda request: session.get("tenant"),
            client=lambda request: request.headers.get("X-Real-IP"),
        )
        client = app.test_client()
        client.get("/users/7", headers={"X-Real-IP": "203.0.113.7"})
        client.get("/none")

        assert [("ann", "acme", "203.0.113.7"), ("ann", "acme", "127.0.0.1")] == pick(
            fasten_trail.api, "actor", "tenant_id", "client"
        )
        assert ["ann"] == pick(fasten_trail.audit, "actor")

    def test_before_there_is_a_request_nobody_is_asked(self, fasten_trail, app):
        """
        A middleware outside Flask may log before Flask has begun.
        """
        flask = app.wsgi_app

        def early(environ: Any, start_response: Any) -> Any:
            fasten.emit(code="USER_UPDATED", target="t")
            return flask(environ, start_response)

        app.wsgi_app = early
        init_app(app, actor=lambda request: request.headers["X-User"])
        with wsgi_thread(app) as url:
            httpx.get(f"{url}/users/7", headers={"X-User": "ann"})

        assert ["anonymous", "ann"] == pick(fasten_trail.audit, "actor")

    def test_identify_in_a_view(self, fasten_trail, app):
        """
        A view may name the caller itself, after a login as a rule.
        """

        @app.post("/login")
        def login() -> str:
            fasten.identify(actor="ann")
            fasten.emit(code="AUTH_LOGIN", target="ann")
            return ""

        init_app(app, actor=lambda request: None)
        app.test_client().post("/login")

        assert ["ann"] * 2 == pick(fasten_trail.audit + fasten_trail.api, "actor")

    def test_what_cannot_be_asked_is_refused_at_once(self, app):
        """
        A mistake of `init_app` shows when the service starts, and by its name.
        """
        with pytest.raises(TypeError, match="actor='ann'"):
            init_app(app, actor="ann")  # type: ignore[arg-type]


class TestAnswers:
    def test_an_unhandled_exception_is_a_500(self, fasten_trail, app):
        """
        Flask answers it inside: the answer names the id, and is whole.
        """

        @app.get("/boom")
        def boom() -> str:
            raise ZeroDivisionError

        init_app(app)
        answer = app.test_client().get("/boom", headers={"X-Request-ID": "abc"})

        assert (500, "abc") == (answer.status_code, answer.headers["X-Request-ID"])
        assert [(500, "/boom", True)] == pick(
            fasten_trail.api, "status", "route", "complete"
        )

    def test_a_propagated_exception_is_a_500_too(self, fasten_trail, app):
        """
        In debug and test mode Flask lets it through, as the same object.
        """
        error = ZeroDivisionError("mine")

        @app.get("/boom")
        def boom() -> str:
            raise error

        app.testing = True
        init_app(app)
        with pytest.raises(ZeroDivisionError) as caught:
            app.test_client().get("/boom")

        assert error is caught.value
        assert [(500, "/boom")] == pick(fasten_trail.api, "status", "route")

    def test_streams_keep_the_id_and_flasks_context(self, fasten_trail, app):
        """
        Pieces are made when the view has returned, still on the request's behalf.
        """

        @app.get("/stream")
        def stream() -> Response:
            def pieces() -> Iterator[str]:
                yield fasten.current_request_id() or ""
                yield request.path
                fasten.emit(code="USER_CREATED", target="t")

            return Response(with_context(pieces()))

        init_app(app)
        with wsgi_thread(app) as url:
            answer = httpx.get(f"{url}/stream", headers={"X-Request-ID": "abc"})

        assert "abc/stream" == answer.text
        assert ["abc"] == pick(fasten_trail.audit, "request_id")
        assert [10] == pick(fasten_trail.api, "bytes")

    def test_files_are_left_to_the_server(self, fasten_trail, app, tmp_path):
        """
        Flask hands a file to the server: the row comes when it was sent.
        """
        (tmp_path / "f.txt").write_bytes(b"f" * 5000)
        app.add_url_rule("/f", view_func=lambda: send_file(tmp_path / "f.txt"))
        init_app(app)
        with wsgi_thread(app) as url:
            answer = httpx.get(f"{url}/f")

        assert 5000 == len(answer.content)
        assert [5000] == pick(fasten_trail.api, "bytes")

    def test_async_views_keep_the_id(self, fasten_trail, app):
        """
        Flask runs them in a loop of another thread.
        """

        @app.get("/async")
        async def view() -> str:
            await asyncio.sleep(0)
            fasten.identify(actor="ann")
            return fasten.current_request_id() or ""

        init_app(app)
        answer = app.test_client().get("/async", headers={"X-Request-ID": "abc"})

        assert "abc" == answer.text
        assert ["ann"] == pick(fasten_trail.api, "actor")


def test_flasks_test_client_still_sees_the_request(fasten_trail, app):
    """
    `with client:` keeps `request` and `session` readable after the request.
    """
    init_app(app)
    with app.test_client() as client:
        client.get("/users/7")
        seen = request.path

    assert "/users/7" == seen


def test_nothing_is_left_behind(fasten_trail, app):
    """
    After a request the thread belongs to nobody.
    """
    init_app(app)
    app.test_client().get("/users/7")

    assert fasten.current() is None


def test_a_context_without_a_request_of_ours(fasten_trail, app):
    """
    `test_request_context()` is torn down without an exchange, and does no harm.
    """
    init_app(app, actor=lambda request: "ann")
    with app.test_request_context("/users/7"):
        actor = fasten.current()

    assert actor is None
    assert [] == fasten_trail.api
