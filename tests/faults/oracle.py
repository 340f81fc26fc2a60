# SPDX-License-Identifier: Apache-2.0
"""
The oracle: of what was acknowledged, what is stored, twice stored, or made up.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

import attrs

from tests.checker import faults, rows_of

__all__ = ["Outcome", "judge"]


@attrs.frozen(kw_only=True)
class Outcome:
    """
    What an experiment found; the fields are the columns of the table of `make faults`.
    """

    name: str
    trials: int
    acked: int
    stored: int
    lost: int
    dup: int
    invented: int
    hangs: int = 0
    faults: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """
        Tell whether the promise was kept.
        """
        wrong = (self.lost, self.dup, self.invented, self.hangs, len(self.faults))
        return not any(wrong)

    def line(self) -> str:
        """
        Return the outcome as one JSON line.
        """
        return json.dumps({**attrs.asdict(self), "holds": self.holds})


def judge(name: str, dsn: str, acks: Iterable[str], *, trials: int) -> Outcome:
    """
    Compare acknowledgements with the store at *dsn*.

    Each is `<id> <victim>/<thread>/<n>`, the target that it was emitted with: a
    thread may have one row stored beyond its last acknowledgement, no more.
    """
    acked = dict(ack.split(" ") for ack in acks)
    reached: Counter[str] = Counter()
    for target in acked.values():
        thread, _, number = target.rpartition("/")
        reached[thread] = max(reached[thread], int(number))
    rows = rows_of(dsn)
    stored = [row["id"] for row in rows if row["domain"] != "fasten"]
    invented = [
        row["target"]
        for row in rows
        if row["domain"] != "fasten" and not _is_plausible(row["target"], reached)
    ]
    return Outcome(
        name=name,
        trials=trials,
        acked=len(acked),
        stored=len(stored),
        lost=len(set(acked) - set(stored)),
        dup=len(stored) - len(set(stored)),
        invented=len(invented),
        faults=tuple(faults(rows)),
    )


def _is_plausible(target: str, reached: Counter[str]) -> bool:
    thread, _, number = target.rpartition("/")
    return int(number) <= reached[thread] + 1
