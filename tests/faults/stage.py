# SPDX-License-Identifier: Apache-2.0
"""
A stage for many short trials: services that begin at once, since they are forked off a
server that has loaded fasten, and a store that can be taken away and given back.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import attrs

from tests.faults import heir
from tests.faults.grounds import Grounds
from tests.faults.oracle import Ack, read_acks
from tests.faults.proxy import Proxy
from tests.faults.server import ask
from tests.faults.victim import CODES, settings_of
from tests.outside import wait_until

__all__ = ["PATIENCE_S", "Service", "Stage", "staged"]

PATIENCE_S: Final = 30.0
"""How long a service may take for an order."""


# --- a service, in a process of its own ----------------------------------------------


class _Serving:
    """
    What a service does when it is told to.
    """

    def __init__(self, name: str, acks: str) -> None:
        self._name = name
        self._acks = os.open(acks, os.O_WRONLY | os.O_APPEND)
        self._numbers = itertools.count()

    def emit(self, rows: int, size: int) -> None:
        for _ in range(rows):
            self._emit("main", next(self._numbers), size)

    def _emit(self, thread: str, number: int, size: int) -> None:
        import fasten

        target = f"{self._name}/{thread}/{number}"
        detail = {"number": number, "padding": "x" * size}
        id_ = fasten.emit(CODES[number % 3], target, detail=detail)
        os.write(self._acks, f"{id_} {target} 0\n".encode())

    def flood(self, threads: int) -> None:
        for thread in map(str, range(threads)):
            threading.Thread(target=self._flood, args=(thread,), daemon=True).start()

    def _flood(self, thread: str) -> None:
        for number in itertools.count():
            self._emit(thread, number, 50)
            time.sleep(0.0005)

    def fork(self, rows: int, end: str) -> str:
        pid = os.fork()
        if pid == 0:
            self._be_a_child(rows, end)
        try:
            wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0], PATIENCE_S / 2)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "a forked child hangs"
        return ""

    def _be_a_child(self, rows: int, end: str) -> None:
        import fasten

        self._name += f".{os.getpid()}"
        for number in range(rows):
            self._emit("child", number, 50)
        if end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if end == "close":
            fasten.close(1)
        os._exit(0)

    def call(self, action: Callable[[], object]) -> None:
        action()

    def flush(self) -> bool:
        import fasten

        return fasten.flush(PATIENCE_S / 2)

    def stop(self) -> bool:
        import fasten

        return fasten.close()


def _serve(
    orders: Connection,
    name: str,
    acks: str,
    setup: Callable[[], object],
    given: dict[str, Any],
) -> None:
    import fasten

    setup()
    fasten.init(**given)
    service = _Serving(name, acks)
    orders.send("")
    while True:
        order, *arguments = orders.recv()
        orders.send(getattr(service, order)(*arguments))
        if order == "stop":
            return


_FORKSERVER: Final = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["tests.faults.loaded", __name__])


class Service:
    """
    One service, and the other end of its orders: the methods of _Serving.

    *setup* is called in it before fasten is started with *given*.
    """

    def __init__(
        self, stage: Stage, name: str, setup: Callable[[], object] = int, **given: Any
    ) -> None:
        all_given = settings_of(stage.way, stage.spool, **given)
        self._orders, theirs = _FORKSERVER.Pipe()
        self._process = _FORKSERVER.Process(
            target=_serve,
            args=(theirs, name, str(stage.acks), setup, all_given),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self._answer("start")

    def do(self, order: str, *arguments: Any) -> Any:
        """
        Have it do something; return what it answers.

        Raises:
            TimeoutError: it hangs.
        """
        self._orders.send((order, *arguments))
        return self._answer(order)

    def _answer(self, order: str) -> Any:
        if not self._orders.poll(PATIENCE_S):
            raise TimeoutError(f"a service hangs: {order}")
        return self._orders.recv()

    def kill(self) -> None:
        """
        Kill -9.
        """
        self._process.kill()
        self.wait()

    def wait(self) -> None:
        """
        Wait for its end.

        Raises:
            TimeoutError: it does not end.
        """
        self._process.join(PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            raise TimeoutError("a service does not end")
        self._orders.close()


# --- the store, there and away -------------------------------------------------------


@contextmanager
def _locked(dsn: str) -> Iterator[None]:
    """
    Hold a SQLite file's lock, as somebody's forgotten transaction does.
    """
    connection = sqlite3.connect(dsn.removeprefix("sqlite:///"), timeout=PATIENCE_S)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
    finally:
        connection.close()


@contextmanager
def _refused(proxy: Proxy) -> Iterator[None]:
    proxy.mode = "refuse"
    try:
        yield
    finally:
        proxy.mode = "pass"


@attrs.frozen
class Stage:
    """
    Where examples are played: *dsn* is the store's own, *way* that of services to it:
    to them it is the place whose rows a journal holds.
    """

    folder: Path
    dsn: str
    way: str
    away: Callable[[], Any]

    @property
    def spool(self) -> Path:
        """
        Return where the journals lie.
        """
        return self.folder / "spool"

    @property
    def acks(self) -> Path:
        """
        Return where services note what was acknowledged.
        """
        return self.folder / "acks"

    def acked(self) -> list[Ack]:
        """
        Return what was acknowledged.
        """
        with self.acks.open(encoding="ascii") as file:
            return read_acks(file)

    def clear(self) -> None:
        """
        Make it as it was before the first example.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.acks.touch()
        if not self.dsn.startswith("sqlite"):
            ask(self.dsn, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")

    def inherit(self) -> None:
        """
        Have the next process of the service deliver everything that was left.

        Raises:
            RuntimeError: it did not.
        """
        given = (self.way, str(self.spool))
        process = _FORKSERVER.Process(target=heir.deliver, args=given, daemon=True)
        process.start()
        process.join(3 * PATIENCE_S)
        if process.is_alive():
            process.kill()
        if process.exitcode:
            left = heir.unsettled(self.spool)
            raise RuntimeError(f"the heir failed ({process.exitcode}): {left} left")


@contextmanager
def staged(grounds: Grounds, store: str) -> Iterator[Stage]:
    """
    Yield a stage over *store*; clear it before it is used.
    """
    folder = grounds.folder / "stage"
    if store == "sqlite":
        dsn = f"sqlite:///{folder / 'audit.db'}"
        yield Stage(folder, dsn, dsn, lambda: _locked(dsn))
        return
    dsn = grounds.dsn(store)
    with Proxy(dsn) as proxy:
        yield Stage(folder, dsn, proxy.dsn, lambda: _refused(proxy))
