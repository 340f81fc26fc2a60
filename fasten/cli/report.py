# SPDX-License-Identifier: Apache-2.0
"""
`report`: what the rows add up to.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import click

from fasten.cli.command import Command, Group, say, write
from fasten.cli.filters import output_option, window_options
from fasten.cli.places import open_source, place_options
from fasten.cli.source import NoStoreYet, all_rows
from fasten.cli.text import Row, counted, json_text, sheet, terminal_safe
from fasten.rows import Query

__all__ = ["report"]

_KEYS: Final = ("actor", "target", "code")
_AGENT: Final = "agent_tool"


@click.group(cls=Group)
def report() -> None:
    """
    Add rows up.
    """


@report.command(
    cls=Command, epilog="Example: fasten report cost --by actor --since 7d -o json"
)
@click.option(
    "--by",
    type=click.Choice(_KEYS),
    default="actor",
    show_default=True,
    help="What to add the costs up by.",
)
@output_option("text", "json", "csv")
@window_options
@place_options
def cost(
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
    Add up what the tool calls of agents cost, to the last digit.

    Counted are rows with `detail.cost_usd`, and calls of tools without; the
    dearest come first.
    """
    window = {"since": since, "until": until, "order": "asc"}
    query = Query.parse("audit", window, now_us=time.time_ns() // 1000)
    with closing(open_source("audit", dsn=dsn, url=url, token=token)) as source:
        try:
            totals = _added_up(all_rows(source, query), by)
        except NoStoreYet as error:
            say(str(error))
            totals = {}
    ranked = sorted(totals.items(), key=lambda item: (-item[1][1], str(item[0])))
    write(_FORMS[output](by, ranked))


_Totals = dict[str | None, tuple[int, Decimal]]
_Ranked = Iterable[tuple[str | None, tuple[int, Decimal]]]


def _added_up(rows: Iterable[Row], by: str) -> _Totals:
    """
    Return calls and cost by the value of *by*; None where that was erased.
    """
    totals: _Totals = {}
    unread = 0
    for row in rows:
        found = _cost(row)
        if found is None:
            continue
        unread += found.is_nan()
        calls, so_far = totals.get(row[by], (0, Decimal()))
        totals[row[by]] = calls + 1, so_far + (Decimal() if found.is_nan() else found)
    if unread:
        say(f"warning: taken as 0, cost_usd is no amount: {counted(unread, 'row')}")
    return totals


def _cost(row: Row) -> Decimal | None:
    """
    Return what a row cost; None if it is about none, NaN if that cannot be read.
    """
    detail = row.get("detail")
    said = detail.get("cost_usd") if isinstance(detail, Mapping) else None
    if said is None:
        return Decimal() if row.get("method") == _AGENT else None
    try:
        # By way of text: a double as short as it was written, not as it is stored.
        amount = Decimal("NaN") if isinstance(said, bool) else Decimal(str(said))
    except InvalidOperation:
        return Decimal("NaN")
    return amount if amount.is_finite() else Decimal("NaN")


def _digits(amount: Decimal) -> str:
    return format(amount.normalize() + 0, "f")


def _as_json(by: str, ranked: _Ranked) -> Iterator[str]:
    # A number of as many digits as there are, which a double may not have.
    objects = [
        f"{{{json_text(by)}:{json_text(value)},"
        f'"calls":{calls},"cost_usd":{_digits(amount)}}}'
        for value, (calls, amount) in ranked
    ]
    yield f"[{','.join(objects)}]"


def _as_csv(by: str, ranked: _Ranked) -> Iterator[str]:
    columns = (by, "calls", "cost_usd")
    rows: list[dict[str, Any]] = [
        {by: value, "calls": calls, "cost_usd": _digits(amount)}
        for value, (calls, amount) in ranked
    ]
    return sheet(rows, columns)


def _as_text(by: str, ranked: _Ranked) -> Iterator[str]:
    yield f"{'cost_usd':>14}  {'calls':>8}  {by}"
    for value, (calls, amount) in ranked:
        shown = "(erased)" if value is None else terminal_safe(value)
        yield f"{_digits(amount):>14}  {calls:>8}  {shown}"


_FORMS: Final = {"text": _as_text, "json": _as_json, "csv": _as_csv}
