# SPDX-License-Identifier: Apache-2.0
"""
Assertions over what a test made fasten record.

`capture()` works in any test runner; the pytest fixture over it is in `plugin`.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final

from fasten import codes, engine
from fasten.engine import Engine
from fasten.rows import (
    AUDIT_COLUMNS,
    SHORT_FORMS,
    WIRE_VERSION,
    Pending,
    format_timestamp,
    ulid_stamp,
)
from fasten.settings import Settings

__all__ = ["Clock", "Trail", "capture"]

START_NS: Final = 1_776_861_296_000_000_000
"""2026-04-22T12:34:56Z: when a captured test starts."""


class Clock:
    """
    A clock that stands still until it is told to move.
    """

    def __init__(self, start_ns: int = START_NS) -> None:
        self.now_ns = start_ns

    def __call__(self) -> int:
        """
        Return nanoseconds since 1970.
        """
        return self.now_ns

    def advance(self, seconds: float) -> None:
        """
        Move the clock by *seconds*.
        """
        self.now_ns += round(seconds * 1_000_000_000)


class Trail:
    """
    What was recorded: `audit`, `sys` and `api`, as wire dicts in order.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.audit: list[dict[str, Any]] = []
        self._engine: Engine | None = None
        self._ids = count(1)

    # -- what the engine calls --

    def append(self, payload: bytes, row: tuple[Any, ...]) -> int:  # noqa: ARG002
        """
        Take a row that was emitted.
        """
        self.audit.append(self._wire(row))
        return len(self.audit)

    def mint(self, time_ns: int) -> str:
        """
        Return the next counted id: evt-...1, evt-...2.
        """
        return f"evt-{ulid_stamp(time_ns // 1_000_000)}{next(self._ids):016d}"

    def attach(self, running: Engine) -> None:
        """
        Read sys and api rows from *running* from now on.
        """
        self._engine = running

    def _wire(self, row: tuple[Any, ...]) -> dict[str, Any]:
        values = Pending(*row)._asdict()
        values["timestamp"] = format_timestamp(values.pop("timestamp_us"))
        values["detail"] = json.loads(values["detail"])
        settings = self._engine.settings if self._engine else None
        values |= {
            "wire_version": WIRE_VERSION,
            "origin_id": values["id"],
            "service_id": settings.service_id if settings else "test",
            "source_node_id": settings.node_id if settings else "test",
        }
        return {name: values.get(name) for name in AUDIT_COLUMNS}

    # -- what tests read --

    @property
    def sys(self) -> list[dict[str, Any]]:
        """
        Return the log lines.
        """
        return [] if self._engine is None else self._engine.sys.ring.rows()

    @property
    def api(self) -> list[dict[str, Any]]:
        """
        Return the requests.
        """
        return [] if self._engine is None else self._engine.api.ring.rows()

    def rows(self, code: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """
        Return the audit rows with *code* and *fields*; `detail=` matches a subset.
        """
        return [row for row in self.audit if _matches(row, code, fields)]

    def assert_emitted(
        self, code: str, times: int | None = None, **fields: Any
    ) -> dict[str, Any]:
        """
        Assert that a row with *code* and *fields* was emitted; return the last one.

        *times* asks for exactly so many.

        Raises:
            AssertionError: it was not; the message shows the nearest rows.
        """
        found = self.rows(code, **fields)
        if (found and times is None) or times == len(found):
            return found[-1] if found else {}
        wanted = "at least once" if times is None else f"{times} times"
        raise AssertionError(
            f"{code} {_fields(fields)} was emitted {len(found)} times, not {wanted}\n"
            f"{self._nearest(code, fields)}"
        )

    def assert_not_emitted(self, code: str, **fields: Any) -> None:
        """
        Assert that no row with *code* and *fields* was emitted.

        Raises:
            AssertionError: one was.
        """
        found = self.rows(code, **fields)
        if found:
            raise AssertionError(
                f"{code} {_fields(fields)} was emitted {len(found)} times\n"
                + "\n".join(_line(row) for row in found[:5])
            )

    def assert_correlated(self, request_id: str | None = None) -> str:
        """
        Assert that all rows share one request id (*request_id*, if given); return it.

        Raises:
            AssertionError: there are none, or they have several.
        """
        rows = [*self.audit, *self.sys, *self.api]
        ids = sorted({row["request_id"] for row in rows})
        if len(ids) == 1 and request_id in (None, ids[0]):
            return str(ids[0])
        wanted = f"request_id {request_id}" if request_id else "one request_id"
        raise AssertionError(
            f"rows do not share {wanted}; they have {ids or 'no rows'}"
        )

    def report(self) -> str:
        """
        Return the audit rows as text, a line each.
        """
        return "\n".join(_line(row) for row in self.audit)

    def _nearest(self, code: str, fields: Mapping[str, Any]) -> str:
        ranked = sorted(self.audit, key=lambda row: _distance(row, code, fields))[:5]
        if not ranked:
            return "nothing was emitted at all"
        lines = [f"  {_line(row)}{_differences(row, code, fields)}" for row in ranked]
        return "nearest rows:\n" + "\n".join(lines)


def _matches(
    row: Mapping[str, Any], code: str | None, fields: Mapping[str, Any]
) -> bool:
    if code is not None and row["code"] != code:
        return False
    return not any(_differs(row, name, value) for name, value in fields.items())


def _differs(row: Mapping[str, Any], name: str, value: Any) -> bool:
    key = SHORT_FORMS.get(name, name)
    if key not in row:
        raise TypeError(
            f"{name} is no key of an audit row; use one of {', '.join(row)}"
        )
    if key == "detail" and isinstance(value, Mapping):
        return not _is_subset(value, row["detail"])
    return bool(row[key] != value)


def _is_subset(part: Mapping[str, Any], whole: Any) -> bool:
    if not isinstance(whole, Mapping):
        return False
    return all(
        key in whole
        and (
            _is_subset(value, whole[key])
            if isinstance(value, Mapping)
            else whole[key] == value
        )
        for key, value in part.items()
    )


def _distance(row: Mapping[str, Any], code: str, fields: Mapping[str, Any]) -> int:
    wrong = sum(_differs(row, name, value) for name, value in fields.items())
    return wrong + (0 if row["code"] == code else 2)


def _differences(row: Mapping[str, Any], code: str, fields: Mapping[str, Any]) -> str:
    wrong = [
        f"{name}={row[SHORT_FORMS.get(name, name)]!r}, not {value!r}"
        for name, value in fields.items()
        if _differs(row, name, value)
    ]
    return f"   ({'; '.join(wrong)})" if row["code"] == code and wrong else ""


def _line(row: Mapping[str, Any]) -> str:
    return f"{row['code']}  {row['actor']}  target={row['target']}  {row['detail']}"


def _fields(fields: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value!r}" for name, value in fields.items())


@contextmanager
def capture(**settings: Any) -> Iterator[Trail]:
    """
    Run a with-block in which rows go to the yielded Trail, and nowhere else.

    The clock stands still and ids are counted. An `init()` inside opens no store.
    """
    clock = Clock()
    trail = Trail(clock)

    def stand_in(parsed: Settings) -> Engine:
        made = Engine(parsed, clock_ns=clock, mint=trail.mint, queue=trail)
        trail.attach(made)
        engine.install(made)
        return made

    given = {"service_id": "test", "node_id": "test", "stdout": "", **settings}
    codes.registry.ensure()
    before_stand_in = engine.stand_in(stand_in)
    before = engine.current()
    try:
        stand_in(
            Settings.from_env({}, given, hostname=socket.gethostname(), cwd=Path.cwd())
        )
        yield trail
    finally:
        engine.stand_in(before_stand_in)
        engine.install(before)
