# SPDX-License-Identifier: Apache-2.0
"""
Failpoints: what happens to a process at a named step on a row's way.

Nothing of this is in fasten: a victim patches its own copy of the code at the step.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from itertools import count
from typing import Any, Final

__all__ = ["ACTS", "STEPS", "arm", "retain"]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


def _fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


ACTS: Final[dict[str, Callable[[], None]]] = {
    "kill": _die,
    "exit": lambda: os._exit(3),
    "abort": os.abort,
    "fail": _fail,
    "stop": _stop,
}
"""What may happen at a step."""


def _before(owner: Any, name: str, act: Callable[[], None]) -> None:
    known = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        act()
        return known(*args, **kwargs)

    setattr(owner, name, patched)


def _after(owner: Any, name: str, act: Callable[[], None]) -> None:
    known = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        answer = known(*args, **kwargs)
        act()
        return answer

    setattr(owner, name, patched)


def _spool(owner: str, name: str, place: Any) -> Callable[[Callable[[], None]], None]:
    def patch(act: Callable[[], None]) -> None:
        from fasten.spool import files, orphans, queue

        modules = {"queue": queue, "files": files, "orphans": orphans}
        module, _, attribute = owner.partition(".")
        target: Any = modules[module]
        place(getattr(target, attribute) if attribute else target, name, act)

    return patch


def _store(owner: str, name: str, place: Any) -> Callable[[Callable[[], None]], None]:
    def patch(act: Callable[[], None]) -> None:
        import sqlalchemy.engine

        from fasten import repository

        targets = {
            "Database": repository.Database,
            "AuditRepository": repository.AuditRepository,
            "Connection": sqlalchemy.engine.Connection,
        }
        place(targets[owner], name, act)

    return patch


STEPS: Final[dict[str, Callable[[Callable[[], None]], None]]] = {
    "before write": _spool("queue.Spool", "append", _before),
    "half written": _spool("queue", "pack_header", _before),
    "after write": _spool("queue", "pack_header", _after),
    "written aside": _spool("queue.Spool", "_write_aside", _after),
    "new segment": _spool("files.Journal", "map", _after),
    "before take": _spool("queue.Spool", "take", _before),
    "after begin": _store("Database", "_begin", _after),
    "after head lock": _store("AuditRepository", "_heads", _after),
    "after insert": _store("AuditRepository", "_seal", _after),
    "before commit": _store("Connection", "commit", _before),
    "after commit": _store("Connection", "commit", _after),
    "before ack": _spool("files.Journal", "note", _before),
    "after ack": _spool("files.Journal", "note", _after),
    "before unlink": _spool("files.Segment", "remove", _before),
    "after unlink": _spool("files.Segment", "remove", _after),
}
"""The steps, in the order in which a row passes them, and how to patch in each."""


def arm(step: str, hit: int, act: str) -> None:
    """
    Have *act* happen when *step* is passed for the *hit*-th time from now.

    *hit* 0: each time.
    """
    hits = count(1)

    def pull() -> None:
        if hit in (0, next(hits)):
            ACTS[act]()

    STEPS[step](pull)


def retain(seconds: float) -> None:
    """
    Let the spool keep what is delivered for *seconds* instead of 15 minutes.
    """
    from fasten.spool import orphans, queue

    queue.RETAIN_S = orphans.RETAIN_S = seconds  # type: ignore[misc]
