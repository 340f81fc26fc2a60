# SPDX-License-Identifier: Apache-2.0
"""
What fasten raises, each also a child of the builtin its caller would catch.

Messages say what happened, the offending value and the cure. None holds a DSN,
a token or a key.
"""

from __future__ import annotations

__all__ = [
    "AuditStoreError",
    "CodeConflict",
    "FastenError",
    "InvalidAnchor",
    "InvalidCodes",
    "InvalidQuery",
    "MissingExtra",
    "NotInScope",
    "NotInitialized",
    "QueueFull",
    "SettingsError",
    "UnknownCode",
]


class FastenError(Exception):
    """
    Base of everything that fasten raises on purpose.
    """


class SettingsError(FastenError, ValueError):
    """
    One or more settings are missing or unusable; the message names them all.
    """


class UnknownCode(FastenError, LookupError):
    """
    The code is not registered; the message names the nearest registered ones.
    """


class CodeConflict(FastenError, ValueError):
    """
    Two definitions of one code differ, or a caller defines one of fasten's own.
    """


class InvalidCodes(FastenError, ValueError):
    """
    A codes file has mistakes; the message lists all of them, each with its cure.
    """


class InvalidAnchor(FastenError, ValueError):
    """
    One of the 5 Ws + H is missing or of the wrong kind.
    """


class InvalidQuery(FastenError, ValueError):
    """
    A filter, bound or cursor of a query is unusable; *parameter* names it.
    """

    def __init__(self, message: str, parameter: str = "") -> None:
        super().__init__(message)
        self.parameter = parameter


class NotInitialized(FastenError, RuntimeError):
    """
    There is no running engine: `fasten.init()` was not called, or `close()` was.
    """


class NotInScope(FastenError, RuntimeError):
    """
    `identify()` was called outside any request, message, job or task.
    """


class QueueFull(FastenError, RuntimeError):
    """
    Neither spool nor memory can take the row, and FASTEN_ON_FULL is `raise`.
    """


class AuditStoreError(FastenError, RuntimeError):
    """
    A row that had to be stored at once was not, or may not have been.

    *id* is the row's id. *ambiguous* is true where COMMIT was sent and never
    answered: the row may exist, look it up by *id*.
    """

    def __init__(self, message: str, *, id: str = "", ambiguous: bool = False) -> None:
        super().__init__(message)
        self.id = id
        self.ambiguous = ambiguous


class MissingExtra(FastenError, ImportError):
    """
    An optional package is not installed; the message holds the pip line.
    """
