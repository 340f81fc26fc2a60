# SPDX-License-Identifier: Apache-2.0
"""
What happens to the files of a spool, and to a SQLite store, while rows come.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import attrs

from fasten.spool.frames import ROW, parse
from tests.checker import rows_of
from tests.faults.grounds import Grounds, both
from tests.faults.heir import inherit
from tests.faults.oracle import Ack, Outcome, judge, told
from tests.faults.trial import endure, is_ill, is_well
from tests.faults.victim import Plan, Victim, victims
from tests.outside import wait_until

__all__ = ["EXPERIMENTS", "can_mount"]


def _nowhere(grounds: Grounds) -> tuple[str, Path]:
    """
    Return a DSN whose folder is not there yet, and that folder.
    """
    folder = grounds.folder / "later"
    return f"sqlite:///{folder / 'audit.db'}", folder


# --- the spool's files ----------------------------------------------------------------


def odd_files(grounds: Grounds, *, trials: int = 5) -> Outcome:
    """
    Put into the spool what does not belong there: rows come and go all the same.
    """
    grounds.spool.mkdir(mode=0o700)

    def litter(victim: Victim) -> None:
        for number in range(8):
            _litter(grounds.spool, f"{os.urandom(16).hex()}.1.seg", number)
        victim.reaches(50)

    return endure(
        "spool: odd files", grounds, grounds.dsn("sqlite"), litter, trials=trials
    )


def _litter(spool: Path, name: str, kind: int) -> None:
    path = spool / name
    match kind:
        case 0:
            path.touch()
        case 1:
            path.symlink_to("/etc/passwd")
        case 2:
            os.mkfifo(path)
        case 3:
            path.write_bytes(os.urandom(5000))
        case 4:
            path.write_bytes(b"x")
            path.chmod(0)
        case 5:
            path.mkdir()
        case 6:
            path.with_suffix(".lock").symlink_to(path)
        case _:
            (spool / "README").write_text("not a segment")


def removed(grounds: Grounds, *, trials: int = 20) -> Outcome:
    """
    Remove or rename the files of a living writer: it notices, and writes again what
    was in them, so that a kill after that costs no row.
    """
    dsn, folder = _nowhere(grounds)

    def tidy(victim: Victim) -> None:
        before = _journalled(grounds.spool)
        for number, path in enumerate(sorted(grounds.spool.iterdir())):
            if number % 3:
                path.unlink()
            else:
                path.rename(f"{path}.bak")
        wait_until(lambda: before <= _journalled(grounds.spool), 30)
        victim.reaches(20)

    with _plan(grounds, dsn) as victim:
        victim.reaches(100)
        for _ in range(trials):
            tidy(victim)
        victim.kill()
    folder.mkdir()
    inherit(dsn, grounds.spool)
    found = judge("spool: files removed", dsn, victim.acks(), trials=trials)
    gone = (f"{found.dropped} rows were not written again",) * (found.dropped > 0)
    return attrs.evolve(found, faults=(*found.faults, *gone))


def _journalled(spool: Path) -> set[int]:
    """
    Return the numbers of the rows that are in the files of the one writer there is.
    """
    data = [path.read_bytes() for path in spool.glob("*.seg")]
    return {index for part in data for index, kind, _ in parse(part)[0] if kind == ROW}


@contextmanager
def _plan(grounds: Grounds, dsn: str, **more: Any) -> Iterator[Victim]:
    given = {"threads": 2, "pause_s": 0.004, "spool": str(grounds.spool), **more}
    with Victim(Plan(dsn=dsn, **given), grounds.folder) as victim:
        yield victim


def damaged(grounds: Grounds, *, trials: int = 100) -> Outcome:
    """
    Flip bits in the segments of the dead: each row that is lost is owned up to.

    Not in their last few rows: how many those were, nothing tells; see `cut`.
    """
    dsn, folder = _nowhere(grounds)
    acks = _harm(grounds, dsn, trials, _flip)
    folder.mkdir()
    inherit(dsn, grounds.spool)
    found = judge("spool: bits flipped", dsn, acks, trials=trials)
    # One more may be owned up to than is missing: its emit had not returned.
    faults = tuple(f for f in found.faults if "owned up to" not in f)
    return attrs.evolve(found, faults=faults)


def cut(grounds: Grounds, *, trials: int = 20) -> Outcome:
    """
    Cut the segments of the dead short: that something is lost is on record for each.

    Only those that were allocated beforehand: a file that was written to its end may
    end anywhere, and one that was cut is one that never was longer.
    """
    dsn, folder = _nowhere(grounds)
    acks = _harm(grounds, dsn, trials, _cut)
    harmed = {path.name.partition(".")[0] for path in grounds.spool.glob("*.seg")}
    folder.mkdir()
    inherit(dsn, grounds.spool)
    found = judge("spool: files cut", dsn, acks, trials=trials)
    named = {
        json.loads(row["detail"])["writer"]
        for row in rows_of(dsn)
        if row["code"] == "AUDIT_ROWS_DROPPED"
    }
    faults = (*found.faults, *(f"{w}: nothing on record" for w in harmed - named))
    return attrs.evolve(found, lost=0, faults=faults)


def _harm(
    grounds: Grounds, dsn: str, trials: int, harm: Callable[[Path, random.Random], None]
) -> list[Ack]:
    """
    Kill victims, and do *harm* to the longest file of each.
    """
    dice = random.Random(grounds.seed)
    acks: list[Ack] = []
    for trial in range(trials):
        before = set(grounds.spool.glob("*.seg"))
        with _plan(grounds, dsn, name=f"v{trial}", pause_s=0.001) as victim:
            victim.reaches(300)
            while not (whole := _allocated(set(grounds.spool.glob("*.seg")) - before)):
                victim.reaches(100)
            victim.kill()
            acks += victim.acks()
        harm(max(whole, key=_written), dice)
    return acks


def _allocated(segments: Iterable[Path]) -> list[Path]:
    """
    Return the segments that are longer than what was written to them so far.
    """
    return [
        path
        for path in segments
        if _written(path) > 10_000 and path.stat().st_size >= 4096 + _written(path)
    ]


def _written(path: Path) -> int:
    return len(path.read_bytes().rstrip(b"\0"))


def _flip(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(dice.randrange(1, 20)):
        data[dice.randrange(300, _written(path) - 4096)] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def _cut(path: Path, dice: random.Random) -> None:
    end = _written(path)
    os.truncate(path, dice.randrange(end // 2, end - 100))


def limited(grounds: Grounds, *, trials: int = 5) -> Outcome:
    """
    Cut writes in the middle by `ulimit -f`, store included: rows wait, or are counted.
    """
    setup = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
"""
    dsn = grounds.dsn("postgres")

    def write(victim: Victim) -> None:
        victim.reaches(800)  # what it notes is limited, too: some 6,000 rows in all

    return endure(
        "spool: ulimit -f", grounds, dsn, write, trials=trials, setup=setup, threads=4
    )


# --- full disks -----------------------------------------------------------------------


def can_mount(folder: Path) -> bool:
    """
    Tell whether a small tmpfs can be had here.
    """
    with suppress(OSError), _small(folder / "probe", "64k"):
        return True
    return False


@contextmanager
def _small(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "fasten", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        done = None
    if done is None or done.returncode:
        raise PermissionError("a tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_spool(grounds: Grounds, *, trials: int = 3) -> Outcome:
    """
    Fill the file system of the spool, and free it: every drop is counted and told.
    """
    dsn, later = _nowhere(grounds)
    with _small(grounds.spool, "2m") as spool:

        def fill(victim: Victim) -> Iterator[str]:
            later.rename(away) if later.exists() else None
            ballast = spool / "ballast"
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(b"\1" * 65536):
                    pass
            yield from is_ill(victim, time.monotonic(), 60.0, "no room")
            ballast.unlink()
            away.rename(later) if away.exists() else later.mkdir()
            yield from is_well(victim, time.monotonic() + 10)

        away = grounds.folder / "away"
        later.mkdir()
        return endure(
            "spool: full",
            grounds,
            dsn,
            fill,
            trials=trials,
            settings={"queue_capacity": 500},
        )


def full_store(grounds: Grounds, *, trials: int = 3) -> Outcome:
    """
    Fill the file system of a SQLite store, and free it.
    """
    with _small(grounds.folder / "disk", "12m") as disk:
        dsn = f"sqlite:///{disk / 'audit.db'}"

        def fill(victim: Victim) -> Iterator[str]:
            ballast = disk / "ballast"
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(b"\1" * 65536):
                    pass
            yield from is_ill(victim, time.monotonic(), 30.0, "full")
            ballast.unlink()
            yield from is_well(victim, time.monotonic())

        return endure("SQLite: disk full", grounds, dsn, fill, trials=trials)


# --- one file, many processes --------------------------------------------------------


def crowd(grounds: Grounds, *, store: str, trials: int = 2000) -> Outcome:
    """
    Have 8 processes share a store; *trials* rows each.
    """
    dsn, spool = grounds.dsn(store), str(grounds.spool)
    start = time.monotonic()
    plans = [
        Plan(dsn=dsn, spool=spool, name=f"v{number}", most=trials, pause_s=0.001)
        for number in range(8)
    ]
    with victims(*plans, folder=grounds.folder) as running:
        for victim in running:
            wait_until(lambda v=victim: len(v.acks()) == trials, 600)  # type: ignore[misc]
        reports = [victim.stop(120) for victim in running]
        acks = [ack for victim in running for ack in victim.acks()]
    wrong = [str(r.health["reasons"]) for r in reports if not r.is_flushed]
    found = judge(f"8 processes ({store})", dsn, acks, trials=trials, wrong=wrong)
    return found.lasting(time.monotonic() - start)


def locked_file(grounds: Grounds, *, trials: int = 10) -> Outcome:
    """
    Lock a SQLite file as an operator does, again and again.
    """
    dsn = grounds.dsn("sqlite")
    path = dsn.removeprefix("sqlite:///")

    def lock(victim: Victim) -> None:
        with closing(sqlite3.connect(path, timeout=30)) as operator:
            operator.execute("BEGIN IMMEDIATE")
            victim.reaches(200)
            operator.rollback()

    return endure("SQLite: locked", grounds, dsn, lock, trials=trials, is_bounded=True)


def poison(grounds: Grounds, *, store: str, trials: int = 10) -> Outcome:
    """
    Have the store refuse one row of 100: that one is put aside, and is not lost.
    """
    dsn = grounds.dsn(store)

    def refuse(victim: Victim) -> None:
        for statement in _REFUSALS[store]:
            with suppress(sqlite3.OperationalError):
                _run(dsn, statement)
        victim.reaches(300)

    found = endure(f"poison rows ({store})", grounds, dsn, refuse, trials=trials)
    kept = sum(
        len(path.read_bytes().splitlines())
        for path in grounds.spool.glob("*.quarantine")
    )
    _, aside = told(rows_of(dsn))
    faults = found.faults
    if not 0 < aside <= kept:
        faults = (*faults, f"{aside} rows are told to be in quarantine, {kept} are")
    return attrs.evolve(found, faults=faults)


_TRIGGER: Final = (
    "CREATE TRIGGER IF NOT EXISTS no BEFORE INSERT ON audit_log WHEN "
    "NEW.domain <> 'fasten' AND NEW.target LIKE '%50' "
    "BEGIN SELECT RAISE(ABORT, 'no'); END"
)
_CHECK: Final = (
    "ALTER TABLE audit_log ADD CONSTRAINT no CHECK "
    "(domain = 'fasten' OR target NOT LIKE '%50') NOT VALID"
)
_REFUSALS: Final = {
    "sqlite": (_TRIGGER,),
    "postgres": ("ALTER TABLE audit_log DROP CONSTRAINT IF EXISTS no", _CHECK),
}


def _run(dsn: str, statement: str) -> None:
    import psycopg

    if dsn.startswith("sqlite"):
        with closing(sqlite3.connect(dsn.removeprefix("sqlite:///"), timeout=30)) as c:
            c.execute(statement)
            c.commit()
        return
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(statement)


EXPERIMENTS: Final[dict[str, Callable[..., Outcome]]] = {
    "spool-odd-files": odd_files,
    "spool-removed": removed,
    "spool-damaged": damaged,
    "spool-cut": cut,
    "spool-ulimit": limited,
    "spool-full": full_spool,
    "sqlite-full": full_store,
    "sqlite-locked": locked_file,
    **both("crowd", crowd),
    **both("poison", poison),
}
"""The experiments of this module."""
