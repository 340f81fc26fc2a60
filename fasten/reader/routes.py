# SPDX-License-Identifier: Apache-2.0
"""
From a request to its answer: one function of method, path, query string and headers.

Knows no server and no framework: `asgi`, `wsgi` and `django` bring requests here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, cast

import attrs

from fasten import engine as engines
from fasten.engine import Engine
from fasten.errors import AuditStoreError, InvalidQuery
from fasten.reader import openapi
from fasten.reader.answers import (
    JSON,
    NDJSON,
    Listing,
    Refusal,
    Response,
    document,
    lines,
    problem,
)
from fasten.reader.auth import Auth, Authenticate, OwnTokens, Principal, authenticator
from fasten.reader.correlate import Correlation
from fasten.reader.parameters import PARAMETERS, parameters
from fasten.reader.reads import ReadLog
from fasten.rows import Page, Query

__all__ = ["Headers", "Reader"]

logger = logging.getLogger("fasten")

Headers = Mapping[str, str] | Iterable[tuple[str, str]]
"""Header names and values; names in any case, and as often as they were sent."""

PIECE_ROWS: Final = 200
"""How many rows of a streamed answer are in memory at a time."""

BUDGET_S: Final = 10.0
"""How long a store may take for one page: callers do not wait much longer."""

_METHODS: Final = ("GET", "HEAD")


@attrs.frozen
class _Request:
    """
    A request that was let in.
    """

    principal: Principal
    route: str
    given: Mapping[str, str]
    headers: Mapping[str, str]
    engine: Engine

    @property
    def wants_lines(self) -> bool:
        """
        Tell whether NDJSON was asked for.
        """
        return _wants_lines(self.headers.get("accept", ""))

    @property
    def source(self) -> str:
        """
        Name the process that answers.
        """
        return f"{self.engine.settings.node_id}/{os.getpid()}"


class Reader:
    """
    Answers requests for rows: who may ask is told by *auth*, see `router`.

    The engine is looked up at each request: nothing has to be running before.
    """

    def __init__(self, auth: Auth = None, *, engine: Engine | None = None) -> None:
        self._running: Callable[[], Engine | None] = (
            engines.current if engine is None else lambda: engine
        )
        self._authenticate: Authenticate = authenticator(auth, self._running)
        self._is_open = auth == "none"
        self._reads = ReadLog()

    def handle(
        self, method: str, path: str, query: str | bytes = b"", headers: Headers = ()
    ) -> Response:
        """
        Answer one request; never raises.

        *path* is what stands behind the mount, percent-decoded; *query* is the raw
        query string. A body that is an iterator reads on as it is iterated, and may
        raise AuditStoreError then.
        """
        given = _headers(headers)
        raw = (
            query.encode("utf-8", "surrogatepass") if isinstance(query, str) else query
        )
        try:
            response = self._answer(method.upper(), path, raw, given)
        except Refusal as refusal:
            response = refusal.response()
        except InvalidQuery as error:
            response = problem(400, str(error), parameter=error.parameter)
        except Exception:  # ours: a caller cannot do anything about it
            logger.exception("fasten reader: no answer to %s", repr(path)[:80])
            response = problem(500, "the reader failed; the service's log says why")
        return response.without_body() if method.upper() == "HEAD" else response

    def _answer(
        self, method: str, path: str, query: bytes, headers: Mapping[str, str]
    ) -> Response:
        principal = self._principal(headers)
        route = f"/{path.strip('/')}"
        if route not in PARAMETERS:
            raise Refusal(
                404, f"there is no such route; there are {' '.join(PARAMETERS)}"
            )
        if method not in _METHODS:
            allowed = ", ".join(_METHODS)
            raise Refusal(
                405,
                f"{route} is read only; use {' or '.join(_METHODS)}",
                headers=[("Allow", allowed)],
            )
        _check_scope(principal, route)
        given = parameters(route, query)
        if route == "/openapi.json":
            return document(openapi.document(is_open=self._is_open))
        engine = self._running()
        if engine is None:
            raise Refusal(503, "fasten is not running here; call fasten.init() first")
        request = _Request(principal, route, given, headers, engine)
        return self._rows(request) if route != "/health" else _health(request)

    # -- who --

    def _principal(self, headers: Mapping[str, str]) -> Principal:
        try:
            principal = self._authenticate(headers)
        except Exception as error:  # the user's function: nobody gets in by it
            logger.error("fasten reader: auth= raised %s", type(error).__name__)
            raise Refusal(503, "who you are cannot be told now; try again") from None
        if principal is None:
            raise self._unauthorized(headers)
        if not isinstance(principal, Principal):
            logger.error(
                "fasten reader: auth= returned a %s; return fasten.reader.Principal or "
                "None",
                type(principal).__name__,
            )
            raise Refusal(503, "who you are cannot be told; the service's log says why")
        return principal

    def _unauthorized(self, headers: Mapping[str, str]) -> Refusal:
        challenge = 'Bearer realm="fasten"'
        own = self._authenticate
        if isinstance(own, OwnTokens) and own.is_closed:
            detail = (
                "the reader is closed: set FASTEN_READER_TOKEN and call fasten.init(), "
                "or pass auth= to fasten.reader.router(); then send "
                "`Authorization: Bearer <token>`"
            )
        elif "authorization" in headers:
            challenge += ', error="invalid_token"'
            detail = "the reader does not know these credentials; check the token"
        else:
            detail = "the reader asks who you are: send `Authorization: Bearer <token>`"
        return Refusal(401, detail, headers=[("WWW-Authenticate", challenge)])

    # -- rows --

    def _rows(self, request: _Request) -> Response:
        try:
            pages = (
                _correlated(request)
                if request.route == "/correlate"
                else _paged(request, self._query(request))
            )
            first = next(pages)
        except AuditStoreError as error:
            raise _unavailable(error, request.principal) from None
        if request.route in {"/audit", "/correlate"}:
            self._note(request)
        if not request.wants_lines:
            return first.response()
        return lines(first, iter(()) if "limit" in request.given else pages)

    def _query(self, request: _Request) -> Query:
        query = Query.parse(
            request.route[1:],
            request.given,
            now_us=request.engine.now_us(),
            scope=request.principal.tenant,
        )
        return attrs.evolve(query, within_s=BUDGET_S)

    def _note(self, request: _Request) -> None:
        if "audit" in request.principal.scopes:
            self._reads.note(
                request.engine,
                request.principal,
                request.route,
                request.given,
                request.headers,
            )


def _paged(request: _Request, query: Query) -> Iterator[Listing]:
    """
    Yield the page that was asked for, and for who reads lines those behind it.
    """
    if request.wants_lines and "limit" not in request.given:
        query = attrs.evolve(query, limit=PIECE_ROWS)
    while True:
        page = request.engine.answer(query)
        yield _listing(request, query, page)
        if query.is_last(page):
            return
        query = attrs.evolve(query, cursor=page.next, offset=0, count=False)


def _listing(request: _Request, query: Query, page: Page) -> Listing:
    is_whole = request.wants_lines and "limit" not in request.given
    return Listing(
        rows=[row.to_dict() for row in page.rows],
        limit=query.limit,
        offset=query.offset,
        next=None if is_whole else page.next,
        total=page.total,
        completeness=page.completeness,
        source=request.source if page.completeness == "ring" else None,
    )


def _correlated(request: _Request) -> Iterator[Listing]:
    asked: Correlation | None = Correlation.parse(
        request.given, request.principal, within_s=BUDGET_S
    )
    while asked is not None:
        listing, asked = asked.listing(request.engine, request.source)
        yield listing


def _health(request: _Request) -> Response:
    """
    Tell the state; always 200, because a service whose rows wait still works.

    Reasons name files and servers: they are for whoever sees everything.
    """
    health = request.engine.health()
    if not request.principal.sees_everything:
        health = {"state": health["state"]}
    return document(health)


def _unavailable(error: AuditStoreError, principal: Principal) -> Refusal:
    detail = (
        str(error)
        if principal.sees_everything
        else "the store cannot be read now, or not in time: try again, or narrow the "
        "query by request_id, target, actor or a window of time"
    )
    return Refusal(503, detail, headers=[("Retry-After", "5")])


def _check_scope(principal: Principal, route: str) -> None:
    scope = route[1:]
    is_let_in = (
        bool(principal.scopes)
        if route == "/correlate"
        else scope in principal.scopes or route in {"/health", "/openapi.json"}
    )
    if not is_let_in:
        raise Refusal(
            403,
            f"{principal.name[:80]} may not read {scope}; its scopes do not hold it",
        )


# --- what a request looks like ------------------------------------------------------


def _headers(given: Headers) -> dict[str, str]:
    """
    Lower the names; a header that was sent twice has both values (RFC 9110, 5.2).
    """
    pairs = given.items() if isinstance(given, Mapping) else given
    found: dict[str, str] = {}
    for name, value in cast("Iterable[tuple[str, str]]", pairs):
        key = name.lower()
        found[key] = f"{found[key]}, {value}" if key in found else value
    return found


def _wants_lines(accept: str) -> bool:
    """
    Tell whether NDJSON is asked for by name, and JSON not preferred to it.
    """
    if len(accept) > 1000:
        return False
    weights = dict(map(_weighed, accept.split(",")))
    return weights.get(NDJSON, 0.0) > 0 and weights[NDJSON] >= weights.get(JSON, 0.0)


def _weighed(item: str) -> tuple[str, float]:
    name, *parts = (part.strip().lower() for part in item.split(";"))
    weight = next((p[2:] for p in parts if p.startswith("q=")), "1")
    try:
        return name, float(weight)
    except ValueError:
        return name, 0.0
