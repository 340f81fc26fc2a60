# SPDX-License-Identifier: Apache-2.0
"""
Clocks that go wrong while a victim emits: back, ahead, ahead and back, or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["NAMES", "named"]

_HOUR_NS: Final = 3600 * 10**9
_DECADE_NS: Final = 3652 * 24 * _HOUR_NS
_STEP_NS: Final = 300_000_000  # how long after the start a clock goes wrong

_real_ns = time.time_ns


def _back(since_ns: int) -> int:
    return -_HOUR_NS if since_ns > _STEP_NS else 0


def _ahead(since_ns: int) -> int:
    return _DECADE_NS if since_ns > _STEP_NS else 0


def _there_and_back(since_ns: int) -> int:
    return _DECADE_NS if _STEP_NS < since_ns < 2 * _STEP_NS else 0


def _frozen(since_ns: int) -> int:
    return min(0, _STEP_NS - since_ns)


def _jumpy(since_ns: int) -> int:
    return (since_ns // 50_000_000 % 7 - 3) * _HOUR_NS


_OFFSETS: Final[dict[str, Callable[[int], int]]] = {
    "back": _back,
    "ahead": _ahead,
    "there and back": _there_and_back,
    "frozen": _frozen,
    "jumpy": _jumpy,
}

NAMES: Final = tuple(_OFFSETS)
"""The wrong clocks that there are."""


@contextmanager
def named(name: str) -> Iterator[None]:
    """
    Have this process live by a wrong clock; by the right one where *name* is empty.

    Files keep the machine's time, as they do where a clock steps.
    """
    offset = _OFFSETS.get(name)
    if offset is None:
        yield
        return
    start = _real_ns()

    def time_ns() -> int:
        now = _real_ns()
        return now + offset(now - start)

    before = time.time, time.time_ns
    time.time_ns, time.time = time_ns, lambda: time_ns() / 1e9
    defaults = _defaults_of_the_engine()
    known = defaults["clock_ns"]
    defaults["clock_ns"] = time_ns
    try:
        yield
    finally:
        time.time, time.time_ns = before
        defaults["clock_ns"] = known


def _defaults_of_the_engine() -> dict[str, object]:
    from fasten.engine import Engine

    defaults = Engine.__init__.__kwdefaults__
    if defaults is None:
        raise AssertionError("Engine takes its clock by keyword")
    return defaults
