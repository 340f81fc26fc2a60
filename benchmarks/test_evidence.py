# SPDX-License-Identifier: Apache-2.0
"""
Verification of a million rows beside hashing alone, and a sweep of them beside writers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest

from benchmarks.reference import settle
from fasten.chain import COMMITTED_FIELDS, HEADER_KEYS, Salt
from fasten.repository.pruning import Order, Sweeper
from fasten.repository.snapshot import snapshot
from fasten.rows import AUDIT_COLUMNS, canonical_json
from fasten.upkeep import pause_s
from tests.outside import ROOT
from tests.stores import Kept

MILLION: Final = 1_000_000
TENTH: Final = MILLION // 10
BATCH: Final = 1_000

_VERIFY: Final = """
import json, resource, sys, time
from pathlib import Path
from fasten.proof import verify_store
from fasten.settings import parse_dsn
dsn = parse_dsn(sys.argv[1], cwd=Path.cwd())
before = time.perf_counter()
report = verify_store(dsn)
seconds = time.perf_counter() - before
kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([report.ok, report.rows, seconds, kib]))
"""

_WRITE: Final = """
import json, select, sys, time
import sqlalchemy
from tests.stores import Kept
kept = Kept(sys.argv[1], 9)
rows = [kept.maker.pending("long") for _ in range(10)]
kept.append("n2", rows[:1])
print("ready", flush=True)
waits = []
while not select.select([sys.stdin], [], [], 0.005)[0]:
    rows = [kept.maker.pending("long") for _ in range(10)]
    before = time.perf_counter()
    while True:
        try:
            kept.append("n2", rows)
            break
        except sqlalchemy.exc.OperationalError:
            time.sleep(0.05)  # busy: the drainer tries again, too
    waits.append(time.perf_counter() - before)
print(json.dumps(waits))
"""


@pytest.fixture(params=["sqlite", "postgres"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kept]:
    """
    Give a store that is set up as in production, empty.
    """
    if request.param == "sqlite":
        made = Kept(f"sqlite:///{tmp_path}/audit.db")
    else:
        made = Kept(request.getfixturevalue("durable_postgres"))
    yield made
    made.close()


def fill(kept: Kept, number: int) -> None:
    """
    Store rows of a year ago, in three chains.
    """
    classes = ("short", "short", "short", "medium", "long")
    for start in range(0, number, BATCH):
        pending = kept.maker.pending
        kept.append(
            "n1", [pending(classes[n % 5]) for n in range(start, start + BATCH)]
        )


def verified(kept: Kept) -> tuple[int, float, int]:
    """
    Verify in a process of its own; return rows, seconds, and its memory in KiB.
    """
    done = subprocess.run(
        [sys.executable, "-c", _VERIFY, kept.given],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    is_ok, rows, seconds, kib = json.loads(done.stdout)
    assert is_ok
    return rows, seconds, kib


def hashing_s(kept: Kept, number: int) -> float:
    """
    Return the seconds that SHA-256 alone takes over all that verification hashes.
    """
    with snapshot(kept.dsn) as moment:
        rows = (row for row, _ in zip(moment.rows(), range(20_000), strict=False))
        parts = [part for row in rows for part in hashed(row)]
    settle()
    before = time.perf_counter()
    for part in parts:
        sha256(part).digest()
    return (time.perf_counter() - before) * number / 20_000


def hashed(columns: Sequence[Any]) -> Iterator[bytes]:
    """
    Yield what is hashed of a row: fields, commitment, header, two nodes of the tree.
    """
    row = dict(zip(AUDIT_COLUMNS, columns, strict=True))
    present = [field for field in COMMITTED_FIELDS if row[field] is not None]
    salt = Salt.read(row["salt"], present)
    for field in present:
        text = row[field] if field == "detail" else canonical_json(row[field])
        yield f"{row['salt']}:{field}".encode()
        yield salt.keys[field] + text.encode()
    yield canonical_json(dict.fromkeys(present, "0" * 64)).encode()
    yield canonical_json({key: row[key] for key in HEADER_KEYS}).encode()
    yield bytes(33)
    yield bytes(65)


@contextmanager
def writing(kept: Kept) -> Iterator[list[float]]:
    """
    Let another process store 10 rows all the time; yield how long each append took.
    """
    waits: list[float] = []
    with subprocess.Popen(
        [sys.executable, "-c", _WRITE, kept.given],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield waits
        told, _ = process.communicate("", 60)
        waits += json.loads(told)


@pytest.mark.slow
def test_a_million_rows(
    benchmark: Any, figure: Callable[..., None], kept: Kept
) -> None:
    """
    Rows v1 to v3: verify against hashing, memory against a tenth of the rows; a sweep.
    """
    fill(kept, TENTH)
    _, _, small = verified(kept)
    fill(kept, MILLION - TENTH)
    rows, seconds, large = verified(kept)
    figure("v1", seconds / hashing_s(kept, rows))
    figure("v2", large / small)
    steps, waits = swept(kept)
    figure("v3", max(waits) / max(steps))
    print(
        f"\n{kept.dsn.backend}: verify {rows / seconds:,.0f} rows/s, {large:,} KiB; "
        f"sweep {600_000 / sum(steps):,.0f} rows/s, longest step {max(steps):.2f} s, "
        f"longest append beside it {max(waits):.2f} s of {len(waits)}"
    )
    benchmark.pedantic(lambda: None, rounds=1)


def swept(kept: Kept) -> tuple[list[float], list[float]]:
    """
    Sweep as `fasten sweep` does; return the seconds of its steps, and of appends.
    """
    order = Order(
        wanted=kept.policy,
        now_us=kept.maker.us + 31 * 86_400_000_000,
        interval_s=60.0,
        is_time_given=True,
    )
    steps = []
    with writing(kept) as waits:
        before = time.perf_counter()
        for _ in Sweeper(kept.repository, kept.writer("n3"), order).run():
            steps.append(time.perf_counter() - before)
            time.sleep(pause_s(kept.dsn))
            before = time.perf_counter()
    left = kept.sql("SELECT count(*) FROM audit_log WHERE retention_class = 'short'")
    assert left == [(0,)]
    return steps, waits
