# SPDX-License-Identifier: Apache-2.0
"""
Death: victims that end in every way there is, and what their heir stores.

One *range* process loads fasten once and forks a victim per trial, so that hundreds
of deaths take minutes. Run as a script it is that range.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

from tests.faults import failpoints
from tests.faults.grounds import Grounds, both
from tests.faults.heir import inherit
from tests.faults.oracle import Outcome, judge, read_acks
from tests.faults.victim import emit_on, settings_of
from tests.outside import ROOT, wait_until

__all__ = ["ENDS", "EXPERIMENTS", "KINDS", "die", "kill_at_random", "kill_at_steps"]

THREADS: Final = 8
KINDS: Final = ("plain", "signals", "del", "logging")
"""Where rows come from: threads, and a signal handler, `__del__`, a logging handler."""

PAUSE_S: Final = 0.004

PATIENCE_S: Final = 20.0
"""How long a victim may take to end by itself."""

STEP_S: Final = 1.0
"""How long a victim is waited for that is to die at a step."""


def kill_at_random(
    grounds: Grounds, *, store: str, trials: int = 1000, kinds: Sequence[str] = KINDS
) -> Outcome:
    """
    Kill *trials* victims with 8 emitting threads each; let an heir deliver the rest.

    *kinds* of KINDS take turns.
    """
    causes = [f"random/{kinds[trial % len(kinds)]}" for trial in range(trials)]
    return _shoot("kill -9 at random", grounds, store, causes)


def kill_at_steps(grounds: Grounds, *, store: str, trials: int = 10) -> Outcome:
    """
    Kill *trials* victims at each step of `failpoints`.
    """
    causes = [f"step/{step}" for step in failpoints.STEPS] * trials
    return _shoot("kill -9 at each step", grounds, store, causes)


def die(grounds: Grounds, *, store: str, trials: int = 10) -> Outcome:
    """
    Let *trials* victims end in each way of ENDS.
    """
    causes = [f"end/{end}" for end in ENDS] * trials
    return _shoot("exit, abort, signals, exceptions", grounds, store, causes)


def _shoot(name: str, grounds: Grounds, store: str, causes: list[str]) -> Outcome:
    dsn, directory = grounds.dsn(store), grounds.spool
    directory.mkdir(parents=True, exist_ok=True)
    acks = grounds.folder / "acks"
    acks.touch()
    start = time.monotonic()
    given = (dsn, str(directory), str(acks), str(grounds.seed))
    done = subprocess.run(
        [sys.executable, "-m", __name__, *given],
        input="\n".join(causes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120 + PATIENCE_S * len(causes),
    )
    if done.returncode:
        raise RuntimeError(f"the range failed:\n{done.stderr[-4000:]}")
    inherit(dsn, directory)
    with acks.open(encoding="ascii") as file:
        found = judge(
            f"{name} ({store})",
            dsn,
            read_acks(file),
            trials=len(causes),
            hangs=done.stdout.count("hangs\n"),
            wrong=done.stdout.splitlines(),
        )
    return found.lasting(time.monotonic() - start)


EXPERIMENTS: Final = {
    **both("kill", kill_at_random),
    **both("steps", kill_at_steps),
    **both("ends", die),
}
"""The experiments of this module."""


# --- in the range ------------------------------------------------------------------


def _range(dsn: str, directory: str, acks: str, seed: str) -> None:
    import sqlalchemy  # noqa: F401  (loaded before the forks, not in each)

    import fasten.repository  # noqa: F401

    dice = random.Random(seed)
    os.environ.pop("FASTEN_SERVICE_ID", None)
    for trial, cause in enumerate(sys.stdin.read().splitlines()):
        fd = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        sys.stdout.flush()
        chance = random.Random(dice.random())
        pid = os.fork()
        if pid == 0:
            _live(settings_of(dsn, directory), f"{trial}", cause, fd, chance)
            return  # an ordinary exit, atexit handlers and all
        if not _await_end(pid, cause, fd, chance):
            sys.stdout.write(f"{cause} hangs\n")
        os.close(fd)


def _await_end(pid: int, cause: str, acks: int, dice: random.Random) -> bool:
    before = os.fstat(acks).st_size
    patience = STEP_S if cause.startswith("step/") else PATIENCE_S
    if cause.startswith("random/"):
        # From its first row on: while the store is being opened, and in full swing.
        with suppress(TimeoutError):
            wait_until(lambda: os.fstat(acks).st_size > before, PATIENCE_S)
        patience = dice.random() * dice.choice((0.02, 0.1, 0.5))
    try:
        wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0], patience)
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        # A step that a run does not come to is no hang: it was killed all the same.
        return not cause.startswith("end/")
    return True


def _live(
    settings: dict[str, Any], name: str, cause: str, acks: int, dice: random.Random
) -> None:
    import fasten

    what, _, which = cause.partition("/")
    if what == "step":
        failpoints.retain(0.0)
        failpoints.arm(which, dice.choice((1, 2, 3, 10)), "kill")
    fasten.init(**settings)
    emit = emit_on(name, acks)

    def emitting(thread: str) -> None:
        for number in range(10**9):
            emit(thread, number)
            time.sleep(PAUSE_S)

    for thread in range(THREADS):
        threading.Thread(target=emitting, args=(str(thread),), daemon=True).start()
    _SOURCES.get(which, lambda _: None)(emit)
    if what == "end":
        time.sleep(dice.random() * 0.4)
        ENDS[which](emit)
    else:
        emitting("main")


# --- where rows come from -----------------------------------------------------------

Emit = Callable[[str, int], int]


class _Interrupting:
    """
    Emits where a call may interrupt another, of its own thread or of any other.

    Each depth of each thread counts as a thread of its own: of so many rows a death
    may find the id not written down yet.
    """

    def __init__(self, name: str, emit: Emit) -> None:
        self._name, self._emit = name, emit
        self._depths: Counter[int] = Counter()
        self._numbers: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)

    def __call__(self, *_: object) -> None:
        ident = threading.get_ident()
        thread = f"{self._name}-{ident}-{self._depths[ident]}"
        self._depths[ident] += 1
        try:
            self._emit(thread, next(self._numbers[thread]))
        finally:
            self._depths[ident] -= 1


def _from_signals(emit: Emit) -> None:
    signal.signal(signal.SIGALRM, _Interrupting("signal", emit))
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)


def _from_del(emit: Emit) -> None:
    last_words = _Interrupting("del", emit)

    class Dying:
        def __del__(self) -> None:
            last_words()

    def dying() -> None:
        while True:
            cycle = Dying()
            cycle.itself = cycle  # type: ignore[attr-defined]
            time.sleep(0.0005)

    threading.Thread(target=dying, daemon=True).start()


def _from_logging(emit: Emit) -> None:
    import logging

    note = _Interrupting("logging", emit)

    class Emitting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note()

    logging.getLogger().addHandler(Emitting())
    logging.getLogger().setLevel(logging.DEBUG)


_SOURCES: Final[dict[str, Callable[[Emit], None]]] = {
    "signals": _from_signals,
    "del": _from_del,
    "logging": _from_logging,
}


# --- ways to end ---------------------------------------------------------------------


def _raise(_: Emit) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115  (to the end)
    raise RuntimeError("nobody catches this")


def _interrupt(_: Emit) -> None:
    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def _exit_emitting(emit: Emit) -> None:
    import atexit

    for number in range(5):
        atexit.register(emit, "atexit", 4 - number)


def _exit_collecting(emit: Emit) -> None:
    numbers: Iterator[int] = itertools.count()

    class Late:
        def __del__(self) -> None:
            with suppress(Exception):  # so late that there is no fasten any more
                emit("late", next(numbers))

    sys.modules["late"] = Late()  # type: ignore[assignment]
    gc.freeze()


ENDS: Final[dict[str, Callable[[Emit], None]]] = {
    "os._exit": lambda _: os._exit(3),
    "abort": lambda _: os.abort(),
    "segfault": lambda _: ctypes.string_at(0),  # type: ignore[dict-item]
    "SIGTERM": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "SIGINT": _interrupt,
    "exception": _raise,
    "exit": lambda _: None,
    "exit, atexit emits": _exit_emitting,
    "exit, __del__ emits": _exit_collecting,
}
"""Ways in which a process ends, and what brings them about."""


if __name__ == "__main__":
    _range(*sys.argv[1:])
