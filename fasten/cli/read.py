# SPDX-License-Identifier: Apache-2.0
"""
Reading rows back: `tail` and `trace`, of a local store or a remote reader.

How rows look is in `text` and `timeline`, where they come from in `places`.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any, Final

import attrs
import click

from fasten.cli.command import Command, WrongUsage, is_coloured, say, write
from fasten.cli.filters import (
    ALL,
    DEFAULT_LIMIT,
    filter_options,
    output_option,
    page_options,
    window_options,
)
from fasten.cli.follow import follow as following
from fasten.cli.places import (
    STREAMS,
    open_source,
    open_stores,
    place_options,
    reader_token,
    refuse_both,
)
from fasten.cli.source import NoStoreYet, Reader, Source, all_rows, first_rows
from fasten.cli.text import OUTPUTS, Row, render
from fasten.cli.timeline import in_order, timeline
from fasten.rows import Query, ReadingOrder

__all__ = ["tail", "trace"]

_ENOUGH: Final = 10**9


# --- tail ---------------------------------------------------------------------------


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
@window_options
@page_options
@place_options
@filter_options
def tail(
    *,
    stream: str,
    follow: bool,
    output: str,
    limit: int,
    dsn: str | None,
    url: str | None,
    token: str | None,
    order: ReadingOrder | None,
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
    source: Source, query: Query, limit: int, order: ReadingOrder | None
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
        say(f"go on from here: --order {order} --cursor {behind}")
    elif behind is not None and limit == DEFAULT_LIMIT:
        say(f"these are the newest {limit} rows; -n all prints all")
    return rows if order else rows[::-1]


# --- trace --------------------------------------------------------------------------


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
        refuse_both(dsn)
        return list(
            _correlate(Reader(url, reader_token(token), "correlate"), request_id)
        )
    asked = {"request_id": request_id, "order": "asc"}
    found: list[Row] = []
    for stream, source in open_stores(dsn, token).items():
        with closing(source):
            try:
                found += all_rows(source, Query.parse(stream, asked, now_us=0))
            except NoStoreYet as error:
                say(str(error))
    return found


def _correlate(reader: Reader, request_id: str) -> Iterator[Row]:
    parameters = {"request_id": request_id}
    while True:
        page = reader.ask(parameters)
        yield from page.rows
        if page.next is None or not page.rows:
            return
        parameters["cursor"] = page.next
