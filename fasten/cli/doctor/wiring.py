# SPDX-License-Identifier: Apache-2.0
"""
The user's application: is the http shim in its way, and who may read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fasten import context
from fasten.cli.application import Application
from fasten.cli.doctor.finding import Finding, fail, ok, warn
from fasten.settings import Settings

__all__ = ["check_application", "check_reader"]


def check_application(found: Application | None) -> list[Finding]:
    """
    Send the application a request, and see whether its id comes back.
    """
    if found is None:
        cure = "give --app module:app, so that a request can be sent through it"
        return [warn("http shim", "http shim not looked at", cure)]
    request_id = f"doctor-{context.mint_request_id()}"
    answer = found.get("/.fasten-doctor", {"X-Request-ID": request_id})
    if answer.fault:
        message = f"http shim not provable: a request ended in {answer.fault}"
        return [warn("http shim", message, "see what the application needs to start")]
    given = answer.headers.get("x-request-id", "")
    if not context.accept(given):
        message = f"http shim not wired: {found.spec} answers without X-Request-ID"
        return [fail("http shim", message, _CURE)]
    has_row = bool(found.api_rows(given))
    if not has_row and not any(m.startswith("fasten") for m in found.wiring()):
        message = f"X-Request-ID comes back from {found.spec}, but not by fasten's hand"
        return [warn("http shim", message, _CURE)]
    return [ok("http shim", "http shim wired"), *_recorded(found, has_row=has_row)]


_CURE: Final = "add fasten.shim's RequestIDMiddleware and APILogger to the application"


def _recorded(found: Application, *, has_row: bool) -> Iterator[Finding]:
    if found.running is None:
        cure = "call fasten.init() where the application starts"
        yield warn("http shim", f"{found.spec} calls no fasten.init()", cure)
    elif not has_row:
        cure = "add APILogger, too; without it there is no api stream"
        yield warn("http shim", "requests leave no api row", cure)


_MOUNT: Final = "/api/v1/logs"


def check_reader(settings: Settings, found: Application | None) -> list[Finding]:
    """
    See whether the reader lets strangers in, and friends.
    """
    if found is not None:
        return _mounted(found)
    if not settings.reader_token:
        return [
            warn(
                "reader",
                "a reader without auth= would refuse everybody",
                "set FASTEN_READER_TOKEN where one is mounted (openssl rand -hex 32)",
            )
        ]
    return [ok("reader", f"{len(settings.reader_token)} reader token(s) set")]


def _mounted(found: Application) -> list[Finding]:
    ours = found.mounts()
    for mount in dict.fromkeys([*ours, _MOUNT]):
        status = found.get(f"{mount.rstrip('/')}/health", {}).status
        # A reader asks who you are before it looks whether fasten runs (503).
        if status == 200 or (status == 503 and mount in ours):
            message = f"the reader at {mount} answers everybody, without a token"
            cure = 'drop auth="none" from reader.router(), set FASTEN_READER_TOKEN'
            return [fail("reader", message, cure)]
        if status in (401, 403):
            return [ok("reader", f"the reader at {mount} asks for a token")]
    return [ok("reader", f"no reader at {_MOUNT}, so none is open")]
