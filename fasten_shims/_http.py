# SPDX-License-Identifier: Apache-2.0
"""
What the HTTP shims share: a request's id and caller, and its one api row.

How a server or framework hands over requests lives in `http`, `wsgi`, `django` and
`flask`; nothing here knows any of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any, Final, NamedTuple

from fasten import record_api
from fasten.context import (
    HEADER,
    Context,
    accept,
    ask,
    current,
    is_async,
    parse_traceparent,
    resume,
    scope,
    trusts_request_ids,
)

__all__ = [
    "ABORTED",
    "HEADER",
    "KEY",
    "Asker",
    "Asks",
    "Exchange",
    "open_scope",
    "skipper",
]

KEY: Final = "fasten.exchange"
"""Where a request keeps its Exchange: the ASGI scope, or the WSGI environ."""

ABORTED: Final = 499
"""nginx's status for a request whose client left before there was an answer."""

Asker = Callable[[Any], object]
"""Names the caller, their tenant or address from the request; None: not known yet."""


class Asks(NamedTuple):
    """
    The callables of one middleware.
    """

    actor: Asker | None = None
    tenant: Asker | None = None
    client: Asker | None = None

    @classmethod
    def checked(
        cls, actor: Asker | None, tenant: Asker | None, client: Asker | None
    ) -> Asks:
        """
        Take what a middleware was given, or refuse it when the service starts.

        Raises:
            TypeError: one is not a plain callable.
        """
        given = {"actor": actor, "tenant": tenant, "client": client}
        for name, asker in given.items():
            if asker is not None and not callable(asker):
                raise TypeError(
                    f"{name}={asker!r} cannot be called; give a function of the "
                    f"request, as in {name}=lambda request: ..."
                )
            if is_async(asker):
                raise TypeError(
                    f"{name}={asker!r} is a coroutine function, but rows ask for it "
                    "in the middle of sync code; call fasten.identify() from an async "
                    "dependency or middleware instead"
                )
        return cls(actor, tenant, client)


def open_scope(
    ids: Sequence[bytes | str],
    traceparent: bytes | str | None,
    *,
    client: str | None,
    request: object,
    asks: Asks,
) -> AbstractContextManager[Context]:
    """
    Open the scope of a request that came with *ids* as its X-Request-ID headers.

    Of several ids none is taken: nobody can say which is the caller's.
    """
    inbound = accept(ids[0]) if len(ids) == 1 else None
    trace_id, span_id = parse_traceparent(traceparent) or (None, None)
    is_trusted = trusts_request_ids()
    return scope(
        (inbound or trace_id) if is_trusted else None,
        kind="http",
        method="http",
        client=client,
        trace_id=trace_id,
        span_id=span_id,
        client_request_id=None if is_trusted else inbound,
        request=request,
        ask_actor=asks.actor,
        ask_tenant=asks.tenant,
        ask_client=asks.client,
    )


def skipper(skip: str | Iterable[str]) -> Callable[[str], bool]:
    """
    Return what tells whether a path is one of *skip*; `*` stands for any text.

    Raises:
        TypeError: a pattern is not a string.
    """
    patterns = [skip] if isinstance(skip, str) else list(skip)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"skip= holds {pattern!r}, which is no path; "
                'give strings, as in skip={"/health", "/static/*"}'
            )
    exact = frozenset(pattern for pattern in patterns if "*" not in pattern)
    globs = [re.escape(p).replace(r"\*", ".*") for p in patterns if "*" in p]
    if not globs:
        return exact.__contains__
    matches = re.compile("|".join(globs), re.DOTALL).fullmatch
    return lambda path: path in exact or matches(path) is not None


class Exchange:
    """
    One request and its answer: what all middlewares around it know together.

    The outermost makes it and watches the answer go by. Each says what it is there
    for, *is_stamped* (the answer carries the id) or *is_logged* (there is an api row),
    so their order does not matter. *root* is where the application is mounted, *route*
    the template that answered, once that is known.

    It lies in the request that it describes, so it refers to nothing of it.
    """

    __slots__ = (
        "_asks",
        "_started",
        "bytes",
        "cell",
        "is_complete",
        "is_logged",
        "is_stamped",
        "is_told",
        "method",
        "path",
        "root",
        "route",
        "status",
    )

    def __init__(
        self, cell: Context, asks: Asks, method: str, path: str, root: str
    ) -> None:
        self.cell, self._asks = cell, asks
        self.method, self.path, self.root = method, path, root
        self.route: str | None = None
        self.status: int | None = None
        self.bytes: int | None = 0
        self.is_complete = self.is_logged = self.is_stamped = self.is_told = False
        self._started = perf_counter()

    def ask(self, request: object, asks: Asks) -> None:
        """
        Have an inner middleware's callables asked, too.
        """
        if asks in (_NOBODY, self._asks):
            return
        self._asks = asks
        actor, tenant, client = asks
        ask(self.cell, request, actor=actor, tenant=tenant, client=client)

    def log(self, is_skipped: Callable[[str], bool]) -> None:
        """
        Ask for an api row, unless the path is to be skipped.
        """
        inner = self.path.removeprefix(self.root)
        if not is_skipped(self.path) and not is_skipped(inner):
            self.is_logged = True

    def count(self, size: int | None) -> None:
        """
        Add the size of a piece of the body; None if it cannot be known.
        """
        self.bytes = None if size is None or self.bytes is None else self.bytes + size

    def fail(self, error: BaseException) -> None:
        """
        Record that the application raised: whatever was sent before, it is a 500.

        But for what cancels it, in asyncio, trio or a generator: nobody failed then.
        """
        if not isinstance(error, Exception | KeyboardInterrupt | SystemExit):
            self.abort()
            return
        self.status, self.is_complete = 500, False
        self.tell()

    def abort(self) -> None:
        """
        Record that the answer was broken off: the client left, or the server ends.
        """
        self.status, self.is_complete = self.status or ABORTED, False
        self.tell()

    def tell(self) -> None:
        """
        Record the api row, the first time it is asked for.
        """
        if self.is_told:
            return
        self.is_told = True
        if not self.is_logged:
            return
        if current() is self.cell:
            self._record()
        else:
            with resume(self.cell):
                self._record()

    def _record(self) -> None:
        extra = {}
        if self.cell.client_request_id is not None:
            extra["client_request_id"] = self.cell.client_request_id
        record_api(
            method=self.method,
            path=self.path,
            route=self.route,
            status=self.status,
            duration_ms=round((perf_counter() - self._started) * 1000, 3),
            bytes=0 if self.method == "HEAD" else self.bytes,
            complete=self.is_complete,
            **extra,
        )


_NOBODY: Final = Asks()
