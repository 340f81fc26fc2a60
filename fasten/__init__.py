# SPDX-License-Identifier: Apache-2.0
"""
fasten: who changed what, when, and what happened next - one query.

`init()` once, then `emit()` typed audit rows and `log` structured lines; shims
carry one request id across every transport.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fasten import codes, context
from fasten.context import (
    Context,
    ContextThreadPoolExecutor,
    add_source,
    bind,
    carry,
    current,
    current_request_id,
    identify,
    mint_request_id,
    with_request_id,
)
from fasten.difference import changes
from fasten.engine import (
    Engine,
    aemit,
    aflush,
    aquery,
    close,
    emit,
    flush,
    health,
    init,
    query,
    record_api,
    stats,
    trail,
)
from fasten.errors import (
    AuditStoreError,
    CodeConflict,
    FastenError,
    InvalidAnchor,
    InvalidCodes,
    InvalidQuery,
    MissingExtra,
    NotInitialized,
    NotInScope,
    QueueFull,
    SettingsError,
    UnknownCode,
)
from fasten.processors import log
from fasten.rows import ApiRow, AuditRow, Page, SysRow

if TYPE_CHECKING:
    from fasten import processors, reader, shim, testing
    from fasten.custody import sweep
    from fasten.forgetting import erase
    from fasten.proof import verify

__all__ = [
    "ApiRow",
    "AuditRow",
    "AuditStoreError",
    "CodeConflict",
    "Context",
    "ContextThreadPoolExecutor",
    "Engine",
    "FastenError",
    "InvalidAnchor",
    "InvalidCodes",
    "InvalidQuery",
    "MissingExtra",
    "NotInScope",
    "NotInitialized",
    "Page",
    "QueueFull",
    "SettingsError",
    "SysRow",
    "UnknownCode",
    "add_source",
    "aemit",
    "aflush",
    "aquery",
    "bind",
    "carry",
    "changes",
    "close",
    "codes",
    "context",
    "current",
    "current_request_id",
    "emit",
    "erase",
    "flush",
    "health",
    "identify",
    "init",
    "log",
    "mint_request_id",
    "processors",
    "query",
    "reader",
    "record_api",
    "shim",
    "stats",
    "sweep",
    "testing",
    "trail",
    "verify",
    "with_request_id",
]

# Faces are loaded when they are named: a service that only emits pays for none.
_FACES = ("processors", "reader", "shim", "testing")

# So are functions that few services call: their modules, by their names.
_FUNCTIONS = {"erase": "forgetting", "sweep": "custody", "verify": "proof"}


def __getattr__(name: str) -> Any:
    if name in _FACES:
        return import_module(f"fasten.{name}")
    if name in _FUNCTIONS:
        return getattr(import_module(f"fasten.{_FUNCTIONS[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("fasten")
    raise AttributeError(f"module 'fasten' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
