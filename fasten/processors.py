# SPDX-License-Identifier: Apache-2.0
"""
The sys stream's way in: structlog processors, and the `log` object.

They work before `init()` and after it: an engine binds itself as the sink. What
becomes of a row lives in `streams`. Nothing here raises into a caller, configures
structlog, or imports it: it is there if its user is.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from logging import getLogger
from typing import Any, Final

import attrs

from fasten.context import correlation, current, is_suppressed, sentinel
from fasten.redact import Redactor
from fasten.rows import format_timestamp
from fasten.streams import Draft

__all__ = [
    "Log",
    "Sink",
    "SysTee",
    "add_correlation",
    "bind_sink",
    "chain",
    "failures",
    "insert_into_configured",
    "is_inserted",
    "log",
    "record",
    "redact",
    "remove_from_configured",
]

EventDict = MutableMapping[str, Any]
"""A structlog event, as its processors hand it on."""

Processor = Callable[[Any, str, EventDict], EventDict]

logger = getLogger("fasten")

# --- the sink ---------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Sink:
    """
    What a running engine offers to the log path.

    *record* takes the draft of a sys row, and `is_printed=False` where stdout shall
    not have it. *clean* returns a redacted copy of a dict; *tidy* may return the dict
    itself, redacted. None waits for anything.
    """

    record: Callable[..., object]
    clean: Callable[[Mapping[str, object]], dict[str, Any]]
    tidy: Callable[[Mapping[str, object]], dict[str, Any]]
    service_id: str
    source_node_id: str
    tenant_id: str | None = None
    clock_ns: Callable[[], int] = time.time_ns


_EARLY_LINES: Final = 1_000


class _Path:
    """
    Where lines go: to the engine's sink, or into a buffer until there is one.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Draft, dict[str, bool]]]
        self._waiting = deque(maxlen=_EARLY_LINES)
        # Known by its empty names.
        redactor = Redactor()
        self.buffer = Sink(
            record=self._keep,
            clean=redactor.clean,
            tidy=redactor.tidy,
            service_id="",
            source_node_id="",
        )
        self.sink = self.buffer
        self.failures = 0

    def _keep(self, draft: Draft, **how: bool) -> None:
        self._waiting.append((draft, how))
        if self.sink is not self.buffer:
            # An engine came while this line was on its way here.
            self.replay()

    def replay(self) -> None:
        """
        Hand what waited to the sink, under its names.
        """
        sink = self.sink
        while True:
            try:
                draft, how = self._waiting.popleft()
            except IndexError:
                return
            make, rid, _, *line = draft
            sink.record((make, rid or sentinel(), sink, *line), **how)

    def after_fork_in_child(self) -> None:
        """
        Forget what waits: it is the parent's to hand over.
        """
        self._waiting.clear()


_path = _Path()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_path.after_fork_in_child)


def bind_sink(sink: Sink | None, *, takes_early: bool = True) -> None:
    """
    Send all lines to *sink* from now on; None keeps the last 1,000 for the next one.

    *takes_early* says whether this sink is the one that gets those.
    """
    _path.sink = sink or _path.buffer
    if sink is not None and takes_early:
        _path.replay()


def failures() -> int:
    """
    Count the lines so far that could not be recorded.
    """
    return _path.failures


# --- rows -------------------------------------------------------------------------

_LEVELS: Final = {
    "debug": "debug",
    "notset": "debug",
    "trace": "debug",
    "info": "info",
    "msg": "info",
    "notice": "info",
    "warn": "warning",
    "warning": "warning",
    "error": "error",
    "err": "error",
    "exception": "error",
    "critical": "critical",
    "fatal": "critical",
}
# What structlog and its stdlib bridge keep in an event for themselves.
_INTERNAL: Final = frozenset(("_from_structlog", "_record", "exc_info", "stack_info"))
# Columns that a caller's fields of the same name do not decide.
_OURS: Final = ("level", "service_id", "shape", "source_node_id", "timestamp")
_RENAMED: Final = frozenset((*_OURS, "event"))
_TEXTS: Final = ("event", "request_id", "tenant_id", "logger")


def record(
    level: str,
    event: object,
    fields: Mapping[str, Any],
    *,
    logger_name: str | None = None,
) -> None:
    """
    Record one line of the sys stream: what `log` does, and bridges do.

    *fields* may hold `exc_info`, as in structlog and logging. Never raises.
    """
    if is_suppressed():
        return
    try:
        values: dict[str, Any] = {"event": event}
        for name, value in fields.items():
            values[f"{name}_" if name in _RENAMED else name] = value
        if "exc_info" in fields:
            values = _public(values)
        sink = _path.sink
        cleaned = sink.clean(values)
        at_ns = sink.clock_ns()
        level = _level(level, fields)
        found = _found(sink)
        rid = cleaned.get("request_id") or (found[0] if found else None)
        sink.record((_row, rid, sink, at_ns, level, logger_name, found, cleaned))
    except Exception:  # a line must not cost its caller anything
        _path.failures += 1


_Found = tuple[str, str | None, str | None, str | None]
_NOBODY: Final = ("", None, None, None)


def _found(sink: Sink) -> _Found | None:
    """
    Return the context of a line; None leaves its id to the engine to come.
    """
    return correlation() if sink.service_id or current() is not None else None


def _row(
    rid: str | None,
    sink: Sink,
    at_ns: int,
    level: str,
    logger_name: str | None,
    found: _Found | None,
    fields: Mapping[str, Any],
) -> dict[str, Any]:
    """
    Make the wire form of a line from what its caller's thread noted.
    """
    _, tenant, trace, span = found or _NOBODY
    level = _level(level, fields)
    service, node = sink.service_id, sink.source_node_id
    at = format_timestamp(at_ns // 1000)
    row: dict[str, Any] = {
        "shape": "sys",
        "level": level,
        "event": "",
        "request_id": rid,
        "service_id": service,
        "source_node_id": node,
        "tenant_id": tenant or sink.tenant_id,
        "timestamp": at,
        "logger": logger_name,
    }
    if trace is not None:
        row["trace_id"], row["span_id"] = trace, span
    # Into the row, so that it keeps the order of the wire; what is ours comes back.
    row.update(fields)
    row["shape"], row["level"], row["timestamp"] = "sys", level, at
    row["service_id"], row["source_node_id"] = service, node
    if not row["event"]:
        # structlog's EventRenamer was here.
        row["event"] = row.pop("message", None) or row.pop("msg", None) or ""
    for name in _TEXTS:
        value = row[name]
        if type(value) is not str and value is not None:
            row[name] = str(value)
    row["request_id"] = row["request_id"] or rid or sentinel()
    return row


def _level(method: str, event_dict: Mapping[str, Any]) -> str:
    known = _LEVELS.get(method)
    if known is not None:
        return known
    given = str(event_dict.get("level") or method or "info").lower()[:16]
    return _LEVELS.get(given, given)


def _public(event_dict: Mapping[str, Any]) -> dict[str, Any]:
    """
    Copy an event without structlog's own entries, its exception spelt out.
    """
    public = {k: v for k, v in event_dict.items() if k not in _INTERNAL}
    if "exception" not in public:
        text = _exception_text(event_dict.get("exc_info"))
        if text is not None:
            public["exception"] = text
    return public


_HEAD_CHARS: Final = 4_000
_TAIL_CHARS: Final = 12_000


def _exception_text(exc_info: object) -> str | None:
    """
    Spell an exception with its traceback, cut in the middle; never its locals.
    """
    error = exc_info
    if isinstance(error, tuple):
        error = error[1] if len(error) > 1 else None
    elif error is not None and not isinstance(error, BaseException) and error:
        error = sys.exc_info()[1]
    if not isinstance(error, BaseException):
        return None
    text = "".join(traceback.format_exception(error)).rstrip()
    if len(text) <= _HEAD_CHARS + _TAIL_CHARS:
        return text
    cut = len(text) - _HEAD_CHARS - _TAIL_CHARS
    return f"{text[:_HEAD_CHARS]}\n... {cut} characters ...\n{text[-_TAIL_CHARS:]}"


# --- processors -------------------------------------------------------------------


def add_correlation(_logger: Any, _method: str, event_dict: EventDict) -> EventDict:
    """
    Add request id, service, node, tenant and trace to an event, where it has none.
    """
    try:
        if "_record" in event_dict:
            _with_ids(event_dict, event_dict["_record"])
        _correlate(_path.sink, event_dict)
    except Exception:  # an event of some type of its own
        _path.failures += 1
    return event_dict


# Looked up and set, in two steps: `setdefault` takes half as long again.
def _correlate(sink: Sink, event_dict: EventDict) -> None:
    service = sink.service_id
    if not service and current() is None:
        return  # a sentinel of no service would say nothing
    rid, tenant, trace, span = correlation()
    if "request_id" not in event_dict:
        event_dict["request_id"] = rid
    if service:
        if "service_id" not in event_dict:
            event_dict["service_id"] = service
        if "source_node_id" not in event_dict:
            event_dict["source_node_id"] = sink.source_node_id
        tenant = tenant or sink.tenant_id
    if tenant is not None and "tenant_id" not in event_dict:
        event_dict["tenant_id"] = tenant
    if trace is not None:
        event_dict.setdefault("trace_id", trace)
        if span is not None:
            event_dict.setdefault("span_id", span)


def redact(_logger: Any, _method: str, event_dict: EventDict) -> EventDict:
    """
    Take secrets out of an event, as fasten's own rows are redacted.

    If that fails the values are removed, not passed.
    """
    try:
        if not (
            "exc_info" in event_dict
            or "_record" in event_dict
            or "stack_info" in event_dict
        ):
            return _path.sink.clean(event_dict)
        kept = {k: event_dict[k] for k in _INTERNAL if k in event_dict}
        public = {k: v for k, v in event_dict.items() if k not in _INTERNAL}
        return {**_path.sink.clean(public), **kept}
    except Exception:  # an event of some type of its own
        _path.failures += 1
        return {"event": "", "_redaction_failed": True}


class SysTee:
    """
    Copy each event into the sys stream, and pass it on unchanged.

    Stands anywhere before the renderer. *is_redacted* spares the copy its own
    redaction, *is_printed* decides whether stdout gets one: off, where the renderer
    prints there itself.
    """

    def __init__(self, *, is_redacted: bool = False, is_printed: bool = True) -> None:
        self._is_redacted = is_redacted
        self._is_printed = is_printed

    # One function, written out: each call more is a hundredth of a log line.
    def __call__(self, logger: Any, method: str, event_dict: EventDict) -> EventDict:
        """
        Record the event, unless fasten itself is at work here.
        """
        if is_suppressed():
            return event_dict
        try:
            sink = _path.sink
            if "exc_info" in event_dict or "_record" in event_dict:
                logger = event_dict.get("_record", logger)
                if "_record" in event_dict and _seen.again(logger, event_dict):
                    return event_dict
                values = _with_ids(sink.clean(_public(event_dict)), logger)
            elif self._is_redacted:
                # Copied all the same: later processors may change the event.
                values = {**event_dict}
            else:
                values = sink.clean(event_dict)
            rid, found = values.get("request_id"), None
            # Behind add_correlation the event knows all that the context does.
            is_placed = rid and "source_node_id" in values
            if not is_placed and (sink.service_id or current() is not None):
                found = correlation()
                rid = rid or found[0]
            name = getattr(logger, "name", None)
            at_ns = sink.clock_ns()
            draft = _row, rid, sink, at_ns, method, name, found, values
            if self._is_printed:
                sink.record(draft)
            else:
                sink.record(draft, is_printed=False)
        except Exception:  # a line must not cost its caller anything
            _path.failures += 1
        return event_dict


class _Seen(threading.local):
    """
    The stdlib record that this thread met last: each handler formats it anew.
    """

    key: object = None

    def again(self, record: Any, event_dict: EventDict) -> bool:
        """
        Tell whether *record* is a copy of the one before.
        """
        key = record.created, record.name, record.lineno, event_dict.get("event")
        is_known, self.key = key == self.key, key
        return is_known


_seen = _Seen()
_IDS: Final = ("request_id", "tenant_id", "trace_id", "span_id")


def _with_ids(values: EventDict, record: Any) -> EventDict:
    """
    Add the ids of a stdlib record that got them where it was logged.

    The line may be formatted in another thread, as behind a QueueListener.
    """
    for name in _IDS:
        value = getattr(record, name, None)
        if type(value) is str:
            values.setdefault(name, value)
    return values


class _Chain(SysTee):
    """
    Redact, tee, correlate and stamp in one: apart, they look at an event twice.
    """

    def __init__(self, *, is_stamped: bool) -> None:
        super().__init__(is_redacted=True)
        self._is_stamped = is_stamped

    def __call__(self, logger: Any, method: str, event_dict: EventDict) -> EventDict:
        """
        Do all of it for a plain event; others, and failures, take it one by one.
        """
        try:
            if (
                "exc_info" in event_dict
                or "_record" in event_dict
                or "stack_info" in event_dict
                or is_suppressed()
            ):
                return self._one_by_one(logger, method, event_dict)
            sink = _path.sink
            # Changed in place, as processors do; the row gets the copy.
            event_dict = sink.tidy(event_dict)
            _correlate(sink, event_dict)
            rid, found = event_dict.get("request_id"), None
            if not rid:
                found = _found(sink)
                rid = found and found[0]
            name, fields = getattr(logger, "name", None), event_dict.copy()
            at_ns = sink.clock_ns()
            sink.record((_row, rid, sink, at_ns, method, name, found, fields))
            if self._is_stamped:
                _stamp(method, at_ns, event_dict)
        except Exception:  # each of the four counts its own
            return self._one_by_one(logger, method, event_dict)
        else:
            return event_dict

    def _one_by_one(self, logger: Any, method: str, event_dict: EventDict) -> EventDict:
        event_dict = redact(logger, method, event_dict)
        event_dict = super().__call__(logger, method, event_dict)
        event_dict = add_correlation(logger, method, event_dict)
        if self._is_stamped:
            try:
                _stamp(method, _path.sink.clock_ns(), event_dict)
            except Exception:  # an event of some type of its own
                _path.failures += 1
        return event_dict


def _stamp(method: str, at_ns: int, event_dict: EventDict) -> None:
    """
    Add level and time to an event that has none.
    """
    if "level" not in event_dict:
        event_dict["level"] = _LEVELS.get(method) or _level(method, event_dict)
    if "timestamp" not in event_dict:
        event_dict["timestamp"] = format_timestamp(at_ns // 1000)


def chain(*, is_stamped: bool = True) -> list[Processor]:
    """
    Return the processors for `structlog.configure(processors=[*chain(), renderer])`.

    Redaction, a copy of each event into the sys stream, correlation, and, unless
    *is_stamped* is off, `level` and `timestamp` where the event has none. They may
    stand there before `init()`.
    """
    return [_Chain(is_stamped=is_stamped)]


# --- the log object ---------------------------------------------------------------


class Log:
    """
    A structlog-style logger of the sys stream alone.

    Takes an event and fields, interpolates positional arguments, and merges what
    `structlog.contextvars` holds; the user's structlog chain is not involved.
    Immutable: `bind` and its kin return a new one. No method raises.
    """

    __slots__ = ("_context",)

    def __init__(self, context: Mapping[str, Any] | None = None) -> None:
        self._context = dict(context or {})

    def __repr__(self) -> str:
        return f"<Log bound to {sorted(self._context)}>"

    def bind(self, **fields: Any) -> Log:
        """
        Return a logger whose lines also have *fields*.
        """
        return Log({**self._context, **fields})

    def unbind(self, *keys: str) -> Log:
        """
        Return a logger without *keys*.

        Raises:
            KeyError: one of them is not bound.
        """
        for key in keys:
            self._context[key]
        return self.try_unbind(*keys)

    def try_unbind(self, *keys: str) -> Log:
        """
        Return a logger without *keys*, bound or not.
        """
        return Log({k: v for k, v in self._context.items() if k not in keys})

    def new(self, **fields: Any) -> Log:
        """
        Return a logger whose lines have *fields* only.
        """
        return Log(fields)

    def log(
        self, level: str | int, event: object = None, /, *args: Any, **fields: Any
    ) -> None:
        """
        Record a line at *level*, a name or one of the stdlib's numbers.
        """
        name = level if isinstance(level, str) else _level_name(level)
        self._record(name.lower(), event, args, fields)

    def debug(self, event: object = None, /, *args: Any, **fields: Any) -> None:
        """
        Record a line of level debug.
        """
        self._record("debug", event, args, fields)

    def info(self, event: object = None, /, *args: Any, **fields: Any) -> None:
        """
        Record a line of level info.
        """
        self._record("info", event, args, fields)

    def warning(self, event: object = None, /, *args: Any, **fields: Any) -> None:
        """
        Record a line of level warning.
        """
        self._record("warning", event, args, fields)

    warn = warning

    def error(self, event: object = None, /, *args: Any, **fields: Any) -> None:
        """
        Record a line of level error.
        """
        self._record("error", event, args, fields)

    def critical(self, event: object = None, /, *args: Any, **fields: Any) -> None:
        """
        Record a line of level critical.
        """
        self._record("critical", event, args, fields)

    def exception(self, event: object = None, /, *args: Any, **fields: Any) -> None:
        """
        Record a line of level error with the exception being handled.
        """
        fields.setdefault("exc_info", True)
        self._record("error", event, args, fields)

    def _record(
        self, level: str, event: object, args: tuple[Any, ...], fields: dict[str, Any]
    ) -> None:
        if args:
            event = _interpolated(event, args)
        ambient = _structlog_contextvars()
        if ambient or self._context:
            fields = {**ambient, **self._context, **fields}
        record(level, event, fields)


log: Final = Log()
"""The logger that needs no set-up; before `init()` its lines wait for the engine."""


def _level_name(level: int) -> str:
    names = ((50, "critical"), (40, "error"), (30, "warning"), (20, "info"))
    return next((name for least, name in names if level >= least), "debug")


def _interpolated(event: object, args: tuple[Any, ...]) -> object:
    """
    Apply positional arguments as logging and structlog do.
    """
    values = args[0] if len(args) == 1 and isinstance(args[0], Mapping) else args
    try:
        return str(event) % (values or args)
    except Exception:  # a wrong format is no reason to lose the line
        return f"{event} {len(args)} arguments that do not fit"


def _structlog_contextvars() -> dict[str, Any]:
    # Nobody has bound any where structlog was never imported.
    module = sys.modules.get("structlog.contextvars")
    return {} if module is None else module.get_contextvars()


# --- a structlog that is configured already ---------------------------------------


class _Insertion:
    """
    The processors that `init()` put into the user's own list.
    """

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.processors: list[Any] = []
        self.added: list[Any] = []


_insertion = _Insertion()


def insert_into_configured() -> bool:
    """
    Put correlation and tee before the renderer of the configured structlog.

    Its list of processors is changed in place, so that cached loggers see it.
    Nothing is doubled. Without a configured structlog, nothing happens.

    Returns:
        Whether a tee is in the chain now.
    """
    structlog = sys.modules.get("structlog")
    if structlog is None or not structlog.is_configured():
        return False
    processors = structlog.get_config()["processors"]
    if not isinstance(processors, list):
        logger.warning(
            "structlog is configured with a %s of processors, which cannot be changed "
            "in place; put *fasten.processors.chain() before your renderer",
            type(processors).__name__,
        )
        return False
    with _insertion.guard:
        return _insert(processors)


def _insert(processors: list[Any]) -> bool:
    if any(isinstance(processor, SysTee) for processor in processors):
        return True
    if not processors:
        return False
    added: list[Any] = [SysTee()]
    if add_correlation not in processors:
        added.append(add_correlation)
    place = next(filter(_renders, processors), processors[-1])
    at = processors.index(place)
    # One operation: a thread that is logging sees all of it or nothing.
    processors[at:at] = added
    _insertion.processors, _insertion.added = processors, added
    return True


_RENDERERS: Final = frozenset(
    (
        "ConsoleRenderer",
        "JSONRenderer",
        "KeyValueRenderer",
        "LogfmtRenderer",
        "render_to_log_args_and_kwargs",
        "render_to_log_kwargs",
        "wrap_for_formatter",
    )
)


def _renders(processor: Any) -> bool:
    """
    Tell whether *processor* is known to make an event into something else.
    """
    name = getattr(processor, "__name__", type(processor).__name__)
    return name in _RENDERERS


def is_inserted() -> bool:
    """
    Tell whether processors of ours stand in a chain that was configured before.
    """
    return bool(_insertion.added)


def remove_from_configured() -> None:
    """
    Take out again what `insert_into_configured` put in.
    """
    with _insertion.guard:
        ours = {id(processor) for processor in _insertion.added}
        left = [p for p in _insertion.processors if id(p) not in ours]
        _insertion.processors[:] = left
        _insertion.processors, _insertion.added = [], []
