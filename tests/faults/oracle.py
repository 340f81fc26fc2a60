# SPDX-License-Identifier: Apache-2.0
"""
The oracle: of what was acknowledged, what is stored, twice stored, lost, or made up.

It reads the store with plain SQL, and checks seals with `tests.checker`: nothing of
fasten's own but `evidence`, whose verdict is one of the columns.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import attrs
import psycopg

from fasten import chain, evidence
from fasten.rows import AUDIT_COLUMNS
from tests.checker import faults, rows_of

__all__ = [
    "CANARY",
    "Ack",
    "Outcome",
    "faults_of",
    "judge",
    "percentile",
    "read_acks",
    "select",
    "told",
    "told_by",
    "verify_code",
]


@attrs.frozen
class Ack:
    """
    One row whose `emit` returned: its id, its target, the nanoseconds that it took.

    The target is `<victim>/<thread>/<n>`.
    """

    id: str
    target: str
    ns: int = 0


@attrs.frozen(kw_only=True)
class Outcome:
    """
    What an experiment found; the fields are the columns of the table of `make faults`.

    *dropped* is what AUDIT_ROWS_DROPPED rows own up to, *quarantined* what stands in
    AUDIT_ROW_QUARANTINED rows: neither is lost. *faults* are sentences.
    """

    name: str
    trials: int
    emitted: int = 0
    acked: int = 0
    stored: int = 0
    lost: int = 0
    dup: int = 0
    invented: int = 0
    dropped: int = 0
    quarantined: int = 0
    hangs: int = 0
    p99_us: float | None = None
    max_us: float | None = None
    verify: int | None = None
    seconds: float | None = None
    faults: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """
        Tell whether the promise was kept.
        """
        wrong = (self.lost, self.dup, self.invented, self.hangs, len(self.faults))
        return not any(wrong) and self.verify in (None, 0)

    def lasting(self, seconds: float) -> Outcome:
        """
        Return the outcome with the time that the experiment took.
        """
        return attrs.evolve(self, seconds=round(seconds, 1))

    def line(self) -> str:
        """
        Return the outcome as one JSON line.
        """
        return json.dumps({**attrs.asdict(self), "holds": self.holds})


CANARY: Final = "c4n4ry-5ecret"
"""A password, a token, a value under a secret key: no row, journal or text has it."""


def is_told(row: dict[str, Any]) -> bool:
    """
    Tell whether a secret stands in a row.
    """
    return any(CANARY in value for value in row.values() if type(value) is str)


def told_by(folder: Path | str) -> list[str]:
    """
    Return the files of a spool in which a secret stands.
    """
    files = [path for path in Path(folder).glob("*") if path.is_file()]
    return [str(path) for path in files if CANARY.encode() in path.read_bytes()]


def read_acks(lines: Iterable[str]) -> list[Ack]:
    """
    Read acknowledgements, `<id> <target> <ns>` each; a torn last line is left out.
    """
    whole = (line.split(" ") for line in lines if line.endswith("\n"))
    return [Ack(id_, target, int(ns)) for id_, target, ns in whole]


def judge(
    name: str,
    dsn: str,
    acks: Sequence[Ack],
    *,
    trials: int = 1,
    hangs: int = 0,
    wrong: Iterable[str] = (),
) -> Outcome:
    """
    Compare acknowledgements with the store at *dsn*; *wrong* is what else was seen.

    A thread may have one row stored beyond its last acknowledgement, no more.
    """
    rows = rows_of(dsn)
    wrong = [*wrong, *(f"a secret stands in {r['id']}" for r in rows if is_told(r))]
    stored = [row["id"] for row in rows if row["domain"] != "fasten"]
    acked = {ack.id for ack in acks}
    reached = _reached(acks)
    strange = [row["target"] for row in rows if not _is_plausible(row, reached)]
    missing = len(acked - set(stored))
    dropped, quarantined = told(rows)
    found = [*faults_of(rows), *wrong, *(f"{each} is invented" for each in strange)]
    took = [ack.ns for ack in acks if ack.ns]
    if missing < dropped + quarantined:
        found.append(f"{dropped + quarantined} rows are owned up to, {missing} missing")
    return Outcome(
        name=name,
        trials=trials,
        emitted=len(acked | set(stored)),
        acked=len(acked),
        stored=len(stored),
        lost=max(0, missing - dropped - quarantined),
        dup=len(stored) - len(set(stored)),
        invented=len(strange),
        dropped=dropped,
        quarantined=quarantined,
        hangs=hangs,
        p99_us=percentile(took, 0.99),
        max_us=percentile(took, 1.0),
        verify=verify_code(rows, dsn),
        faults=tuple(found),
    )


def _reached(acks: Iterable[Ack]) -> Counter[str]:
    reached: Counter[str] = Counter()
    for ack in acks:
        thread, _, number = ack.target.rpartition("/")
        reached[thread] = max(reached[thread], int(number))
    return reached


def _is_plausible(row: dict[str, Any], reached: Counter[str]) -> bool:
    if row["domain"] == "fasten":
        return True
    thread, _, number = row["target"].rpartition("/")
    return number.isdecimal() and int(number) <= reached[thread] + 1


def told(rows: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """
    Return how many rows fasten says were dropped, and how many quarantined.
    """
    dropped = quarantined = 0
    for row in rows:
        if row["domain"] == "fasten" and row["code"] == "AUDIT_ROWS_DROPPED":
            dropped += json.loads(row["detail"])["count"]
        if row["domain"] == "fasten" and row["code"] == "AUDIT_ROW_QUARANTINED":
            quarantined += 1
    return dropped, quarantined


def percentile(ns: Sequence[int], part: float) -> float | None:
    """
    Return a percentile of nanoseconds, in microseconds; None of nothing.
    """
    if not ns:
        return None
    return round(sorted(ns)[min(len(ns) - 1, int(len(ns) * part))] / 1000, 1)


# --- seals ------------------------------------------------------------------------

_FOLLOWS: Final = re.compile(r"\('(.*)', '(.*)'\): (\d+) follows (\d+)")


def faults_of(rows: list[dict[str, Any]]) -> list[str]:
    """
    Return what `checker` finds; numbers lost in a recorded restore are no gap.
    """
    lost = [json.loads(r["detail"]) for r in rows if r["code"] == "CHAIN_RESTORED"]
    return [fault for fault in faults(rows) if not _is_recorded(fault, lost)]


def _is_recorded(fault: str, lost: list[dict[str, Any]]) -> bool:
    gap = _FOLLOWS.fullmatch(fault)
    if gap is None:
        return False
    service, node, after, before = gap.groups()
    numbers = set(range(int(before) + 1, int(after)))
    for said in lost:
        if (said["service"], said["node"]) == (service, node):
            numbers -= set(range(said["from_seq"], said["to_seq"] + 1))
    return int(after) > int(before) and not numbers


def verify_code(rows: list[dict[str, Any]], dsn: str, table: str = "audit_log") -> int:
    """
    Return the exit code with which `fasten verify` would judge the store.
    """
    heads = [
        chain.Head(
            **{field.name: row[field.name] for field in attrs.fields(chain.Head)}
        )
        for row in select(dsn, f"SELECT * FROM {table}_head")
    ]
    nodes = {
        (row["service_id"], row["source_node_id"]): row["seq"]
        for row in select(dsn, f"SELECT * FROM {table}_node")
    }
    verifier = evidence.ChainVerifier(heads, nodes=nodes)
    for row in rows:
        verifier.feed([row[name] for name in AUDIT_COLUMNS])
    return verifier.finish().exit_code


def select(dsn: str, sql: str) -> list[dict[str, Any]]:
    """
    Ask a store in plain SQL.
    """
    connection: Any = (
        sqlite3.connect(dsn.removeprefix("sqlite:///"))
        if dsn.startswith("sqlite")
        else psycopg.connect(dsn)
    )
    with closing(connection):
        cursor = connection.execute(sql)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]
