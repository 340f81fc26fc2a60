# SPDX-License-Identifier: Apache-2.0
"""
One victim under one fault: it emits before, meanwhile and after, and is judged.

What is measured in it are its emits (each beside a `json.dumps` of the same row), and
when its health changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import attrs

from tests.checker import rows_of
from tests.faults.grounds import Grounds
from tests.faults.oracle import CANARY, Outcome, judge, percentile
from tests.faults.victim import Plan, Report, Victim
from tests.outside import wait_until

__all__ = ["Fault", "bounded", "endure", "is_ill", "is_well"]

ILL: Final = ("degraded", "spool_only", "failing")
WELL_S: Final = 10.0
"""How long after a fault a victim may take until it is well again."""

MOST_US: Final = 50_000.0
P99_US: Final = 100.0

Fault = Callable[[Victim], Iterable[str] | None]
"""What is done to a victim; says what was wrong."""


def endure(
    name: str,
    grounds: Grounds,
    judged_by: str,
    fault: Fault,
    *,
    trials: int = 1,
    is_bounded: bool = False,
    is_stored: Callable[[], object] = lambda: None,
    **plan: Any,
) -> Outcome:
    """
    Have a victim emit while *fault* happens to it, *trials* times; judge it by what
    the store at *judged_by* holds.

    *plan* is the victim's; its *dsn* may be another way to that store. *is_stored*
    is called when it has ended, before it is judged. *is_bounded*: no emit may have
    waited, see `bounded`.
    """
    given = {"threads": 2, "pause_s": 0.004, "dsn": judged_by, **plan}
    start = time.monotonic()
    with Victim(Plan(spool=str(grounds.spool), **given), grounds.folder) as victim:
        victim.reaches(50)
        wait_until(lambda: rows_of(judged_by), 30)
        wrong = []
        for _ in range(trials):
            wrong += list(fault(victim) or ())
        wrong += is_well(victim, time.monotonic())
        victim.reaches(20)
        report = victim.stop()
    is_stored()
    acks = victim.acks()
    wrong += _contradictions(report, len(acks))
    if CANARY in victim.texts():
        wrong.append("a secret stands in what the victim said")
    found = judge(name, judged_by, acks, trials=trials, wrong=wrong)
    if found.dropped != report.stats["dropped"]:
        said = f"{report.stats['dropped']} dropped says it, {found.dropped} its rows"
        found = attrs.evolve(found, faults=(*found.faults, said))
    if is_bounded:
        found = bounded(found, victim)
    return found.lasting(time.monotonic() - start)


def _contradictions(report: Report, acked: int) -> Iterator[str]:
    if not report.is_flushed:
        yield f"it could not deliver at the end: {report.health['reasons']}"
    if report.exit_s > 2.5:
        yield f"close() took {report.exit_s:.1f} s"
    if report.stats["emitted"] < acked:
        yield f"{acked} emits returned, it counts {report.stats['emitted']}"


def bounded(found: Outcome, victim: Victim) -> Outcome:
    """
    Hold the victim's emits against promise 3, and a `json.dumps` beside each.
    """
    emits = [ack.ns for ack in victim.acks()]
    beside = percentile(victim.references(), 0.99) or 0.0
    p99, most = percentile(emits, 0.99) or 0.0, max(emits) / 1000
    worst = max(victim.references()) / 1000
    wrong = list(found.faults)
    if p99 > max(P99_US, 3 * beside):
        wrong.append(f"p99 of emit {p99} us, of json.dumps {beside} us")
    # Two cores that others use, too: a thread that is not run waits anywhere.
    if most > max(MOST_US, 3 * worst):
        wrong.append(f"an emit took {most:.0f} us, a json.dumps at most {worst:.0f} us")
    return attrs.evolve(found, faults=tuple(wrong), p99_us=p99, max_us=round(most, 1))


def is_ill(victim: Victim, since: float, within_s: float, cure: str) -> list[str]:
    """
    Wait until the victim is not well; say so if that is late, or *cure* is not told.
    """
    try:
        at = victim.is_in(*ILL, timeout=within_s + 10)
    except TimeoutError:
        return [f"still ok {within_s + 10:g} s after the fault ({cure})"]
    late = at - since - within_s
    wrong = [f"ill {within_s + late:.1f} s after the fault ({cure})"] * (late > 0)
    try:
        wait_until(lambda: cure in victim.states()[-1][2], 10)
    except TimeoutError:
        wrong.append(f"{cure!r} is not in: {victim.states()[-1][2]}")
    return wrong


def is_well(victim: Victim, since: float) -> list[str]:
    """
    Wait until the victim is well; say so if that is late.
    """
    try:
        at = victim.is_in("ok", timeout=WELL_S + 20)
    except TimeoutError:
        return [f"not ok again: {victim.states()[-1]}"]
    late = at - since > WELL_S
    return [f"ok again {at - since:.1f} s after the fault"] * late
