# SPDX-License-Identifier: Apache-2.0
"""
The trail of a test: what was recorded, and what a test may assert of it.

Nothing here starts or stops anything: that is `running`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from enum import Enum
from itertools import count
from typing import Any, Final
from uuid import UUID

from fasten import codes, context, processors
from fasten.rows import AUDIT_COLUMNS, SHORT_FORMS, Query, ulid_stamp
from fasten.streams import Draft, finished

__all__ = ["Clock", "Trail"]

Row = dict[str, Any]
"""A row in wire form."""

_NEAREST: Final = 5
_REPORTED: Final = 50
_DETAIL_CHARS: Final = 200


START_NS: Final = 1_776_861_296_000_000_000
"""2026-04-22T12:34:56Z: when a captured test starts."""


class Clock:
    """
    A clock that stands still until it is told to move.

    *now_ns* is nanoseconds since 1970.
    """

    def __init__(self, start_ns: int = START_NS) -> None:
        self.now_ns = start_ns

    def __call__(self) -> int:
        """
        Return nanoseconds since 1970.
        """
        return self.now_ns

    def advance(self, by: float | timedelta) -> None:
        """
        Move the clock *by* so many seconds; back, if that is negative.
        """
        seconds = by.total_seconds() if isinstance(by, timedelta) else by
        self.now_ns += round(seconds * 1_000_000_000)


class Trail:
    """
    What was recorded, in order: `audit`, `sys` and `api` are lists of wire dicts.

    *clock* is what the rows are stamped by.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._entries: list[tuple[str, Row | Draft]] = []
        self._ids = count(1)
        self._mistakes: list[str] = []
        self._failed_lines = processors.failures()

    def __repr__(self) -> str:
        numbers = (f"{len(self._of(s))} {s}" for s in ("audit", "sys", "api"))
        return f"<Trail of {', '.join(numbers)} rows>"

    # -- what engines call -----------------------------------------------------------

    def keep(self, stream: str, row: Row | Draft) -> None:
        """
        Take a row of *stream*; from any thread.
        """
        self._entries.append((stream, row))

    def mint(self, time_ns: int) -> str:
        """
        Return the next counted id; its last digits are 1, 2, 3 and so on.
        """
        return f"evt-{ulid_stamp(time_ns // 1_000_000)}{next(self._ids):016d}"

    # -- what tests read -------------------------------------------------------------

    @property
    def audit(self) -> list[Row]:
        """
        Return the audit rows; those given a connection have `"pending": True`.
        """
        return self._of("audit")

    @property
    def sys(self) -> list[Row]:
        """
        Return the log lines.
        """
        return self._of("sys")

    @property
    def api(self) -> list[Row]:
        """
        Return the requests.
        """
        return self._of("api")

    def _of(self, stream: str) -> list[Row]:
        return [row for name, row in self._finished() if name == stream]

    def _finished(self) -> list[tuple[str, Row]]:
        # Each row is made once: who holds one row twice holds the same dict.
        for at, (stream, row) in enumerate(self._entries):
            if isinstance(row, tuple):
                self._entries[at] = stream, finished(row)
        return [(stream, finished(row)) for stream, row in self._entries]

    def clear(self) -> None:
        """
        Forget what was recorded so far.
        """
        self._entries.clear()

    def rows(self, code: str | None = None, **fields: Any) -> list[Row]:
        """
        Return the audit rows with *code* and *fields*, oldest first.

        Fields are the reader's filters, `since` and `until` among them; `detail=`
        matches a subset, and None asks that there is no value.

        Raises:
            InvalidQuery: a field's name or value is unusable.
        """
        return _Wanted(self.clock, code, fields).among(self.audit)

    def assert_emitted(self, code: str, times: int | None = None, **fields: Any) -> Row:
        """
        Assert that a row with *code* and *fields* was emitted; return the last one.

        *times* asks for exactly so many. *fields* are those of `rows`.

        Raises:
            AssertionError: it was not; the message shows the nearest rows.
            InvalidQuery: a field's name or value is unusable.
        """
        __tracebackhide__ = True
        wanted = _Wanted(self.clock, code, fields)
        found = wanted.among(self.audit)
        if len(found) == times or (found and times is None):
            return found[-1] if found else {}
        was = "was not emitted"
        if times is not None:
            was = f"was emitted {len(found)} times, not {times}"
        raise _failure(f"{wanted} {was}\n{wanted.nearest(self.audit)}")

    def assert_not_emitted(self, code: str, **fields: Any) -> None:
        """
        Assert that no row with *code* and *fields* was emitted.

        Raises:
            AssertionError: one was; the message shows it.
            InvalidQuery: a field's name or value is unusable.
        """
        __tracebackhide__ = True
        if code not in codes.registry.entries:
            self._mistakes.append(f"assert_not_emitted: {codes.registry.unknown(code)}")
        wanted = _Wanted(self.clock, code, fields)
        found = wanted.among(self.audit)
        if found:
            shown = "\n".join(f"  {_line(row)}" for row in found[:_NEAREST])
            raise _failure(f"{wanted} was emitted:\n{shown}")

    def assert_correlated(self, request_id: str | None = None) -> str:
        """
        Assert that all rows share one request id (*request_id*, if given); return it.

        Lines of the start, from before the first request, do not count.

        Raises:
            AssertionError: there are none, or they have several.
        """
        __tracebackhide__ = True
        rows = _of_requests([row for _, row in self._finished()])
        ids = list(dict.fromkeys(str(row["request_id"]) for row in rows))
        if len(ids) == 1 and request_id in (None, ids[0]):
            return ids[0]
        wanted = f"request_id {request_id!r}" if request_id else "one request_id"
        if not ids:
            raise _failure(f"no rows share {wanted}: nothing was recorded")
        strays = [row for row in rows if row["request_id"] != (request_id or ids[0])]
        shown = "\n".join(f"  {row['request_id']}  {_line(row)}" for row in strays[:5])
        raise _failure(f"rows do not share {wanted}; these have another:\n{shown}")

    def report(self) -> str:
        """
        Return what was recorded as text, a line each, in order.
        """
        entries = self._finished()
        lines = [f"{stream:5}  {_line(row)}" for stream, row in entries[:_REPORTED]]
        if len(entries) > _REPORTED:
            lines.append(f"... and {len(entries) - _REPORTED} more")
        return "\n".join(lines)

    def mistakes(self) -> list[str]:
        """
        Return what went wrong and was not raised, a sentence each.

        Rows that FASTEN_STRICT=off let pass, callables of middlewares and trace
        sources that raised, lines that could not be recorded, and assertions about
        codes that nothing registers.
        """
        told = [
            f"{row['code']} {_safe(row['target'])}: {row['detail']['_mistake']}"
            for row in self.audit
            if "_mistake" in (row["detail"] or {})
        ]
        told += [f"{n} of the {what} raised" for what, n in _raised() if n]
        lines = processors.failures() - self._failed_lines
        told += [f"{lines} log lines could not be recorded"] if lines else []
        return [*told, *self._mistakes]

    def inherit(self, mistakes: Iterable[str]) -> None:
        """
        Count the mistakes of a capture inside this one.
        """
        self._mistakes += mistakes


def _raised() -> Iterable[tuple[str, int]]:
    failures = context.failures()
    yield "actor=, tenant= and client= callables", failures["askers"]
    yield "trace sources", failures["sources"]


# --- what is wanted ---------------------------------------------------------------

_OF_A_QUERY: Final = (str, int, UUID, Enum, datetime, timedelta)


class _Wanted:
    """
    A code and fields, as one asks for rows with them.
    """

    def __init__(
        self, clock: Clock, code: str | None, given: Mapping[str, Any]
    ) -> None:
        self.code, self.given = code, given
        self._now_us = clock.now_ns // 1000
        # What is no plain value (None, mock.ANY, pytest.approx) compares itself.
        self._compared = {
            SHORT_FORMS.get(name, name): value
            for name, value in given.items()
            if name == "detail" or not isinstance(value, _OF_A_QUERY)
        }
        asked = {n: v for n, v in given.items() if isinstance(v, _OF_A_QUERY)}
        asked.pop("detail", None)
        self._query = self._parse(asked)
        for name in self._compared.keys() - {"detail", *AUDIT_COLUMNS}:
            self._parse({name: "x"})  # raises, and knows the nearest name
        self._is_bounded = "limit" in asked

    def _parse(self, asked: Mapping[str, Any]) -> Query:
        spelt = {
            name: value.isoformat() if isinstance(value, datetime) else value
            for name, value in asked.items()
        }
        return Query.parse("audit", spelt, now_us=self._now_us, default_order="asc")

    def among(self, rows: list[Row]) -> list[Row]:
        """
        Return those of *rows* that are meant, in the order asked for.
        """
        found = [row for row in rows if self._is_meant(row)]
        if self._query.order == "desc":
            found.reverse()
        last = self._query.offset + self._query.limit if self._is_bounded else None
        return found[self._query.offset : last]

    def _is_meant(self, row: Row) -> bool:
        if self.code is not None and row["code"] != self.code:
            return False
        return self._query.matches(row) and not self._unequal(row)

    def _unequal(self, row: Row) -> list[str]:
        return [n for n, v in self._compared.items() if not _is_equal(n, v, row.get(n))]

    def nearest(self, rows: list[Row]) -> str:
        """
        Show the rows that come nearest, and what keeps each from being meant.
        """
        ranked = sorted(rows, key=self._distance)
        lines = []
        if self.code not in codes.registry.entries:
            lines.append(str(codes.registry.unknown(self.code)))
        if not rows:
            return "\n".join([*lines, "nothing was emitted at all"])
        lines.append("nearest rows:" if len(rows) > 1 else "the only row:")
        for row in ranked[:_NEAREST]:
            lines.append(f"  {_line(row)}")
            if row["code"] == self.code:
                lines += [f"    {wrong}" for wrong in self._differences(row)]
        if len(rows) > _NEAREST:
            lines.append(f"  ... and {len(rows) - _NEAREST} more")
        return "\n".join(lines)

    def _distance(self, row: Row) -> tuple[bool, int]:
        return row["code"] != self.code, len(self._differences(row))

    def _differences(self, row: Row) -> list[str]:
        wrong = [
            f"{name} is {_shown(row.get(name))}, not {_shown(value)}"
            for name, value in self._query.filters.items()
            if row.get(name) != value
        ]
        for name in self._unequal(row):
            wanted, got = self._compared[name], row.get(name)
            if isinstance(wanted, Mapping):
                wrong += _missing(name, wanted, got)
            else:
                wrong.append(f"{name} is {_shown(got)}, not {_shown(wanted)}")
        bare = Query(since_us=self._query.since_us, until_us=self._query.until_us)
        if not bare.matches(row):
            wrong.append(f"timestamp is {row['timestamp']}, outside of since and until")
        return wrong

    def __str__(self) -> str:
        fields = (f" {name}={_shown(value)}" for name, value in self.given.items())
        return f"{self.code}{''.join(fields)}"


def _is_equal(name: str, wanted: Any, got: Any) -> bool:
    if name == "detail" and isinstance(wanted, Mapping):
        return not _missing(name, wanted, got)
    return bool(wanted == got)


def _missing(path: str, wanted: Mapping[str, Any], got: Any) -> list[str]:
    """
    Say what of *wanted* is not in *got*, mappings compared by their common keys.
    """
    if not isinstance(got, Mapping):
        return [f"{path} is {_shown(got)}, not {_shown(dict(wanted))}"]
    wrong = []
    for key, value in wanted.items():
        place = f"{path}.{key}"
        if key not in got:
            wrong.append(f"{place} is missing")
        elif isinstance(value, Mapping):
            wrong += _missing(place, value, got[key])
        elif value != got[key]:
            wrong.append(f"{place} is {_shown(got[key])}, not {_shown(value)}")
    return wrong


# --- words ------------------------------------------------------------------------


def _failure(message: str) -> AssertionError:
    error = AssertionError(message)
    # `Capture` adds the whole trail to the other errors that leave its block.
    vars(error)["fasten_told"] = True
    return error


def _of_requests(rows: list[Row]) -> list[Row]:
    later = [row for row in rows if not str(row["request_id"]).startswith("boot-")]
    return later or rows


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _DETAIL_CHARS else f"{text[:_DETAIL_CHARS]}..."


def _line(row: Mapping[str, Any]) -> str:
    shape = row.get("shape", "audit")
    if shape == "api":
        asked = f"{row['method']} {row['path']}  {row['status']}"
        return f"{_safe(asked)}  {row['request_id']}"
    if shape == "sys":
        return f"{row['level']:8}  {_safe(row['event'])}  {row['request_id']}"
    text = f"{row['code']}  {_safe(row['actor'])}  target={_safe(row['target'])}"
    if row["outcome"] != "success":
        text += f"  {row['outcome']}"
    if row["detail"]:
        text += f"  {_detail(row['detail'])}"
    return text + ("  (pending)" if row.get("pending") else "")


def _detail(detail: object) -> str:
    text = json.dumps(detail, ensure_ascii=False, default=str)
    return _safe(text if len(text) <= _DETAIL_CHARS else f"{text[:_DETAIL_CHARS]}...")


def _safe(text: object) -> str:
    """
    Spell text for a terminal: what is not printable, as an escape.
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in plain)
