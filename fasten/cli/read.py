# SPDX-License-Identifier: Apache-2.0
"""
Reading back: `tail`, `trace` and `stats`, of a local store or a remote reader.

How rows look is in `text` and `timeline`, where they come from in `source`.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, Literal

import attrs
import click

from fasten import codes
from fasten.cli.command import (
    Command,
    WrongUsage,
    is_coloured,
    read_settings,
    say,
    write,
)
from fasten.cli.filters import (
    ALL,
    DEFAULT_LIMIT,
    filter_options,
    load_codes,
    window_options,
)
from fasten.cli.follow import follow as following
from fasten.cli.source import (
    NoStoreYet,
    Reader,
    Source,
    Store,
    all_rows,
    first_rows,
)
from fasten.cli.text import OUTPUTS, Row, json_text, render, short_time, terminal_safe
from fasten.cli.timeline import in_order, timeline
from fasten.codes import ActorKind, Outcome, RetentionClass, Severity
from fasten.rows import Query
from fasten.settings import Dsn, Settings, parse_dsn

__all__ = ["stats", "tail", "trace"]

STREAMS: Final = ("audit", "sys", "api")
_ENOUGH: Final = 10**9

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """
    Add what says where to read: --dsn, --url, --token.
    """
    for option in (
        click.option(
            "--token",
            metavar="TEXT",
            help="Who you are to the reader; better set FASTEN_READER_TOKEN, which "
            "`ps` does not show.",
        ),
        click.option(
            "--url",
            metavar="URL",
            help="Ask a service's reader, mounted there; a bare host means "
            "/api/v1/logs on it.",
        ),
        click.option(
            "--dsn", metavar="DSN", help="Read this store, not that of FASTEN_*_DSN."
        ),
    ):
        command = option(command)
    return command


def output_option(*outputs: str) -> _Decorator:
    """
    Add `-o`, with the first of *outputs* as its default.
    """
    return click.option(
        "-o",
        "--output",
        type=click.Choice(outputs),
        default=outputs[0],
        show_default=True,
        help="How to print it.",
    )


# --- where from -----------------------------------------------------------------------


def open_source(
    stream: str, *, dsn: str | None, url: str | None, token: str | None
) -> Source:
    """
    Return what answers for *stream*: the given place, or the environment's.

    Raises:
        WrongUsage: there is none.
        SettingsError: the DSN or a variable is unusable.
    """
    if url is not None:
        _refuse_both(dsn)
        return Reader(url, _token(token), stream)
    if token is not None:
        raise WrongUsage(_NEEDS_URL)
    if dsn is not None:
        return Store(parse_dsn(dsn, cwd=Path.cwd(), table=f"{stream}_log"), stream)
    found = _dsn_of(read_settings(), stream)
    if found is None:
        raise WrongUsage(_nowhere(stream))
    return Store(found, stream)


_NEEDS_URL: Final = "--token goes with --url; a store is opened by its DSN"


def _refuse_both(dsn: str | None) -> None:
    if dsn is not None:
        raise WrongUsage("--dsn and --url exclude each other; give one")


def _dsn_of(settings: Settings, stream: str) -> Dsn | None:
    found: Dsn | None = getattr(settings, f"{stream}_dsn")
    return found


def _nowhere(stream: str) -> str:
    variable = f"FASTEN_{stream.upper()}_DSN"
    if stream == "audit":
        return f"{variable} is not set; set it, or give --dsn, --env-file or --url"
    return (
        f"{stream} rows are in the service's own memory as long as {variable} is not "
        "set; ask its reader with --url, or set it"
    )


def _token(given: str | None) -> str | None:
    if given is not None:
        return given
    names = ("FASTEN_READER_TOKEN", "FASTEN_READER_TOKEN_FILE")
    # By itself: what else is set here is the business of the service, not of a reader
    # somewhere else.
    found = {name: os.environ[name] for name in names if name in os.environ}
    settings = Settings.from_env(
        found, {"service_id": "fasten"}, hostname=socket.gethostname(), cwd=Path.cwd()
    )
    tokens = settings.reader_token
    return tokens[0].reveal() if tokens else None


# --- tail -----------------------------------------------------------------------------


@click.command(
    cls=Command,
    epilog="Example: fasten tail --stream audit --request-id a1b2c3d4 --since 2h",
)
@click.option(
    "--stream",
    type=click.Choice(STREAMS),
    default="audit",
    show_default=True,
    help="Which of the three streams.",
)
@click.option("-f", "--follow", is_flag=True, help="Go on with new rows as they come.")
@output_option(*OUTPUTS)
@window_options(with_page=True)
@place_options
@filter_options()
def tail(
    *,
    stream: str,
    follow: bool,
    output: str,
    limit: int,
    dsn: str | None,
    url: str | None,
    token: str | None,
    order: Literal["asc", "desc"] | None,
    **given: Any,
) -> None:
    """
    Print the newest rows of a stream, oldest first.

    Reads the store of FASTEN_AUDIT_DSN (FASTEN_SYS_DSN, FASTEN_API_DSN), or asks a
    reader with --url. Filters narrow it down.
    """
    count = given.pop("count")
    query = Query.parse(
        stream, {**given, "order": order}, now_us=time.time_ns() // 1000
    )
    if follow:
        _refuse_with_follow(query, output, order=order, count=count)
    with closing(open_source(stream, dsn=dsn, url=url, token=token)) as source:
        if count:
            page = source.page(attrs.evolve(query, count=True, limit=1))
            write([str(page.total)])
        elif follow:
            _print_for_ever(source, query, limit or _ENOUGH, output)
        else:
            rows = _rows(source, query, limit, order)
            write(render(rows, output, stream, is_coloured=is_coloured()))


def _refuse_with_follow(
    query: Query, output: str, *, order: str | None, count: bool
) -> None:
    """
    Say which options make no sense where the output has no end.

    Raises:
        WrongUsage: there is one of them.
    """
    wrong = {
        "--until": query.until_us is not None,
        "--order": order is not None,
        "--cursor": query.cursor is not None,
        "--offset": query.offset > 0,
        "--count": count,
    }
    names = [name for name, is_given in wrong.items() if is_given]
    if names:
        raise WrongUsage(f"{', '.join(names)}: not together with --follow")
    if output == "json":
        raise WrongUsage("-o json has an end, --follow has none; use -o ndjson")


def _print_for_ever(source: Source, query: Query, number: int, output: str) -> None:
    rows = following(source, query, number)
    try:
        write(render(rows, output, query.stream, is_coloured=is_coloured()))
    except KeyboardInterrupt:
        return  # the way to end it


def _rows(
    source: Source, query: Query, limit: int, order: Literal["asc", "desc"] | None
) -> Iterable[Row]:
    if limit == ALL:
        if isinstance(source, Reader) and query.stream != "audit":
            # A reader gives these newest first only; there are as many as in a ring.
            rows = list(all_rows(source, attrs.evolve(query, order="desc")))
            return rows if order == "desc" else rows[::-1]
        # Oldest first without holding a whole store in memory.
        return all_rows(source, attrs.evolve(query, order=order or "asc"))
    rows, behind = first_rows(source, query, limit)
    if behind is not None and order is not None:
        say(f"there are more: --order {order} --cursor {behind}")
    elif behind is not None and limit == DEFAULT_LIMIT:
        say(f"these are the newest {limit} rows; -n all prints all")
    return rows if order else rows[::-1]


# --- trace ----------------------------------------------------------------------------


@click.command(
    cls=Command,
    epilog="Example: fasten trace a1b2c3d4 --url https://shop.example",
)
@click.argument("request_id")
@output_option(*OUTPUTS)
@place_options
def trace(
    request_id: str, *, output: str, dsn: str | None, url: str | None, token: str | None
) -> None:
    """
    Show what happened under one request id: the three streams on one timeline.
    """
    rows = in_order(_correlated(request_id, dsn=dsn, url=url, token=token))
    if not rows:
        say(f"nothing is recorded under request id {request_id}")
    if output == "text":
        lines = timeline(request_id, rows, width=_width(), is_coloured=is_coloured())
    else:
        lines = render(rows, output, "trace")
    write(lines)


def _width() -> int:
    if not sys.stdout.isatty():
        return 80
    return max(40, shutil.get_terminal_size((80, 24)).columns)


def _correlated(
    request_id: str, *, dsn: str | None, url: str | None, token: str | None
) -> list[Row]:
    if url is not None:
        _refuse_both(dsn)
        return list(_correlate(Reader(url, _token(token), "correlate"), request_id))
    asked = {"request_id": request_id, "order": "asc"}
    found: list[Row] = []
    for stream, source in _stores(dsn, token).items():
        with closing(source):
            try:
                found += all_rows(source, Query.parse(stream, asked, now_us=0))
            except NoStoreYet as error:
                say(str(error))
    return found


def _stores(dsn: str | None, token: str | None) -> dict[str, Store]:
    """
    Open each stream that has a store; say which have none.

    Raises:
        WrongUsage: none has.
    """
    if token is not None:
        raise WrongUsage(_NEEDS_URL)
    settings = read_settings()
    dsns = {stream: _dsn_of(settings, stream) for stream in STREAMS}
    if dsn is not None:
        dsns["audit"] = parse_dsn(dsn, cwd=Path.cwd())
    if not any(dsns.values()):
        raise WrongUsage(_nowhere("audit"))
    for stream, place in dsns.items():
        if place is None:
            say(_nowhere(stream))
    return {stream: Store(place, stream) for stream, place in dsns.items() if place}


def _correlate(reader: Reader, request_id: str) -> Iterator[Row]:
    parameters = {"request_id": request_id}
    while True:
        page = reader.ask(parameters)
        yield from page.rows
        if page.next is None or not page.rows:
            return
        parameters["cursor"] = page.next


# --- stats ----------------------------------------------------------------------------

_GROUPS: Final = ("code", "severity", "outcome", "actor_kind", "retention_class")


@click.command(
    cls=Command,
    epilog="Example: fasten stats --since 24h --by outcome",
)
@click.option(
    "--by",
    type=click.Choice([name.replace("_", "-") for name in _GROUPS]),
    default="code",
    show_default=True,
    help="What to count the audit rows by.",
)
@output_option("text", "json")
@window_options(with_page=False)
@place_options
def stats(
    *,
    by: str,
    output: str,
    since: str | None,
    until: str | None,
    dsn: str | None,
    url: str | None,
    token: str | None,
) -> None:
    """
    Count the rows of each stream, and audit rows by code or another anchor.
    """
    window = {"since": since, "until": until}
    now_us = time.time_ns() // 1000
    told: dict[str, Any] = {"by": {}}
    for stream, source in _counted_sources(dsn, url, token).items():
        with closing(source):
            query = Query.parse(stream, window, now_us=now_us)
            told[stream] = _extent(source, query)
            if stream == "audit":
                told["by"] = {by: _counted(source, query, by.replace("-", "_"))}
    write([json_text(told)] if output == "json" else _table(told))


def _counted_sources(
    dsn: str | None, url: str | None, token: str | None
) -> dict[str, Source]:
    if url is None:
        return {**_stores(dsn, token)}
    # Readers count audit rows only.
    return {"audit": open_source("audit", dsn=dsn, url=url, token=token)}


def _extent(source: Source, query: Query) -> dict[str, Any]:
    """
    Return how many rows there are, and when the first and the last one was.
    """
    try:
        newest = source.page(attrs.evolve(query, limit=1, count=True))
    except NoStoreYet:
        return {"rows": 0, "oldest": None, "newest": None}
    oldest = source.page(attrs.evolve(query, limit=1, order="asc"))
    times = [
        page.rows[0].get("timestamp") if page.rows else None
        for page in (oldest, newest)
    ]
    return {"rows": newest.total, "oldest": times[0], "newest": times[1]}


def _counted(source: Source, query: Query, name: str) -> dict[str, int]:
    """
    Count rows by each value that *name* is known to have; most first.
    """
    counts: dict[str, int] = {}
    try:
        for value in _known(name):
            asked = attrs.evolve(query, filters={name: value}, limit=1, count=True)
            counts[value] = source.page(asked).total or 0
    except NoStoreYet:
        return {}
    found = {value: number for value, number in counts.items() if number}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _known(name: str) -> list[str]:
    if name == "code":
        load_codes()
        return sorted(codes.registry.entries)
    kinds = {
        "severity": Severity,
        "outcome": Outcome,
        "actor_kind": ActorKind,
        "retention_class": RetentionClass,
    }
    return [str(member.value) for member in kinds[name]]


def _table(told: dict[str, Any]) -> Iterator[str]:
    for stream in STREAMS:
        if stream in told:
            extent = told[stream]
            span = (
                f"  {short_time(extent['oldest'])} .. {short_time(extent['newest'])}"
                if extent["oldest"]
                else ""
            )
            yield f"{stream:<5}  {extent['rows']:>10} rows{span}"
    for name, counts in told["by"].items():
        yield ""
        yield f"{'rows':>10}  {name}"
        for value, number in counts.items():
            yield f"{number:>10}  {terminal_safe(value)}"
        other = told["audit"]["rows"] - sum(counts.values())
        if other > 0:
            yield f"{other:>10}  (other)"
