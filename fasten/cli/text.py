# SPDX-License-Identifier: Apache-2.0
"""
Rows as the terminal, a spreadsheet or another program wants them: pure functions.

Everything here takes rows in wire form and yields lines. Where rows come from is
`source`'s; how several streams are laid on one timeline, `timeline`'s.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import click

from fasten.rows import API_COLUMNS, AUDIT_COLUMNS, SYS_COLUMNS

__all__ = [
    "OUTPUTS",
    "Row",
    "audit_line",
    "counted",
    "escaped",
    "free_fields",
    "json_text",
    "paint",
    "plain",
    "render",
    "sheet",
    "short_time",
    "terminal_safe",
    "text_line",
]

Row = Mapping[str, Any]
"""A row in wire form; `shape` names its stream."""

OUTPUTS: Final = ("text", "json", "ndjson", "csv")
"""The values of `-o`."""

_LEVELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "debug": {"dim": True},
    "warn": {"fg": "yellow"},
    "warning": {"fg": "yellow"},
    "error": {"fg": "red"},
    "critical": {"fg": "red", "bold": True},
}
_OUTCOMES: Final[Mapping[str, Mapping[str, Any]]] = {
    "failure": {"fg": "red"},
    "denied": {"fg": "red", "bold": True},
}


# --- what a terminal may see --------------------------------------------------------


def terminal_safe(value: object) -> str:
    """
    Spell *value* so that no control, bidi or invisible character reaches a terminal.
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _escape(character: str) -> str:
    number = ord(character)
    if number < 0x100:
        return _SHORT.get(character, f"\\x{number:02x}")
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def json_text(value: object) -> str:
    """
    Encode *value* as compact JSON that is as safe to look at as it is to parse.
    """
    return escaped(
        json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    )


def escaped(text: str) -> str:
    """
    Return JSON text with everything escaped that a terminal should not get.
    """
    if text.isprintable():
        return text
    # What is not printable can only stand inside a string: there it may be escaped.
    return "".join(c if c.isprintable() else _json_escape(c) for c in text)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def paint(text: str, style: Mapping[str, Any] | None) -> str:
    """
    Colour *text*; None leaves it as it is.
    """
    return click.style(text, **style) if style else text


# --- text ---------------------------------------------------------------------------


def counted(number: int, noun: str) -> str:
    """
    Return `1 row`, `2 rows`.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def short_time(timestamp: object) -> str:
    """
    Cut a wire timestamp to seconds: `2026-04-22T12:34:56Z`.
    """
    return f"{terminal_safe(timestamp)[:19]}Z"


def text_line(row: Row, *, is_coloured: bool = False) -> str:
    """
    Spell a row of any stream as one line for people.
    """
    spell = _LINES.get(str(row.get("shape")), audit_line)
    return spell(row, is_coloured=is_coloured)


def audit_line(row: Row, *, is_coloured: bool = False) -> str:
    """
    Spell an audit row: time, code, actor and target, in columns.
    """
    code = f"{terminal_safe(row.get('code')):<17}"
    if is_coloured:
        code = paint(code, _style(row))
    actor = f"{_anchor(row.get('actor')):<6}"
    target = _anchor(row.get("target"))
    return f"{short_time(row.get('timestamp'))}  {code}  {actor}  target={target}"


def _anchor(value: object) -> str:
    # Anchors are never empty: what is null was erased.
    return "(erased)" if value is None else terminal_safe(value)


def _style(row: Row) -> Mapping[str, Any] | None:
    level = _LEVELS.get(str(row.get("severity") or row.get("level")))
    return _OUTCOMES.get(str(row.get("outcome"))) or level


def _sys_line(row: Row, *, is_coloured: bool = False) -> str:
    level = f"{terminal_safe(row.get('level')):<8}"
    if is_coloured:
        level = paint(level, _style(row))
    fields = _pairs(free_fields(row))
    return (
        f"{short_time(row.get('timestamp'))}  {level}  "
        f"{terminal_safe(row.get('event'))}{fields}"
    )


def _api_line(row: Row, *, is_coloured: bool = False) -> str:
    status = row.get("status")
    shown = f"{'-' if status is None else terminal_safe(status):<3}"
    if is_coloured and isinstance(status, int):
        style = "red" if status >= 500 else "yellow" if status >= 400 else None
        shown = paint(shown, {"fg": style} if style else None)
    return (
        f"{short_time(row.get('timestamp'))}  {shown}  "
        f"{terminal_safe(row.get('method')):<6}  {terminal_safe(row.get('path'))}  "
        f"{_milliseconds(row.get('duration_ms'))}  actor={plain(row.get('actor'))}"
    )


def _milliseconds(value: object) -> str:
    return f"{value:.1f}ms" if isinstance(value, int | float) else "-"


def _pairs(fields: Mapping[str, Any]) -> str:
    return "".join(f"  {terminal_safe(k)}={plain(v)}" for k, v in fields.items())


def plain(value: object) -> str:
    """
    Spell a value bare where that reads as one word, else as JSON.
    """
    if value is None:
        return "-"
    if isinstance(value, str) and value and not set(value) & set(' "='):
        return terminal_safe(value)
    return json_text(value)


_LINES: Final = {"audit": audit_line, "sys": _sys_line, "api": _api_line}


# --- for programs -------------------------------------------------------------------

_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "audit": AUDIT_COLUMNS,
    "sys": (*SYS_COLUMNS, "fields"),
    "api": (*API_COLUMNS, "fields"),
    # All three on one sheet.
    "trace": tuple(
        dict.fromkeys(("shape", *AUDIT_COLUMNS, *SYS_COLUMNS, *API_COLUMNS, "fields"))
    ),
}


_FIXED: Final = {"audit": AUDIT_COLUMNS, "sys": SYS_COLUMNS, "api": API_COLUMNS}


def free_fields(row: Row) -> dict[str, Any]:
    """
    Return what a sys or api row carries beside its fixed keys.
    """
    fixed = _FIXED.get(str(row.get("shape")), AUDIT_COLUMNS)
    return {k: v for k, v in row.items() if k not in fixed and k != "shape"}


def render(
    rows: Iterable[Row], output: str, stream: str, *, is_coloured: bool = False
) -> Iterator[str]:
    """
    Yield the lines of *rows* in one of OUTPUTS, as they come.

    *stream* is audit, sys or api, or trace for all three.
    """
    match output:
        case "text":
            return (text_line(row, is_coloured=is_coloured) for row in rows)
        case "ndjson":
            return map(json_text, rows)
        case "json":
            return _array(rows)
        case "csv":
            return sheet(
                ({**row, "fields": free_fields(row)} for row in rows), _COLUMNS[stream]
            )
    raise ValueError(f"unknown output {output!r}; use one of {' '.join(OUTPUTS)}")


def _array(rows: Iterable[Row]) -> Iterator[str]:
    before: str | None = None
    for row in rows:
        yield "[" if before is None else f"{before},"
        before = json_text(row)
    if before is None:
        yield "[]"
        return
    yield before
    yield "]"


def sheet(rows: Iterable[Row], columns: tuple[str, ...]) -> Iterator[str]:
    """
    Yield rows as CSV (RFC 4180) that no spreadsheet takes for formulas.
    """
    yield ",".join(columns)
    for row in rows:
        yield _csv_line([_cell(row.get(name)) for name in columns])


def _csv_line(cells: list[str]) -> str:
    buffer = io.StringIO()
    # The writer quotes a line end only if its own has one.
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue().removesuffix("\r\n")


# Full-width forms are folded to the plain ones by some spreadsheets.
_FORMULA: Final = tuple("=+-@\uff1d\uff0b\uff0d\uff20|%")


def _cell(value: object) -> str:
    """
    Spell one cell; text that a spreadsheet would run as a formula gets a quote first.

    See https://owasp.org/www-community/attacks/CSV_Injection.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    text = value if isinstance(value, str) else json_text(value)
    if text[:1] in ("\t", "\r", "\n") or text.lstrip().startswith(_FORMULA):
        return f"'{text}"
    return text
