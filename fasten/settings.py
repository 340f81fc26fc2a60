# SPDX-License-Identifier: Apache-2.0
"""
Settings, read once from a mapping: durations, sizes, switches, DSNs, secrets.

Nothing here looks at the process's own environment, opens a store or waits.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["parse_duration"]

# --- small grammars ---------------------------------------------------------------

_SECONDS: Final = {
    "s": 1,
    "m": 60,
    "h": 3_600,
    "d": 86_400,
    "w": 604_800,
    "y": 31_536_000,
}
_LONGEST_S: Final = 1_000 * _SECONDS["y"]
_SHORT_FORM: Final = re.compile(r"(?:[0-9]+[smhdwy])+")
_PART: Final = re.compile(r"([0-9.]+)([a-z])")
_ISO_FORM: Final = re.compile(
    r"P(?=[0-9T])(?:([0-9]+)Y)?(?:([0-9]+)W)?(?:([0-9]+)D)?"
    r"(?:T(?=[0-9])(?:([0-9]+)H)?(?:([0-9]+)M)?(?:([0-9]+(?:\.[0-9]{1,6})?)S)?)?"
)


def parse_duration(text: str) -> int | float:
    """
    Read `90s`, `6h`, `1w2d`, `7y` (a year is 365 days) or ISO 8601 `PT1H30M`.

    Returns:
        Seconds; whole ones as an int.

    Raises:
        ValueError: *text* is no duration, has no unit, or is over 1000 years.
    """
    total = _duration(text) if len(text) <= 64 else None
    if total is None:
        raise ValueError(
            f"{_shown(text)} is not a duration; write a number and a unit of "
            "s m h d w y, as in 90s, 6h, 1w2d, or ISO 8601 without months (PT1H30M)"
        )
    if total > _LONGEST_S:
        raise ValueError(f"{_shown(text)} is more than 1000 years")
    return total


def _duration(text: str) -> int | float | None:
    if _SHORT_FORM.fullmatch(text):
        return sum(int(n) * _SECONDS[unit] for n, unit in _PART.findall(text))
    iso = _ISO_FORM.fullmatch(text)
    if iso is None:
        return None
    *whole, seconds = (part or "0" for part in iso.groups())
    total = sum(int(n) * _SECONDS[u] for n, u in zip(whole, "ywdhm", strict=True))
    return total + (float(seconds) if "." in seconds else int(seconds))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
