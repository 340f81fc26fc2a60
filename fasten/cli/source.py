# SPDX-License-Identifier: Apache-2.0
"""
Where rows come from: a store that this machine reaches, or a reader over HTTP.

Both give pages of rows in wire form. Which rows to ask for is the caller's.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar
from urllib.parse import urlencode, urlsplit

import attrs

from fasten.cli.command import Failure, NoAnswer, WrongUsage
from fasten.cli.text import Row
from fasten.errors import AuditStoreError, InvalidQuery
from fasten.rows import MAX_LIMIT, Page, Query, format_timestamp
from fasten.settings import Dsn

if TYPE_CHECKING:
    from fasten.repository import AuditRepository, Database, StreamRepository

__all__ = [
    "NoStoreYet",
    "OutOfScope",
    "Reader",
    "Source",
    "Store",
    "all_rows",
    "first_rows",
    "reader_url",
]

_T = TypeVar("_T")


class NoStoreYet(AuditStoreError):
    """
    There is no such file or table: nothing was recorded so far, or not there.
    """


class OutOfScope(Failure):
    """
    The reader knows who asks, and does not show this stream to them.
    """


_WHY: Final = "nothing was recorded so far, or not there: see the DSN"


class Source(Protocol):
    """
    What answers queries about one stream.
    """

    def page(self, query: Query) -> Page:
        """
        Return one page of rows in wire form, `shape` first.

        Raises:
            AuditStoreError: there is no answer now.
        """

    def close(self) -> None:
        """
        Let go of connections.
        """


# --- paging ---------------------------------------------------------------------------


def first_rows(
    source: Source, query: Query, number: int
) -> tuple[list[Row], str | None]:
    """
    Return the first *number* rows, and the cursor of what follows them, or None.
    """
    rows: list[Row] = []
    while True:
        wanted = min(MAX_LIMIT, number - len(rows))
        asked = attrs.evolve(query, limit=wanted)
        page = source.page(asked)
        rows += page.rows
        if len(rows) >= number or asked.is_last(page):
            return rows, page.next
        query = attrs.evolve(query, cursor=page.next, offset=0)


def all_rows(source: Source, query: Query) -> Iterator[Row]:
    """
    Yield every row, page by page.
    """
    query = attrs.evolve(query, limit=MAX_LIMIT)
    while True:
        page = source.page(query)
        yield from page.rows
        if query.is_last(page):
            return
        query = attrs.evolve(query, cursor=page.next, offset=0)


# --- a store --------------------------------------------------------------------------


class Store:
    """
    One stream's store, by its DSN.
    """

    def __init__(self, dsn: Dsn, stream: str) -> None:
        from fasten.repository import AuditRepository, Database, StreamRepository

        self.dsn, self.stream = dsn, stream
        self.database: Database = Database(dsn)
        self.repository: AuditRepository | StreamRepository = (
            AuditRepository(dsn, self.database)
            if stream == "audit"
            else StreamRepository(dsn, stream, self.database)  # type: ignore[arg-type]
        )
        self._file: tuple[int, int] | None = None

    def page(self, query: Query) -> Page:
        """
        Return one page of rows in wire form.

        Raises:
            AuditStoreError: the store cannot be read now.
        """
        page = self.read(lambda: self.repository.query(query))
        return attrs.evolve(page, rows=[self.wire(row) for row in page.rows])

    def wire(self, row: Any) -> Row:
        """
        Spell a typed row as its wire form, `shape` first.
        """
        return {"shape": self.stream, **row.to_dict()}

    def read(self, ask: Callable[[], _T]) -> _T:
        """
        Call *ask*; tell what is wrong with the store without its password.

        Raises:
            AuditStoreError: the store cannot be read now.
        """
        self._notice_replacement()
        try:
            return ask()
        except InvalidQuery:
            raise
        except Exception as error:  # the driver's: told without its DSN
            self.database.release()
            raise self._told(error) from None

    def _told(self, error: Exception) -> AuditStoreError:
        from fasten.repository import is_missing

        place = self.dsn.display
        if isinstance(error, FileNotFoundError):
            return NoStoreYet(f"there is no store at {place} yet; {_WHY}")
        if is_missing(error):
            return NoStoreYet(f"{place} has no table {self.dsn.table} yet; {_WHY}")
        problem = self.database.problem(error)
        return AuditStoreError(
            f"the {self.stream} store {self.dsn.display} cannot be read: "
            f"{problem.message}"
        )

    def _notice_replacement(self) -> None:
        """
        Open the file anew where another one has taken its name.
        """
        if self.dsn.path is None:
            return
        try:
            status = Path(self.dsn.path).stat()
        except OSError:
            now = None
        else:
            now = (status.st_dev, status.st_ino)
        if self._file not in (None, now):
            self.database.release()
        self._file = now

    def close(self) -> None:
        """
        Let go of the connections.
        """
        self.database.release()


# --- a reader over HTTP ---------------------------------------------------------------

_MOUNT: Final = "/api/v1/logs"
_TIMEOUT_S: Final = 15.0
_MAX_BODY: Final = 256 * 1024 * 1024
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


def reader_url(given: str) -> str:
    """
    Complete what `--url` names: a bare host means its default mount.

    Raises:
        Failure: it is no HTTP address.
    """
    text = given if "://" in given else f"{_scheme(given)}://{given}"
    try:
        parts = urlsplit(text)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_usable = is_usable and (parts.port is None or parts.port > 0)
    except ValueError:
        is_usable = False
    if not is_usable or parts.query or parts.fragment or parts.username:
        # What was given is not shown: there may be a password in it.
        raise WrongUsage(
            "--url is no address of a reader; write https://host/api/v1/logs "
            "(user and password have no place in it: use --token)"
        )
    path = parts.path.rstrip("/") or _MOUNT
    return f"{parts.scheme}://{parts.netloc}{path}"


def _scheme(host: str) -> str:
    name = urlsplit(f"//{host}").hostname
    return "http" if name in _LOOPBACK else "https"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """
    Follows nothing: urllib would hand the token to whoever it is sent to.
    """

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


class Reader:
    """
    A reader mounted in some service, asked for one stream or for all three.

    *route* is audit, sys, api or correlate. *source* names the process that answered
    last, where the reader says so.
    """

    def __init__(self, url: str, token: str | None, route: str) -> None:
        self.url, self.route = reader_url(url), route
        self.source: str | None = None
        if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise WrongUsage("the token holds a blank or is not ASCII; check it")
        self._token = token
        self._opener = urllib.request.build_opener(_NoRedirects)

    def page(self, query: Query) -> Page:
        """
        Return one page of rows in wire form.

        Raises:
            AuditStoreError: nobody answers, or not for now.
            Failure: the reader refuses, or is none.
        """
        return self.ask(_parameters(query, self.route))

    def ask(self, parameters: Mapping[str, str]) -> Page:
        """
        Return the page that *parameters* ask for.

        Raises:
            AuditStoreError: nobody answers, or not for now.
            Failure: the reader refuses, or is none.
        """
        url = f"{self.url}/{self.route}"
        body = self._get(f"{url}?{urlencode(parameters)}" if parameters else url)
        try:
            return self._page(json.loads(body))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise NoAnswer(
                f"what answers at {url} is no fasten reader; --url is where the "
                f"reader is mounted, as in https://host{_MOUNT}"
            ) from None

    def _page(self, envelope: dict[str, Any]) -> Page:
        self.source = envelope.get("source")
        rows = envelope["rows"]
        if not isinstance(rows, list):
            raise TypeError("rows")
        shaped = [{"shape": self.route, **row} for row in rows]
        total, following = envelope.get("total"), envelope.get("next")
        return Page(
            rows=shaped,
            next=None if following is None else str(following),
            completeness=str(envelope.get("completeness", "store")),
            total=None if total is None else int(total),
        )

    def _get(self, url: str) -> bytes:
        headers = {"Accept": "application/json", "User-Agent": "fasten"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(url, headers=headers)  # noqa: S310  (checked)
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as response:
                body: bytes = response.read(_MAX_BODY)
                return body
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error)
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            shown = getattr(reason, "strerror", None) or reason
            raise AuditStoreError(
                f"no answer from {self.url}: {shown or type(error).__name__}; "
                "is the service up, and the address right?"
            ) from None

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        said = _problem(error)
        match error.code:
            case 400 | 422:
                raise WrongUsage(f"the reader does not take the query{said}")
            case 401:
                cure = (
                    "it does not know this token"
                    if self._token
                    else "give --token, or set FASTEN_READER_TOKEN"
                )
                raise Failure(f"the reader asks who you are: {cure}{said}")
            case 403:
                raise OutOfScope(f"the reader refuses {self.route} to this token{said}")
            case 404:
                raise NoAnswer(
                    f"there is no reader at {self.url}; --url is where it is mounted, "
                    f"as in https://host{_MOUNT}"
                )
            case code if 300 <= code < 400:
                there = error.headers.get("Location", "(it does not say where)")
                raise NoAnswer(
                    f"{self.url} sends us elsewhere, and a token is not carried along; "
                    f"give as --url: {there}"
                )
        raise AuditStoreError(f"the reader at {self.url} answers {error.code}{said}")

    def close(self) -> None:
        """
        Do nothing: no connection is kept.
        """


def _problem(error: urllib.error.HTTPError) -> str:
    """
    Return what an RFC 9457 body says, as the tail of a sentence.
    """
    try:
        body = json.loads(error.read(65_536))
        said = body.get("detail") or body.get("title")
    except (OSError, HTTPException, ValueError, AttributeError):
        return ""
    return f": {str(said)[:500]}" if said else ""


def _parameters(query: Query, route: str) -> dict[str, str]:
    """
    Spell a query as the reader's parameters; what is default is left out.
    """
    given = {name: str(value) for name, value in query.filters.items()}
    if route != "audit" and "service_id" in given:
        given["service"] = given.pop("service_id")
    for name, us in (("since", query.since_us), ("until", query.until_us)):
        if us is not None:
            given[name] = format_timestamp(us)
    if query.q is not None:
        given["q"] = query.q
    given |= {"limit": str(query.limit), "order": query.order}
    if query.order == "desc":
        del given["order"]
    if query.offset:
        given["offset"] = str(query.offset)
    if query.cursor is not None:
        given["cursor"] = query.cursor
    if query.count:
        given["count"] = "true"
    return given
