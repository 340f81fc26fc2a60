# SPDX-License-Identifier: Apache-2.0
"""
A user's application, as `--app module:attr` names it: imported, and asked.

While it is, `fasten.init()` opens no store and delivers nothing: what the application
does for us happened in no service.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any, Final
from wsgiref.util import setup_testing_defaults

import attrs
import click

from fasten import engine
from fasten.cli.command import Failure, WrongUsage
from fasten.context import is_async
from fasten.engine import Engine
from fasten.settings import Settings

__all__ = ["Answer", "Application", "app_option"]


def app_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """
    Add `--app`.
    """
    return click.option(
        "--app",
        metavar="MODULE:ATTR",
        help="Import this application first, as its server would: its codes, its "
        "wiring. No store is opened for it.",
    )(command)


@attrs.frozen
class Answer:
    """
    What an application answered: its status, 0 if none, and its headers by lower name.
    """

    status: int
    headers: Mapping[str, str]
    fault: str = ""


class _Nowhere:
    """
    A queue that takes every row and keeps none.
    """

    def append(self, _payload: bytes, _row: tuple[Any, ...]) -> int:
        return 1


class Application:
    """
    An imported application; `running` is the engine that its `init()` made, if any.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.running: Engine | None = None
        with self._stood_in():
            self.app = _imported(spec)

    @contextmanager
    def _stood_in(self) -> Iterator[None]:
        def make(settings: Settings) -> Engine:
            engine.prepare(settings)
            quiet = attrs.evolve(settings, stdout=frozenset())
            self.running = Engine(quiet, queue=_Nowhere())
            engine.install(self.running)
            return self.running

        stand_in, before = engine.stand_in(make), engine.current()
        try:
            # What an application prints is not what the command has to say.
            with redirect_stdout(sys.stderr):
                yield
        finally:
            engine.stand_in(stand_in)
            engine.install(before)

    def get(self, path: str, headers: Mapping[str, str]) -> Answer:
        """
        Send the application one GET request, in process.
        """
        ask = _ask_asgi if is_async(self.app) else _ask_wsgi
        with self._stood_in():
            if self.running is not None:
                engine.install(self.running)
            try:
                return ask(self.app, path, headers)
            except Exception as error:  # the application's own
                return Answer(0, {}, f"{type(error).__name__}: {error}"[:300])

    def api_rows(self, request_id: str) -> list[Any]:
        """
        Return the api rows that the application's engine has of one request.
        """
        if self.running is None:
            return []
        return self.running.query("api", request_id=request_id).rows

    def wiring(self) -> list[str]:
        """
        Return the modules of the middlewares that can be seen on the application.
        """
        return sorted({str(part.__module__) for part in _layers(self.app)})

    def mounts(self) -> list[str]:
        """
        Return the paths at which fasten's reader is mounted, as far as can be seen.
        """
        routes = getattr(self.app, "routes", None) or ()
        return [
            str(route.path)
            for route in routes
            if hasattr(route, "path")
            and type(getattr(route, "app", None)).__module__.startswith("fasten.")
        ]


# --- importing ------------------------------------------------------------------------

_SPEC: Final = re.compile(r"([\w.]+)(?::([\w.]+)(\(\))?)?")


def _imported(spec: str) -> Any:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise WrongUsage(f"--app {spec!r} is not module:attr, as in shop.web:app")
    module_name, path, is_factory = match.groups()
    if "" not in sys.path and os.getcwd() not in sys.path:  # noqa: PTH109
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        found: Any = import_module(module_name)
        for name in (path or _usual_name(found)).split("."):
            found = getattr(found, name) if name else found
        return found() if is_factory else found
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        cure = "; run this where the service runs" if missing in module_name else ""
        raise WrongUsage(
            f"--app {spec}: there is no module {missing!r}{cure}"
        ) from None
    except AttributeError as error:
        raise WrongUsage(f"--app {spec}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever the application does on import
        raise Failure(
            f"--app {spec}: importing it raised {type(error).__name__}: {error}"
        ) from None


def _usual_name(module: object) -> str:
    return next((n for n in ("app", "application") if hasattr(module, n)), "")


# --- asking ---------------------------------------------------------------------------

_TIMEOUT_S: Final = 10.0


def _ask_asgi(app: Any, path: str, headers: Mapping[str, str]) -> Answer:
    return asyncio.run(asyncio.wait_for(_asgi(app, path, headers), _TIMEOUT_S))


async def _asgi(app: Any, path: str, headers: Mapping[str, str]) -> Answer:
    sent: list[dict[str, Any]] = []
    inbox = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        return inbox.pop() if inbox else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(_scope(path, headers), receive, send)
    start = next(m for m in sent if m["type"] == "http.response.start")
    pairs = ((k.decode("latin-1"), v.decode("latin-1")) for k, v in start["headers"])
    return _answer(int(start["status"]), pairs)


def _scope(path: str, headers: Mapping[str, str]) -> dict[str, Any]:
    raw = [(b"host", b"localhost")]
    raw += [(k.lower().encode(), v.encode()) for k, v in headers.items()]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": raw,
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
        "state": {},
    }


def _ask_wsgi(app: Any, path: str, headers: Mapping[str, str]) -> Answer:
    environ: dict[str, Any] = {"PATH_INFO": path, "REMOTE_ADDR": "127.0.0.1"}
    setup_testing_defaults(environ)
    environ["wsgi.errors"] = io.StringIO()
    for name, value in headers.items():
        environ[f"HTTP_{name.upper().replace('-', '_')}"] = value
    started: list[tuple[str, list[tuple[str, str]]]] = []

    def start_response(
        status: str, given: list[tuple[str, str]], _exc_info: object = None
    ) -> Callable[[bytes], object]:
        started.append((status, given))
        return lambda _body: None

    body = app(environ, start_response)
    try:
        for _ in body:
            pass
    finally:
        if hasattr(body, "close"):
            body.close()
    status, pairs = started[-1]
    return _answer(int(status.split()[0]), pairs)


def _answer(status: int, pairs: Iterable[tuple[str, str]]) -> Answer:
    return Answer(status, {name.lower(): value for name, value in pairs})


# --- what is wrapped round what -------------------------------------------------------


def _layers(app: Any) -> Iterator[Any]:
    """
    Yield what can be seen between the server and the user's code.
    """
    yield from _named(app)
    met: set[int] = set()
    layer = app
    while layer is not None and id(layer) not in met:
        met.add(id(layer))
        yield type(layer)
        inner = (getattr(layer, n, None) for n in ("wsgi_app", "app", "application"))
        layer = next((found for found in inner if callable(found)), None)
        layer = getattr(layer, "__self__", layer) if inspect.ismethod(layer) else layer


def _named(app: Any) -> Iterator[Any]:
    """
    Yield what frameworks list: Starlette's middlewares, Flask's hooks, Django's names.
    """
    for listed in getattr(app, "user_middleware", None) or ():
        yield listed.cls
    for hooks in ("before_request_funcs", "after_request_funcs"):
        found = getattr(app, hooks, None)
        for functions in (found or {}).values() if isinstance(found, dict) else ():
            yield from functions
    django = getattr(sys.modules.get("django.conf"), "settings", None)
    # Imported is not configured: another library may be who knows it.
    for name in getattr(django, "MIDDLEWARE", ()) if _is_configured(django) else ():
        module, _, attribute = name.rpartition(".")
        yield getattr(import_module(module), attribute)


def _is_configured(django: Any) -> bool:
    return bool(getattr(django, "configured", False))
