# SPDX-License-Identifier: Apache-2.0
"""
The WSGI middlewares, behind the standard library's server and a test that plays one.

gunicorn serves in `test_http_servers`.
"""

from __future__ import annotations

import contextlib
import gc
import io
import re
import threading
from collections.abc import Iterator
from typing import Any
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fasten
from fasten.context import accept
from fasten.shim.wsgi import APILogger, RequestIDMiddleware
from tests.servers import HOSTILE, attack, dial, pick, wsgi_thread

MINTED = re.compile(r"[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}")
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ORDERS = {
    "logger inside": lambda app: RequestIDMiddleware(APILogger(app)),
    "logger outside": lambda app: APILogger(RequestIDMiddleware(app)),
}


class Played:
    """
    What a server was handed: its environ, the answer, and all that was written.
    """

    def __init__(self, app: Any, **environ: Any) -> None:
        self.environ: dict[str, Any] = dict(environ)
        setup_testing_defaults(self.environ)
        self.written: list[bytes] = []
        self.status, self.headers = "", []
        self.answer = app(self.environ, self.start_response)

    def start_response(self, status: str, headers: Any, *exc_info: Any) -> Any:
        """
        Take status and headers, as servers do.
        """
        self.status, self.headers = status, headers
        return self.written.append

    def body(self) -> bytes:
        """
        Take all pieces, then close.
        """
        try:
            self.written.extend(self.answer)
        finally:
            if hasattr(self.answer, "close"):
                self.answer.close()
        return b"".join(self.written)

    def ids(self) -> list[str]:
        """
        Return the X-Request-ID headers.
        """
        return [v for name, v in self.headers if name.lower() == "x-request-id"]


def plain(environ: Any, start_response: Any) -> list[bytes]:
    """
    Answer 200 with two bytes.
    """
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"ok"]


class TestRequestId:
    @pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
    def test_takes_over_the_callers(self, fasten_trail, order):
        """
        Rows, log lines and the answer carry the id that the caller sent.
        """

        def app(environ: Any, start_response: Any) -> list[bytes]:
            fasten.emit(code="USER_CREATED", target="u-1")
            fasten.log.info("created")
            return plain(environ, start_response)

        with wsgi_thread(order(app)) as url:
            answer = httpx.get(url, headers={"X-Request-ID": "abc-123"})
        rows = fasten_trail.audit + fasten_trail.sys + fasten_trail.api

        assert ["abc-123"] == answer.headers.get_list("x-request-id")
        assert ["abc-123"] * 3 == pick(rows, "request_id")

    @pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
    def test_mints_where_there_is_none(self, fasten_trail, order):
        """
        A request without an id gets a new one, the same everywhere.
        """
        played = Played(order(plain))
        played.body()
        (rid,) = played.ids()

        assert MINTED.fullmatch(rid)
        assert [rid] == pick(fasten_trail.api, "request_id")

    @pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
    def test_attackers_inject_nothing(self, fasten_trail, header):
        """
        What is no id is replaced by a new one; nothing of it is repeated.
        """
        with wsgi_thread(RequestIDMiddleware(APILogger(plain))) as url:
            ids = attack(url, header)

        assert set(ids) == {row["request_id"] for row in fasten_trail.api}
        assert len(ids) <= 1
        # This server counts a bare LF as an end of line, and keeps the first copy.
        assert all(MINTED.fullmatch(rid) or rid in ("a", "abc") for rid in ids)

    @given(st.text(st.characters(max_codepoint=255), max_size=140))
    @example("x" * 128)
    @example("x" * 129)
    @example("evt-x")
    def test_an_id_is_taken_over_or_replaced(self, value):
        """
        Whatever text comes, the answer holds it if it is an id, else a new one.
        """
        played = Played(RequestIDMiddleware(plain), HTTP_X_REQUEST_ID=value)
        (rid,) = played.ids()

        assert rid == accept(value) or (accept(value) is None and MINTED.fullmatch(rid))

    def test_the_applications_own_header_is_replaced(self):
        """
        The answer names one id, however the application spelled its own.
        """

        def app(environ: Any, start_response: Any) -> list[bytes]:
            start_response("200 OK", [("x-REQUEST-id", "own"), ("A", "b")])
            return []

        played = Played(RequestIDMiddleware(app), HTTP_X_REQUEST_ID="abc")

        assert [("A", "b"), ("X-Request-ID", "abc")] == played.headers

    def test_a_traceparent_will_do(self):
        """
        Without an id of its own the request takes the trace's.
        """
        played = Played(
            RequestIDMiddleware(plain), HTTP_TRACEPARENT=f"00-{TRACE}-{SPAN}-01"
        )

        assert [TRACE] == played.ids()

    def test_a_public_edge_trusts_nobody(self, fasten_trail):
        """
        With FASTEN_TRUST_REQUEST_ID=off the id is ours; theirs stands in the api row.
        """
        fasten.init(service_id="edge", trust_request_id="off", stdout="")
        app = RequestIDMiddleware(APILogger(plain))
        played = Played(app, HTTP_X_REQUEST_ID="theirs")
        played.body()

        assert MINTED.fullmatch(played.ids()[0])
        assert ["theirs"] == pick(fasten_trail.api, "client_request_id")


class TestCaller:
    def test_callables_see_the_environ_late(self, fasten_trail):
        """
        They see what a middleware further in wrote there.
        """

        def app(environ: Any, start_response: Any) -> list[bytes]:
            fasten.log.info("early")
            environ["REMOTE_USER"] = "ann"
            return plain(environ, start_response)

        served = APILogger(
            RequestIDMiddleware(app, actor=lambda environ: environ["REMOTE_USER"]),
            tenant=lambda environ: environ["HTTP_HOST"],
        )
        Played(served, REMOTE_ADDR="10.0.0.1").body()

        assert [("ann", "127.0.0.1", "10.0.0.1")] == pick(
            fasten_trail.api, "actor", "tenant_id", "client"
        )

    def test_a_socket_without_address_has_no_client(self, fasten_trail):
        """
        Behind a Unix socket nobody knows the peer.
        """
        Played(APILogger(plain), REMOTE_ADDR="").body()

        assert [None] == pick(fasten_trail.api, "client")

    def test_identify_holds_for_the_row(self, fasten_trail):
        """
        What the application says of its caller is in the api row.
        """

        def app(environ: Any, start_response: Any) -> list[bytes]:
            fasten.identify(actor="ann", tenant_id="acme")
            return plain(environ, start_response)

        Played(APILogger(app)).body()

        assert [("ann", "acme")] == pick(fasten_trail.api, "actor", "tenant_id")


class TestApiRow:
    def test_says_what_was_answered(self, fasten_trail):
        """
        Method, path with its prefix, status, bytes; no query string.
        """
        app = APILogger(plain)
        played = Played(
            app,
            REQUEST_METHOD="POST",
            SCRIPT_NAME="/shop",
            PATH_INFO="/\xc3\xa9t\xc3\xa9",
            QUERY_STRING="token=canary",
        )
        played.body()
        (row,) = fasten_trail.api

        assert ("POST", "/shop/été", None, 200, 2, True) == (
            row["method"],
            row["path"],
            row["route"],
            row["status"],
            row["bytes"],
            row["complete"],
        )
        assert "canary" not in str(row)

    def test_skips_paths(self, fasten_trail):
        """
        Below a mount the pattern may be the application's own or the whole path.
        """
        app = APILogger(plain, skip={"/health", "/v1/static/*"})
        for path in ("/health", "/static/a", "/users"):
            Played(app, SCRIPT_NAME="/v1", PATH_INFO=path).body()

        assert ["/v1/users"] == pick(fasten_trail.api, "path")

    def test_pieces_that_are_written_count(self, fasten_trail):
        """
        The old `write` callable sends bytes, too.
        """

        def app(environ: Any, start_response: Any) -> list[bytes]:
            write = start_response("200 OK", [])
            write(b"old")
            return [b"new"]

        body = Played(APILogger(app)).body()

        assert b"oldnew" == body
        assert [6] == pick(fasten_trail.api, "bytes")

    def test_a_file_stays_one_for_the_server(self, fasten_trail):
        """
        `sendfile` needs the wrapper untouched; its row comes when it is closed.
        """
        file = io.BytesIO(b"x" * 10)

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", [("Content-Length", "10")])
            return environ["wsgi.file_wrapper"](file)

        played = Played(APILogger(app), **{"wsgi.file_wrapper": FileWrapper})
        before = list(fasten_trail.api)
        played.answer.close()

        assert FileWrapper is type(played.answer)
        assert ([], True) == (before, file.closed)
        assert [(10, True)] == pick(fasten_trail.api, "bytes", "complete")

    def test_a_file_that_takes_no_attributes(self, fasten_trail):
        """
        A wrapper made in C is iterated like any other body.
        """

        class Slotted:
            __slots__ = ("file",)

            def __init__(self, file: Any) -> None:
                self.file = file

            def __iter__(self) -> Iterator[bytes]:
                return iter(self.file)

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", [])
            return environ["wsgi.file_wrapper"](io.BytesIO(b"x\ny"))

        body = Played(APILogger(app), **{"wsgi.file_wrapper": Slotted}).body()

        assert b"x\ny" == body
        assert [(3, True)] == pick(fasten_trail.api, "bytes", "complete")

    def test_the_number_of_pieces_can_still_be_asked(self):
        """
        Servers make a Content-Length of a body of one piece.
        """
        with wsgi_thread(RequestIDMiddleware(plain)) as url:
            answer = httpx.get(url)

        assert "2" == answer.headers["content-length"]

    def test_keeps_to_the_standard(self, fasten_trail):
        """
        Wsgiref's validator finds nothing to say, inside or outside.
        """
        app = validator(RequestIDMiddleware(APILogger(validator(plain_as_bytes))))
        played = Played(app, QUERY_STRING="")
        body = played.body()

        assert (b"ok", "200 OK") == (body, played.status)


def plain_as_bytes(environ: Any, start_response: Any) -> list[bytes]:
    """
    Answer with the headers that the validator asks for.
    """
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]


class TestFailure:
    @pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
    def test_an_unhandled_exception_is_a_500(self, fasten_trail, order):
        """
        The row says 500, and the exception leaves as it is.
        """
        error = ZeroDivisionError("mine")

        def app(environ: Any, start_response: Any) -> list[bytes]:
            raise error

        with pytest.raises(ZeroDivisionError) as caught:
            Played(order(app))

        assert error is caught.value
        assert [(500, False)] == pick(fasten_trail.api, "status", "complete")

    def test_a_200_that_breaks_is_a_500(self, fasten_trail):
        """
        The status line was sent before the body failed: still not a success.
        """

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("200 OK", [])
            yield b"half"
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            Played(APILogger(app)).body()

        assert [(500, False, 4)] == pick(
            fasten_trail.api, "status", "complete", "bytes"
        )

    def test_an_answer_that_is_corrected(self, fasten_trail):
        """
        `exc_info` lets an application take back a 200 that was not sent yet.
        """

        def app(environ: Any, start_response: Any) -> list[bytes]:
            start_response("200 OK", [])
            try:
                raise ZeroDivisionError
            except ZeroDivisionError as error:
                start_response("503 Sorry", [], (type(error), error, None))
            return [b"sorry"]

        played = Played(RequestIDMiddleware(APILogger(app)))
        played.body()

        assert ("503 Sorry", 1) == (played.status, len(played.ids()))
        assert [503] == pick(fasten_trail.api, "status")

    def test_an_application_that_never_starts_its_answer(self, fasten_trail):
        """
        The server makes a 500 of it.
        """
        Played(APILogger(lambda environ, start: [])).body()

        assert [(500, False)] == pick(fasten_trail.api, "status", "complete")

    def test_a_client_that_leaves_makes_the_row_incomplete(self, fasten_trail):
        """
        The server stops iterating, and closes: half an answer was sent.
        """
        gone = threading.Event()
        closed = threading.Event()

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("200 OK", [])
            try:
                yield b"first"
                gone.wait(10)
                while True:
                    yield b"x" * 65536
            finally:
                closed.set()

        with wsgi_thread(APILogger(app)) as url:
            with dial(url) as connection:
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                connection.recv(65536)
            gone.set()
            closed.wait(10)

        assert [(200, False)] == pick(fasten_trail.api, "status", "complete")


class TestStreams:
    def test_a_body_is_made_under_its_id(self, fasten_trail):
        """
        Each piece, though the application has returned, and close, too.
        """
        seen: list[Any] = []

        class Body:
            def __iter__(self) -> Iterator[bytes]:
                yield (fasten.current_request_id() or "").encode()

            def close(self) -> None:
                seen.append(fasten.current_request_id())

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", [])
            return Body()

        played = Played(RequestIDMiddleware(app), HTTP_X_REQUEST_ID="abc")
        between = fasten.current()
        body = played.body()

        assert (None, b"abc", ["abc"]) == (between, body, seen)

    def test_another_thread_may_iterate(self):
        """
        A body belongs to its request, not to the thread that began it.
        """

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("200 OK", [])
            for _ in range(3):
                yield (fasten.current_request_id() or "").encode()

        played = Played(RequestIDMiddleware(app), HTTP_X_REQUEST_ID="abc")
        pieces: list[bytes] = []
        thread = threading.Thread(target=lambda: pieces.extend(played.answer))
        thread.start()
        thread.join(10)

        assert [b"abc"] * 3 == pieces

    def test_the_first_piece_is_not_held_back(self):
        """
        It arrives before the second is made.
        """
        arrived = threading.Event()

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("200 OK", [("Content-Type", "text/event-stream")])
            yield b"data: 1\n\n"
            yield b"data: %d\n\n" % arrived.wait(10)

        with wsgi_thread(RequestIDMiddleware(app)) as url:
            with httpx.stream("GET", url) as answer:
                pieces = answer.iter_raw()
                first = next(pieces)
                arrived.set()
                rest = b"".join(pieces)

        assert (b"data: 1\n\n", b"data: 1\n\n") == (first, rest)


class TestManners:
    def test_nothing_is_left_behind(self, fasten_trail):
        """
        The server's thread belongs to nobody again, whatever the request did.
        """

        def app(environ: Any, start_response: Any) -> Any:
            fasten.identify(actor="ann")
            if environ["PATH_INFO"] == "/boom":
                raise ZeroDivisionError
            start_response("200 OK", [])
            return iter([b"a", b"b"])

        left = []
        for path in ("/", "/boom", "/"):
            with contextlib.suppress(ZeroDivisionError):
                played = Played(RequestIDMiddleware(APILogger(app)), PATH_INFO=path)
                left.append(fasten.current())
                next(iter(played.answer))
            left.append(fasten.current())

        assert [None] * 5 == left

    def test_a_request_leaves_no_garbage(self, fasten_trail):
        """
        What the request held is freed when it ends, not when the collector comes.
        """
        app = RequestIDMiddleware(APILogger(plain))
        Played(app).body()
        gc.collect()
        gc.disable()
        try:
            for n in range(50):
                environ = {"PATH_INFO": f"/{n}", "REQUEST_METHOD": "GET"}
                body = app(environ, lambda *_: None)
                list(body)
                body.close()
            del environ, body
            found = gc.collect()
        finally:
            gc.enable()

        assert 0 == found

    def test_bodies_may_take_turns(self):
        """
        One thread that serves several bodies at once mixes none.
        """

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("200 OK", [])
            for _ in range(5):
                yield (fasten.current_request_id() or "").encode()

        bodies = [
            Played(RequestIDMiddleware(app), HTTP_X_REQUEST_ID=f"r{n}").answer
            for n in range(10)
        ]
        turns = list(zip(*bodies, strict=True))

        assert [tuple(f"r{n}".encode() for n in range(10))] * 5 == turns
