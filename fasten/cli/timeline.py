# SPDX-License-Identifier: Apache-2.0
"""
What happened under one request id, the three streams on one timeline: pure functions.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from fasten.cli.text import Row, free_fields, json_text, paint, plain, terminal_safe
from fasten.rows import parse_timestamp

__all__ = ["in_order", "timeline"]

_STYLES: Final[Mapping[str, Mapping[str, Any]]] = {
    "audit": {"fg": "cyan"},
    "sys": {"dim": True},
    "api": {"fg": "blue"},
}
_INDENT: Final = 20
_MOST_LINES: Final = 6


def in_order(rows: Sequence[Row]) -> list[Row]:
    """
    Sort rows of all streams by their time; at the same time, audit goes first.
    """
    order = {"audit": 0, "sys": 1, "api": 2}
    return sorted(
        rows,
        key=lambda row: (
            str(row.get("timestamp")),
            order.get(str(row.get("shape")), 3),
        ),
    )


def timeline(
    request_id: str, rows: Sequence[Row], *, width: int = 80, is_coloured: bool = False
) -> Iterator[str]:
    """
    Yield the lines that show *rows*, which are in order, within *width* columns.
    """
    if not rows:
        return
    first, last = (_us(row) for row in (rows[0], rows[-1]))
    yield f"request {terminal_safe(request_id)}"
    yield (
        f"{terminal_safe(rows[0].get('timestamp'))}  {len(rows)} "
        f"row{'s' * (len(rows) != 1)} in {(last - first) / 1e6:.3f} s"
    )
    place = None
    for row in rows:
        here = f"{row.get('service_id')} on {row.get('source_node_id')}"
        if here != place:
            yield f"{'':11}-- {terminal_safe(here)}"[:width]
            place = here
        yield from _entry(row, first, width, is_coloured=is_coloured)


def _us(row: Row) -> int:
    try:
        return parse_timestamp(str(row.get("timestamp")))
    except ValueError:
        return 0


def _entry(row: Row, first_us: int, width: int, *, is_coloured: bool) -> Iterator[str]:
    offset = f"+{(_us(row) - first_us) / 1e6:.3f}s"
    stream = str(row.get("shape"))
    lines = textwrap.wrap(
        _what(row),
        max(width - _INDENT, 20),
        subsequent_indent="  ",
        break_on_hyphens=False,
        max_lines=_MOST_LINES,
        placeholder=" ...",
    )
    name = f"{terminal_safe(stream):<5}"
    if is_coloured:
        name = paint(name, _STYLES.get(stream))
    head, *others = lines or [""]
    yield f"{offset:>11}  {name}  {head}"
    for line in others:
        yield f"{'':{_INDENT}}{line}"


def _what(row: Row) -> str:
    match row.get("shape"):
        case "sys":
            return (
                f"{terminal_safe(row.get('level'))}: "
                f"{terminal_safe(row.get('event'))} {_pairs(free_fields(row))}"
            )
        case "api":
            return (
                f"{plain(row.get('status'))} {terminal_safe(row.get('method'))} "
                f"{terminal_safe(row.get('path'))} "
                + _pairs({k: row.get(k) for k in ("duration_ms", "actor", "client")})
            )
    return _audit(row)


def _audit(row: Row) -> str:
    who, whom = row.get("actor"), row.get("target")
    said = {
        name: row.get(name)
        for name in ("on_behalf_of", "reason", "client")
        if row.get(name) is not None
    }
    if row.get("outcome") != "success":
        said = {"outcome": row.get("outcome"), **said}
    detail = row.get("detail")
    return (
        f"{terminal_safe(row.get('code'))}  {_name(who)} -> {_name(whom)} "
        f"{_pairs(said)} {json_text(detail) if detail else ''}"
    )


def _name(value: object) -> str:
    return "(erased)" if value is None else terminal_safe(value)


def _pairs(fields: Mapping[str, Any]) -> str:
    return " ".join(
        f"{terminal_safe(name)}={plain(value)}"
        for name, value in fields.items()
        if value is not None
    )
