# SPDX-License-Identifier: Apache-2.0
"""
Power cuts, by a model of a disk that forgets what was not synced.

A service notes, at each fdatasync, what the file held, and at each fsync of a
directory, which names were in it. When it has been killed, the spool becomes what a
disk may show after a power cut: of each file what it held at its last sync, or some
pages of what came later; names that were not synced, and removals, may be undone.

As the kernel does, it takes pages for written once a sync has failed: they are lost
unless they are written to again, whatever a second sync says.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import attrs

from tests.checker import rows_of
from tests.faults.grounds import Grounds, both
from tests.faults.oracle import Outcome, judge
from tests.faults.stage import PATIENCE_S, Service, Stage, staged
from tests.outside import wait_until

__all__ = ["EXPERIMENTS", "cut_power", "power", "power_and_errors"]

PAGE: Final = 4096
THREADS: Final = 3
NAMES: Final = ".names"
BORN: Final = ".born"
FAILING: Final = 7
"""One sync of so many fails, where any does."""


# --- in the service ------------------------------------------------------------------


class _Disk:
    """
    What of a spool has reached the disk: images of its files, kept in *images*.
    """

    def __init__(self, spool: Path, images: Path, fail_every: int) -> None:
        self._spool, self._images, self._fail_every = spool, images, fail_every
        self._calls = count(1)
        self._lost: dict[str, dict[int, bytes]] = {}  # by file and page
        self._fdatasync, self._fsync = os.fdatasync, os.fsync
        self._guard = threading.Lock()  # of *_lost* and of the images, in their order

    def fdatasync(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if path.parent != self._spool:
            return self._fdatasync(fd)
        with self._guard:
            now = dict(_pages(os.pread(fd, os.fstat(fd).st_size, 0)))
            old = dict(_pages(_read(self._images / path.name)))
            if self._fail_every and next(self._calls) % self._fail_every == 0:
                changed = {at: page for at, page in now.items() if old.get(at) != page}
                self._lost.setdefault(path.name, {}).update(changed)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self._fdatasync(fd)
            lost = self._lost.get(path.name, {})
            for at in [at for at, page in lost.items() if now.get(at) == page]:
                now[at] = old.get(at, bytes(len(now[at])))
            _write(self._images / path.name, b"".join(now.values()))
        return None

    def fsync(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        with self._guard:
            names = _names(path)
            self._fsync(fd)
            if path == self._spool:
                _write(self._images / NAMES, "\n".join(names).encode())
            if path == self._spool.parent and self._spool.name in names:
                _write(self._images / BORN, b"")


def _pages(data: bytes) -> Iterator[tuple[int, bytes]]:
    return ((at, data[at : at + PAGE]) for at in range(0, len(data), PAGE))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _read(path: Path) -> bytes:
    with suppress(FileNotFoundError):
        return path.read_bytes()
    return b""


def _write(path: Path, data: bytes) -> None:
    draft = path.with_name(f"{path.name}.draft")
    draft.write_bytes(data)
    draft.replace(path)


def _remember(spool: Path, images: Path, fail_every: int) -> None:
    disk = _Disk(spool, images, fail_every)
    os.fdatasync, os.fsync = disk.fdatasync, disk.fsync  # type: ignore[assignment]


# --- the cut -------------------------------------------------------------------------


def cut_power(spool: Path, images: Path, dice: random.Random) -> None:
    """
    Make a spool what a disk may show after a power cut; nobody may be using it.
    """
    names = _read(images / NAMES).decode().split()
    if not (images / BORN).exists():
        shutil.rmtree(spool)
        return
    for name in {*names, *_names(spool)}:
        image, path = images / name, spool / name
        kept = _kept(image, path, name in names, dice)
        if kept is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(kept)
            path.chmod(0o600)
    for path in spool.iterdir():
        shutil.copy(path, images / path.name)
    _write(images / NAMES, "\n".join(_names(spool)).encode())


def _kept(image: Path, path: Path, is_named: bool, dice: random.Random) -> bytes | None:
    """
    Return what is left of a file, None if nothing is.
    """
    is_changed = not is_named or not path.exists()
    if is_changed and ((not path.exists() and not is_named) or dice.random() < 0.5):
        return None  # its name had not reached the disk, or its removal had
    old = _read(image)
    new = _read(path) if path.exists() else old
    if dice.random() < 0.5:
        return old if image.exists() else bytes(len(new))
    before = dict(_pages(old.ljust(len(new), b"\0")))
    after = dict(_pages(new))
    return b"".join(
        after.get(at, p) if dice.random() < 0.5 else p for at, p in before.items()
    )


# --- experiments ---------------------------------------------------------------------


def power(
    grounds: Grounds, *, store: str, trials: int = 200, fail_every: int = 0
) -> Outcome:
    """
    Cut the power *trials* times under a service with `durability=power`, every other
    time while the store is away: what was acknowledged is stored.
    """
    dice, start = random.Random(grounds.seed), time.monotonic()
    with staged(grounds, store) as stage:
        stage.clear()
        images = stage.folder / "images"
        images.mkdir()
        for trial in range(trials):
            _live_and_cut(stage, images, trial, fail_every, dice)
        stage.inherit()
        what = "power cuts, failing syncs" if fail_every else "power cuts"
        found = _judged(f"{what} ({store})", stage, trials)
    return found.lasting(time.monotonic() - start)


def power_and_errors(grounds: Grounds, *, store: str, trials: int = 200) -> Outcome:
    """
    The same, where every seventh fdatasync fails.
    """
    return power(grounds, store=store, trials=trials, fail_every=FAILING)


def _live_and_cut(
    stage: Stage, images: Path, trial: int, fail_every: int, dice: random.Random
) -> None:
    setup = partial(_remember, stage.spool, images, fail_every)
    goal = len(stage.acked()) + dice.randrange(1, 80)

    def live() -> None:
        service = Service(stage, f"v{trial}", setup, durability="power")
        service.do("flood", THREADS)
        wait_until(lambda: len(stage.acked()) >= goal, PATIENCE_S)
        service.kill()

    if trial % 2:
        live()
    else:
        with stage.away():
            live()
    cut_power(stage.spool, images, dice)


def _judged(name: str, stage: Stage, trials: int) -> Outcome:
    """
    Judge more strictly than elsewhere: what is owned up to is lost all the same.
    """
    acks = stage.acked()
    stored: set[Any] = {row["id"] for row in rows_of(stage.dsn)}
    found = judge(name, stage.dsn, acks, trials=trials)
    # Owned up to may be what was not acknowledged, too.
    faults = tuple(f for f in found.faults if "owned up to" not in f)
    lost = len({ack.id for ack in acks} - stored)
    return attrs.evolve(found, lost=lost, faults=faults)


EXPERIMENTS: Final = {
    **both("power-cut", power),
    **both("power-errors", power_and_errors),
}
"""The experiments of this module."""
