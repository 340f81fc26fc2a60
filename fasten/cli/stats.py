# SPDX-License-Identifier: Apache-2.0
"""
`stats`: how many rows there are, and of what kind.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, Final

import attrs
import click

from fasten import codes
from fasten.cli.command import Command, say, write
from fasten.cli.filters import load_codes, output_option, window_options
from fasten.cli.places import STREAMS, open_source, open_stores, place_options
from fasten.cli.source import NoStoreYet, OutOfScope, Reader, Source, all_rows
from fasten.cli.text import json_text, short_time, terminal_safe
from fasten.codes import ActorKind, Outcome, RetentionClass, Severity
from fasten.rows import Query

__all__ = ["stats"]

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
@window_options
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
            try:
                told[stream] = _extent(source, query)
            except OutOfScope as error:
                say(error.message)
                continue
            if stream == "audit":
                told["by"] = {by: _counted(source, query, by.replace("-", "_"))}
    if not told.keys() & set(STREAMS):
        raise OutOfScope("the reader shows no stream to this token")
    write([json_text(told)] if output == "json" else _table(told))


def _counted_sources(
    dsn: str | None, url: str | None, token: str | None
) -> dict[str, Source]:
    if url is None:
        return {**open_stores(dsn, token)}
    return {
        stream: open_source(stream, dsn=dsn, url=url, token=token) for stream in STREAMS
    }


def _extent(source: Source, query: Query) -> dict[str, Any]:
    """
    Return how many rows there are, and when the first and the last one was.
    """
    if isinstance(source, Reader) and query.stream != "audit":
        return _leafed(source, query)
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


def _leafed(reader: Reader, query: Query) -> dict[str, Any]:
    """
    Return what `_extent` does for a stream that a reader does not count: page by page.
    """
    number, newest, oldest = 0, None, None
    for row in all_rows(reader, query):
        number += 1
        oldest = row.get("timestamp")
        newest = newest or oldest
    if reader.source is not None:
        say(f"{query.stream} rows are those in the memory of {reader.source}")
    return {"rows": number, "oldest": oldest, "newest": newest}


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
