# SPDX-License-Identifier: Apache-2.0
"""
Running a test's code with a trail in the place of fasten's stores.

What a test may ask of its trail is in `trail`.
"""

from __future__ import annotations

import inspect
import json
import os
import socket
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar, cast, overload

import attrs

from fasten import codes, context, engine, processors
from fasten.delivery import unsealed
from fasten.engine import Engine
from fasten.rows import AUDIT_COLUMNS
from fasten.settings import Settings
from fasten.streams import Draft, Row, Stream
from fasten.testing.trail import Clock, Trail

__all__ = ["Capture", "capture"]

DEFAULTS: Final = {"FASTEN_SERVICE_ID": "test", "FASTEN_NODE_ID": "test"}
"""What a captured test finds in its environment, unless it sets it itself."""


# --- an engine that stores nothing ------------------------------------------------


class _Kept(Stream):
    """
    A stream whose rows the trail gets, too.
    """

    def __init__(self, stream: Stream, trail: Trail) -> None:
        super().__init__(stream.name, stream.ring)
        self._trail = trail

    def record(self, row: Row | Draft, *, is_printed: bool = True) -> None:
        """
        Take a row, as any stream does.
        """
        super().record(row, is_printed=is_printed)
        self._trail.keep(self.name, row)


class _Inlet:
    """
    What stands where an engine has its spool: hands audit rows to the trail.
    """

    def __init__(self, trail: Trail) -> None:
        self._trail = trail
        self.engine: Engine | None = None

    def append(self, _payload: bytes, row: tuple[Any, ...]) -> int:
        """
        Take a row as the spool does.
        """
        self._keep(row)
        return 1

    def append_pending(self, row: tuple[Any, ...]) -> None:
        """
        Take a row that was given a connection.
        """
        self._keep(row, pending=True)

    def _keep(self, row: tuple[Any, ...], **mark: bool) -> None:
        if self.engine is None:
            return
        laid_out = unsealed(row, self.engine.settings)
        made: dict[str, Any] = dict(zip(AUDIT_COLUMNS, laid_out, strict=True))
        made["detail"] = json.loads(made["detail"])
        # The ring is what query() and the reader answer from.
        self.engine.audit_ring.append(made)
        self._trail.keep("audit", {**made, **mark})


def _made(settings: Settings, trail: Trail) -> Engine:
    """
    Make an engine whose rows go to *trail*, and nowhere else.
    """
    inlet = _Inlet(trail)
    quiet = attrs.evolve(settings, stdout=frozenset())
    made = inlet.engine = Engine(
        quiet,
        clock_ns=trail.clock,
        mint=trail.mint,
        queue=inlet,
        outbox=inlet.append_pending,
    )
    made.sys, made.api = _Kept(made.sys, trail), _Kept(made.api, trail)
    return made


# --- capture() --------------------------------------------------------------------

_open: Final[list[Trail]] = []


@contextmanager
def _captured(given: Mapping[str, Any]) -> Iterator[Trail]:
    with ExitStack() as undo:
        trail = _begin(given, undo)
        _open.append(trail)
        try:
            yield trail
        finally:
            _open.remove(trail)
            if _open:
                # Else nobody would hear of them.
                _open[-1].inherit(trail.mistakes())


def _begin(given: Mapping[str, Any], undo: ExitStack) -> Trail:
    """
    Put a trail in the place of the stores; note on *undo* what was there before.
    """
    environ = ChainMap(os.environ, DEFAULTS)
    settings = Settings.from_env(
        environ, given, hostname=socket.gethostname(), cwd=Path.cwd()
    )
    trail = _fresh(undo)
    codes.registry.ensure()
    undo.callback(codes.registry.restore, codes.registry.configured)
    _define(settings.codes)
    undo.callback(_insert, is_wanted=processors.is_inserted())
    undo.callback(engine.install, engine.current())
    undo.callback(engine.read_from, *engine.read_from(environ, given))

    def start(wanted: Settings) -> Engine:
        _insert(is_wanted=wanted.log)
        made = _made(wanted, trail)
        engine.install(made, takes_early=False)
        return made

    def init(wanted: Settings) -> Engine:
        engine.prepare(wanted)
        return start(wanted)

    undo.callback(engine.stand_in, engine.stand_in(init))
    start(settings)
    return trail


def _fresh(undo: ExitStack) -> Trail:
    """
    Let ids, and what the process knows of itself, begin anew.
    """
    clock, numbers = Clock(), count(1)
    # Zeros for the random digits of a boot id: a test may compare it.
    process = context.Process(entropy=bytes)
    minter = context.RequestIdMinter(clock, lambda size: next(numbers).to_bytes(size))
    undo.callback(context.use_process, context.use_process(process))
    undo.callback(context.use_minter, context.use_minter(minter))
    return Trail(clock)


def _define(paths: tuple[str, ...] | None) -> None:
    """
    Have the registry hold the codes of *paths*, which it reads only if it must.
    """
    wanted = codes.discover(Path.cwd()) if paths is None else paths
    if wanted != tuple(codes.registry.configured):
        codes.registry.configure(wanted)


def _insert(*, is_wanted: bool) -> None:
    if is_wanted:
        processors.insert_into_configured()
    else:
        processors.remove_from_configured()


_Test = TypeVar("_Test", bound=Callable[..., Any])


class Capture(AbstractContextManager[Trail]):
    """
    What `capture()` returns: a context manager, and a decorator of tests.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._entered: list[tuple[AbstractContextManager[Trail], Trail]] = []

    def __enter__(self) -> Trail:
        entered = _captured(self._settings)
        trail = entered.__enter__()
        self._entered.append((entered, trail))
        return trail

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        entered, trail = self._entered.pop()
        if isinstance(error, Exception) and "fasten_told" not in vars(error):
            error.add_note(f"fasten trail:\n{trail.report() or '(empty)'}")
        entered.__exit__(None, None, None)

    def __call__(self, test: _Test) -> _Test:
        """
        Decorate a test, a coroutine function, or each test of a class.

        A test with a parameter *trail* gets the Trail.
        """
        if isinstance(test, type):
            return cast("_Test", self._around_class(test))
        if inspect.iscoroutinefunction(test):
            return cast("_Test", self._around_coroutine(test))
        return cast("_Test", self._around_function(test))

    def _around_class(self, tests: type) -> type:
        for name, test in list(vars(tests).items()):
            if name.startswith("test") and callable(test):
                setattr(tests, name, self(test))
        return tests

    def _around_function(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(test)
        def captured(*args: Any, **kwargs: Any) -> Any:
            with Capture(self._settings) as trail:
                return test(*args, **kwargs, **_asked(test, trail))

        return _without_trail(captured, test)

    def _around_coroutine(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(test)
        async def captured(*args: Any, **kwargs: Any) -> Any:
            with Capture(self._settings) as trail:
                return await test(*args, **kwargs, **_asked(test, trail))

        return _without_trail(captured, test)


def _asked(test: Callable[..., Any], trail: Trail) -> dict[str, Trail]:
    asks = "trail" in inspect.signature(test).parameters
    return {"trail": trail} if asks else {}


def _without_trail(
    captured: Callable[..., Any], test: Callable[..., Any]
) -> Callable[..., Any]:
    """
    Hide the parameter *trail*: pytest would look for a fixture of that name.
    """
    signature = inspect.signature(test)
    others = [p for name, p in signature.parameters.items() if name != "trail"]
    captured.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=others
    )
    return captured


@overload
def capture(test: _Test, /) -> _Test: ...
@overload
def capture(**settings: Any) -> Capture: ...
def capture(test: Any = None, /, **settings: Any) -> Any:
    """
    Record in memory, for a with-block or a decorated test, and nowhere else.

    The with-block gets the Trail. The clock stands still and ids are counted. An
    `init()` inside opens no store; its settings are respected, and *settings* are its
    defaults. The engine that ran before runs again afterwards.
    """
    made = Capture(settings)
    return made if test is None else made(test)
