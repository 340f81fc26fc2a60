# SPDX-License-Identifier: Apache-2.0
"""
The standard library's logging: a handler into the sys stream, and ids on records.

Neither needs structlog. With structlog's `ProcessorFormatter`, give its
`foreign_pre_chain` the processors of `fasten.processors.chain()` instead.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import fasten
from fasten.context import correlation

__all__ = ["LoggingHandler", "install_record_factory"]

_IDS: Final = ("request_id", "tenant_id", "trace_id", "span_id")
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {
    "asctime",
    "message",
    "taskName",
}
# What structlog's `wrap_for_formatter` puts on a record.
_STRUCTLOG: Final = ("_logger", "_name")


class LoggingHandler(logging.Handler):
    """
    Record what the standard library's loggers log in the sys stream.

    `extra=` becomes fields, redacted as all lines are; an exception is spelt out.
    What a structlog with fasten's processors in it logs is there already, and left
    out here. Never raises, never waits, and never logs itself.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """
        Record one line.
        """
        try:
            fields = {
                name: value
                for name, value in vars(record).items()
                if name not in _STANDARD and name not in _IDS
            }
            event: object
            if all(name in fields for name in _STRUCTLOG):
                if _is_teed():
                    return
                event, fields = _structlogs(record)
            else:
                event = _message(record)
            fields |= _ids(record)
            if record.exc_info:
                fields["exc_info"] = record.exc_info
            if record.stack_info:
                fields["stack"] = record.stack_info
            fasten.processors.record(
                record.levelname.lower(), event, fields, logger_name=record.name
            )
        except Exception:  # a line must not cost its caller anything
            fasten.processors.record(
                "error", "a log record could not be read", {}, logger_name=record.name
            )


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # a format that its arguments do not fit
        return f"{record.msg} {len(record.args or ())} arguments that do not fit"


def _structlogs(record: logging.LogRecord) -> tuple[object, dict[str, Any]]:
    event: Any = record.msg
    fields = dict(event) if isinstance(event, Mapping) else {"event": event}
    for name in ("level", "timestamp"):
        fields.pop(name, None)
    return fields.pop("event", ""), fields


def _ids(record: logging.LogRecord) -> dict[str, str]:
    """
    Return the ids that the record got where it was logged, maybe in another thread.
    """
    found = {name: vars(record).get(name) for name in _IDS}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _is_teed() -> bool:
    """
    Tell whether structlog's own chain copies its events already.
    """
    structlog = sys.modules.get("structlog")
    if structlog is None:
        return False
    processors = structlog.get_config()["processors"]
    return any(isinstance(p, fasten.processors.SysTee) for p in processors)


# --- ids on every record ----------------------------------------------------------


class _Attributes(dict[str, Any]):
    """
    A record's attributes, of which the ids give way to those of `extra=`.

    `Logger.makeRecord` refuses an extra of a name that the record has: an application
    that logs `extra={"request_id": ...}` must go on working.
    """

    def __contains__(self, name: object) -> bool:
        return name not in _IDS and super().__contains__(name)


class _Factory:
    """
    A factory of log records, around the one before.
    """

    def __init__(self, make: Callable[..., logging.LogRecord]) -> None:
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make(*args, **kwargs)
        attributes = _Attributes(vars(record))
        for name, value in zip(_IDS, correlation(), strict=True):
            attributes.setdefault(name, value)
        record.__dict__ = attributes
        return record


def install_record_factory() -> Callable[..., logging.LogRecord]:
    """
    Give each log record `request_id`, `tenant_id`, `trace_id` and `span_id`.

    A format may then say `%(request_id)s`. The factory that was installed goes on
    making the records; installing twice changes nothing.

    Returns:
        The factory before, for `logging.setLogRecordFactory()`.
    """
    before = logging.getLogRecordFactory()
    if not isinstance(before, _Factory):
        logging.setLogRecordFactory(_Factory(before))
    return before
