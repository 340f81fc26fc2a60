# SPDX-License-Identifier: Apache-2.0
"""
The ambient context: whose request, message, job or task this code is running for.

One cell in one ContextVar. What a transport's wire looks like lives in
`fasten_shims`; what becomes of the values, in `engine` and `processors`.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Coroutine, Iterator, Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token, copy_context
from enum import Enum
from functools import wraps
from time import time_ns
from types import TracebackType
from typing import (
    Any,
    Final,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    cast,
    runtime_checkable,
)
from uuid import UUID

from fasten.errors import NotInScope

__all__ = [
    "HEADER",
    "LEFT_OUT",
    "Carrier",
    "Context",
    "ContextThreadPoolExecutor",
    "LeftOut",
    "Process",
    "RequestIdMinter",
    "Snapshot",
    "accept",
    "add_source",
    "ask",
    "bind",
    "carry",
    "correlation",
    "current",
    "current_request_id",
    "extract",
    "failures",
    "identify",
    "inject",
    "is_async",
    "is_stdout_reserved",
    "is_suppressed",
    "mint_request_id",
    "parse_traceparent",
    "remove_source",
    "reserve_stdout",
    "resume",
    "scope",
    "sentinel",
    "set_service",
    "snapshot",
    "suppressed",
    "trust_request_ids",
    "trusts_request_ids",
    "use_minter",
    "use_process",
    "with_request_id",
]

P = ParamSpec("P")
R = TypeVar("R")

HEADER: Final = "X-Request-ID"
"""The key under which an id travels where a transport has no better one."""

Text = str | int | UUID
"""What names somebody: an anchor is a string, and these spell themselves."""

# --- request ids ------------------------------------------------------------------

_ACCEPTED: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:~-]{0,127}")
_RESERVED: Final = ("boot-", "orphan-", "evt-")


def accept(value: object) -> str | None:
    """
    Return *value* if it may be a request id, else None: the rule for every wire.

    Inbound ids are attacker text. Bytes are read as ASCII, which the rule is.
    """
    if isinstance(value, bytes):
        value = value[:129].decode("latin-1")
    if not isinstance(value, str) or _ACCEPTED.fullmatch(value) is None:
        return None
    return None if value.startswith(_RESERVED) else str(value)


class RequestIdMinter:
    """
    Mint 32 lower hex digits with the bits of a UUIDv7.

    The 12 bits after the milliseconds count 244 ns steps (RFC 9562, section 6.2,
    method 3): ids grow with time, so an index over them only appends. Each is also a
    valid W3C trace id.
    """

    def __init__(
        self,
        clock: Callable[[], int] = time_ns,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._clock, self._entropy = clock, entropy

    def __call__(self) -> str:
        """
        Return the next id.
        """
        ms, rest = divmod(self._clock(), 1_000_000)
        head = (ms & 0xFFFF_FFFF_FFFF) << 16 | 0x7000 | (rest << 12) // 1_000_000
        tail = int.from_bytes(self._entropy(8), "big") & 0x3FFF_FFFF_FFFF_FFFF
        return f"{head << 64 | 0x8000_0000_0000_0000 | tail:032x}"


_minter: Callable[[], str] = RequestIdMinter()


def mint_request_id() -> str:
    """
    Return a new request id: 32 lower hex digits, time-ordered.
    """
    return _minter()


def use_minter(minter: Callable[[], str]) -> Callable[[], str]:
    """
    Mint with *minter* from now on; return the one before, to put back.
    """
    global _minter
    before, _minter = _minter, minter
    return before


_TRACE_ID: Final = re.compile(r"(?!0{32})[0-9a-f]{32}")
_SPAN_ID: Final = re.compile(r"(?!0{16})[0-9a-f]{16}")
_TRACEPARENT: Final = re.compile(
    rf"(?!ff)([0-9a-f]{{2}})-({_TRACE_ID.pattern})-({_SPAN_ID.pattern})"
    r"-[0-9a-f]{2}(-.*)?"
)


def parse_traceparent(value: object) -> tuple[str, str] | None:
    """
    Return (trace id, span id) of a W3C `traceparent`, or None if it is not one.

    Versions above 00 may carry more fields. See
    https://www.w3.org/TR/trace-context/#traceparent-header-field-values.
    """
    if isinstance(value, bytes):
        value = value[:512].decode("latin-1")
    if not isinstance(value, str):
        return None
    found = _TRACEPARENT.fullmatch(value)
    if found is None or (found[1] == "00" and found[4] is not None):
        return None
    return found[2], found[3]


# --- the process's own ids ----------------------------------------------------------


class Process:
    """
    The ids of rows that belong to no request, and what went wrong in callbacks.
    """

    def __init__(self, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._entropy = entropy
        self.service = "unknown"
        self.trusts_ids = True
        self.is_stdout_reserved = False
        self.failures = {"sources": 0, "askers": 0}
        self.begin()

    def begin(self) -> None:
        """
        Start as a new process: no id seen yet, and new random digits.
        """
        self.is_booting = True
        self._digits = self._entropy(6).hex()
        self.name(self.service)

    def name(self, service: str) -> None:
        """
        Spell both sentinels for *service*, cut to what an id may hold.
        """
        self.service = service
        part = re.sub(r"[^A-Za-z0-9._:~-]", "_", service)[:64] or "unknown"
        self.boot = f"boot-{part}-{self._digits}"
        self.orphan = f"orphan-{part}-{self._digits}"


_process = Process()
if hasattr(os, "register_at_fork"):
    # By its name: a test may have put another in its place.
    os.register_at_fork(after_in_child=lambda: _process.begin())  # noqa: PLW0108


def use_process(process: Process) -> Process:
    """
    Take *process* for this one from now on; return the one before, to put back.

    For `fasten.testing`: each test finds a process that has just begun.
    """
    global _process
    before, _process = _process, process
    return before


def set_service(service_id: str) -> None:
    """
    Name the service that the sentinel ids of this process carry.
    """
    _process.name(service_id)


def trust_request_ids(is_trusted: bool) -> None:  # noqa: FBT001  (a setter)
    """
    Say whether HTTP takes over a caller's request id: FASTEN_TRUST_REQUEST_ID.
    """
    _process.trusts_ids = is_trusted


def trusts_request_ids() -> bool:
    """
    Tell whether HTTP takes over a caller's request id, or always mints one.
    """
    return _process.trusts_ids


def reserve_stdout() -> None:
    """
    Say that stdout is the wire of a protocol: fasten's lines go to stderr from now on.
    """
    _process.is_stdout_reserved = True


def is_stdout_reserved() -> bool:
    """
    Tell whether stdout belongs to a protocol.
    """
    return _process.is_stdout_reserved


def sentinel() -> str:
    """
    Return the id of rows without a context.

    `boot-<service>-<hex>` until the first real id was seen in this process, then
    `orphan-<service>-<hex>`.
    """
    return _process.boot if _process.is_booting else _process.orphan


def failures() -> dict[str, int]:
    """
    Count the exceptions of trace sources and of middlewares' callables so far.
    """
    return dict(_process.failures)


# --- the cell -----------------------------------------------------------------------


class _Question:
    """
    A callable that names an anchor from the request, asked until it answers.

    *otherwise* is what the anchor is while there is no answer.
    """

    __slots__ = ("_ask", "_request", "otherwise")

    def __init__(
        self, ask: Callable[[Any], object], request: object, otherwise: str | None
    ) -> None:
        self._ask, self._request, self.otherwise = ask, request, otherwise

    def answer(self) -> str | None:
        """
        Ask; None while there is no answer, or while it is being asked for.
        """
        asking = _ASKING.get()
        if self in asking:
            # The callable logs, or emits: that row does without its own answer.
            return None
        token = _ASKING.set((*asking, self))
        try:
            return _text(self._ask(self._request))
        except Exception:  # a user's callback must not cost the request
            _process.failures["askers"] += 1
            return None
        finally:
            _ASKING.reset(token)


_ASKING: ContextVar[tuple[object, ...]] = ContextVar("fasten_asking", default=())


class Context:
    """
    Who and what the running code works for; belongs to one scope.

    Anchors are strings or None (None: nobody said). *parent* is the request id of
    the scope around this one, where it differs. *kind* `http` makes an unnamed actor
    `anonymous`; elsewhere it is `system`. *client_request_id* is an inbound id that
    was kept but not trusted. *has_callers_span* says that span_id came off the wire:
    a span that runs in this process is nearer.
    """

    __slots__ = (
        "actor",
        "actor_kind",
        "client",
        "client_request_id",
        "has_callers_span",
        "kind",
        "method",
        "on_behalf_of",
        "parent",
        "questions",
        "request_id",
        "span_id",
        "tenant_id",
        "trace_id",
    )

    request_id: str
    actor: str | None
    actor_kind: str | None
    tenant_id: str | None
    method: str | None
    client: str | None
    on_behalf_of: str | None
    trace_id: str | None
    span_id: str | None
    parent: str | None
    kind: str
    client_request_id: str | None
    has_callers_span: bool | None
    questions: dict[str, _Question]

    def __init__(self, request_id: str, *, kind: str = "other") -> None:
        self.request_id = request_id
        self.kind = kind
        self.actor = self.actor_kind = self.tenant_id = None
        self.method = self.client = self.on_behalf_of = None
        self.trace_id = self.span_id = None
        self.parent = self.client_request_id = self.has_callers_span = None
        self.questions = _NO_QUESTIONS

    def __repr__(self) -> str:
        known = ((name, _peek(self, name)) for name in _FIELDS)
        shown = ", ".join(f"{n}={v!r}" for n, v in known if v is not None)
        return f"Context({shown})"


class _AskingContext(Context):
    """
    A context with anchors still to be asked for: their slots are empty.

    `__getattr__` runs for empty slots only. When all are answered the instance
    becomes a plain Context, which is read several times faster.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> str | None:
        question = self.questions.get(name)
        if question is None:
            # Answered by another thread just now; or no anchor at all.
            return cast("str | None", object.__getattribute__(self, name))
        answer = question.answer()
        if answer is None:
            return question.otherwise
        _settle(self, name, answer)
        return answer


_NO_QUESTIONS: Final[dict[str, _Question]] = {}
_FIELDS: Final = tuple(name for name in Context.__slots__ if name != "questions")


def _peek(cell: Context, name: str) -> Any:
    """
    Read a slot without asking anybody: None while it is empty.
    """
    try:
        return object.__getattribute__(cell, name)
    except AttributeError:
        return None


def _settle(cell: Context, name: str, value: str) -> None:
    """
    Write an anchor that may still have had a question open.
    """
    setattr(cell, name, value)
    if name not in cell.questions:
        return
    # Replaced, not changed: a reader of the old dict is not disturbed.
    cell.questions = {n: q for n, q in cell.questions.items() if n != name}
    if not cell.questions:
        cell.__class__ = Context


def _put_questions(
    cell: Context, request: object, asks: Mapping[str, Callable[[Any], object] | None]
) -> None:
    given = {name: ask for name, ask in asks.items() if ask}
    _leave_open(
        cell, {n: _Question(ask, request, _known(cell, n)) for n, ask in given.items()}
    )


def _known(cell: Context, name: str) -> str | None:
    question = cell.questions.get(name)
    return question.otherwise if question else cast("str | None", _peek(cell, name))


def _leave_open(cell: Context, questions: dict[str, _Question]) -> None:
    if not questions:
        return
    new = [name for name in questions if name not in cell.questions]
    cell.questions = {**cell.questions, **questions}
    cell.__class__ = _AskingContext
    for name in new:
        delattr(cell, name)


def _copy(parent: Context) -> Context:
    """
    Make a child's cell: what the parent knows, and what it still has to ask.
    """
    twin = Context(parent.request_id)
    questions = parent.questions
    for name in _FIELDS:
        if name not in questions:
            setattr(twin, name, _peek(parent, name))
    _leave_open(twin, questions)
    return twin


def _text(value: object) -> str | None:
    """
    Spell an anchor; what is empty is not given.
    """
    if value is None or type(value) is str:
        return value or None
    return str(value.value if isinstance(value, Enum) else value) or None


def _kind(value: object) -> str | None:
    return "scheduler" if value == "schedule" else _text(value)


def _hex(form: re.Pattern[str], value: str | None) -> str | None:
    return value if value is not None and form.fullmatch(value) else None


_CELL: ContextVar[Context | None] = ContextVar("fasten", default=None)


def current() -> Context | None:
    """
    Return the Context of the running code, or None outside any scope.
    """
    return _CELL.get()


def current_request_id() -> str | None:
    """
    Return the request id of the running code, or None outside any scope.
    """
    cell = _CELL.get()
    return None if cell is None else cell.request_id


# --- scopes -------------------------------------------------------------------------


class _Scope(AbstractContextManager[Context]):
    """
    Put a cell into the ContextVar and take it out again, whatever happens.
    """

    __slots__ = ("_cell", "_token")

    def __init__(self, cell: Context) -> None:
        self._cell = cell
        self._token: Token[Context | None] | None = None

    def __enter__(self) -> Context:
        _process.is_booting = False
        self._token = _CELL.set(self._cell)
        return self._cell

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        token, self._token = self._token, None
        if token is None:
            return
        try:
            _CELL.reset(token)
        except ValueError:
            # Left in another contextvars.Context than entered: a generator that was
            # moved between threads, as FastAPI does with sync `yield` dependencies.
            if _CELL.get() is self._cell:
                before = token.old_value
                _CELL.set(None if before is Token.MISSING else before)


class _Binding(_Scope):
    """
    A scope whose cell is made when it is entered: a copy of the one around it.
    """

    __slots__ = ("_fields", "_request_id")

    def __init__(self, request_id: object, fields: dict[str, str]) -> None:
        self._request_id, self._fields = request_id, fields
        self._token = None

    def __enter__(self) -> Context:
        self._cell = _bound(self._request_id, self._fields)
        return super().__enter__()


class LeftOut(Enum):
    """
    The type of `LEFT_OUT`, so that it differs from an id that is None.
    """

    LEFT_OUT = "left out"


LEFT_OUT: Final = LeftOut.LEFT_OUT
"""The default of `bind(request_id)`: nothing was said about the id."""

# Methods that are a wire of their own; under the others (ui, cli, sdk, agent_tool) a
# request stays what it was.
_WIRES: Final = frozenset(
    ("mqtt", "scheduler", "task", "grpc", "kafka", "nats", "amqp")
)


def bind(
    request_id: str | LeftOut | None = LEFT_OUT,
    *,
    actor: Text | None = None,
    actor_kind: str | None = None,
    tenant_id: Text | None = None,
    method: str | None = None,
    client: Text | None = None,
    on_behalf_of: Text | None = None,
    trace_id: str | None = None,
    span_id: str | None = None,
) -> AbstractContextManager[Context]:
    """
    Bind the ambient context for a with-block, which gets the Context.

    Inside another scope the rest is copied from there. An id is minted when
    *request_id* is None or unusable; left out beside other arguments, the id of the
    scope around is kept. An *actor* without *actor_kind* is a `user`. Kinds and
    methods are judged by `emit`, not here; trace ids are W3C hex, or ignored.
    """
    given: dict[str, str | None] = {
        "actor": _text(actor),
        "actor_kind": _kind(actor_kind),
        "tenant_id": _text(tenant_id),
        "method": _text(method),
        "client": _text(client),
        "on_behalf_of": _text(on_behalf_of),
        "trace_id": _hex(_TRACE_ID, trace_id),
        "span_id": _hex(_SPAN_ID, span_id),
    }
    fields = {name: value for name, value in given.items() if value is not None}
    return _Binding(request_id, fields)


def with_request_id(rid: str | None = None) -> AbstractContextManager[Context]:
    """
    Run a with-block under *rid*; a new id is minted when it is None or unusable.
    """
    return _Binding(rid, {})


def _bound(request_id: object, fields: dict[str, str]) -> Context:
    parent = _CELL.get()
    if request_id is LEFT_OUT and fields and parent is not None:
        rid = parent.request_id
    else:
        rid = _usable(request_id) or mint_request_id()
    cell = Context(rid) if parent is None else _copy(parent)
    if cell.request_id != rid:
        cell.parent, cell.request_id = cell.request_id, rid
    _write(cell, fields)
    return cell


def _usable(request_id: object) -> str | None:
    rid = accept(request_id)
    if rid is None and isinstance(request_id, UUID):
        return str(request_id)
    return rid


def _write(cell: Context, fields: Mapping[str, str]) -> None:
    if "actor" in fields:
        # The kind belonged to whoever was named before.
        cell.actor_kind = None
    if "span_id" in fields:
        cell.has_callers_span = None
    for name, value in fields.items():
        _settle(cell, name, value)
    method = fields.get("method")
    if method == "http":
        cell.kind = "http"
    elif method in _WIRES:
        cell.kind = "other"


def scope(
    request_id: object = None,
    *,
    kind: Literal["http", "other"] = "other",
    actor_kind: str | None = None,
    method: str | None = None,
    client: str | None = None,
    trace_id: str | None = None,
    span_id: str | None = None,
    client_request_id: str | None = None,
    request: object = None,
    ask_actor: Callable[[Any], object] | None = None,
    ask_tenant: Callable[[Any], object] | None = None,
    ask_client: Callable[[Any], object] | None = None,
) -> AbstractContextManager[Context]:
    """
    Open the scope of something that came in over a wire: what shims are made of.

    Unlike `bind` it takes over nobody's identity: of a scope around it only the id
    stays, as *parent* (a listener started inside a request must not work in that
    user's name). *request_id* is text off the wire; None or a bad one is minted.
    *ask_actor*, *ask_tenant* and *ask_client* are called with *request* when the
    value is first wanted, again while they return None, and never raise through;
    until *ask_client* answers, *client* holds.
    """
    cell = Context(_usable(request_id) or mint_request_id(), kind=kind)
    around = _CELL.get()
    if around is not None and around.request_id != cell.request_id:
        cell.parent = around.request_id
    cell.actor_kind, cell.method = actor_kind, method
    cell.client, cell.client_request_id = client, client_request_id
    if trace_id is not None:
        cell.trace_id = _hex(_TRACE_ID, trace_id)
        cell.span_id = _hex(_SPAN_ID, span_id)
        cell.has_callers_span = True
    if ask_actor or ask_tenant or ask_client:
        asks = {"actor": ask_actor, "tenant_id": ask_tenant, "client": ask_client}
        _put_questions(cell, request, asks)
    return _Scope(cell)


def ask(
    cell: Context,
    request: object,
    *,
    actor: Callable[[Any], object] | None = None,
    tenant: Callable[[Any], object] | None = None,
    client: Callable[[Any], object] | None = None,
) -> None:
    """
    Have callables name the caller of a scope that is open, as `scope` has them.

    An actor or tenant that is named already stays. Where a callable waits to be
    asked, the later one takes its place: it stands nearer to the application.
    """
    asks = {"actor": actor, "tenant_id": tenant, "client": client}
    for name in ("actor", "tenant_id"):
        if _peek(cell, name) is not None:
            del asks[name]
    _put_questions(cell, request, asks)


def resume(cell: Context) -> AbstractContextManager[Context]:
    """
    Run a with-block under a Context that exists already, as its scope goes on.
    """
    return _Scope(cell)


def identify(
    *,
    actor: Text | None = None,
    actor_kind: str | None = None,
    tenant_id: Text | None = None,
    on_behalf_of: Text | None = None,
    client: Text | None = None,
) -> None:
    """
    Name the caller for the rest of the current scope.

    Works from any thread or task that the scope reaches: they share its Context.

    Raises:
        NotInScope: there is no scope to name the caller of.
    """
    cell = _CELL.get()
    if cell is None:
        raise NotInScope(
            "identify() was called outside any request, message, job or task; "
            "install the transport's shim or open a scope with fasten.bind()"
        )
    given = {
        "actor": _text(actor),
        "actor_kind": _kind(actor_kind),
        "tenant_id": _text(tenant_id),
        "on_behalf_of": _text(on_behalf_of),
        "client": _text(client),
    }
    _write(cell, {name: value for name, value in given.items() if value is not None})


# --- what a row takes from it -------------------------------------------------------

Snapshot = tuple[
    str,
    str,
    str,
    str | None,
    str | None,
    str | None,
    str | None,
    str | None,
    str | None,
]
"""
(request_id, actor, actor_kind, tenant_id, method, client, on_behalf_of, trace_id,
span_id), with defaults for whoever is not named.
"""


def snapshot() -> Snapshot:
    """
    Return what a row takes from the context, defaults included.
    """
    cell = _CELL.get()
    if cell is None:
        trace, span = _from_sources(None) if _sources else (None, None)
        return sentinel(), "system", "system", None, None, None, None, trace, span
    actor, kind = cell.actor, cell.actor_kind
    if actor is None:
        if cell.kind == "http":
            actor, kind = "anonymous", kind or "user"
        else:
            actor, kind = "system", kind or "system"
    trace, span = cell.trace_id, cell.span_id
    if _sources and (trace is None or span is None or cell.has_callers_span):
        trace, span = _from_sources(cell)
    return (
        cell.request_id,
        actor,
        kind or "user",
        cell.tenant_id,
        cell.method,
        cell.client,
        cell.on_behalf_of,
        trace,
        span,
    )


def correlation() -> tuple[str, str | None, str | None, str | None]:
    """
    Return what a log line takes: (request_id, tenant_id, trace_id, span_id).

    Nobody is asked who the actor is: a line has none.
    """
    cell = _CELL.get()
    if cell is None:
        trace, span = _from_sources(None) if _sources else (None, None)
        return sentinel(), None, trace, span
    trace, span = cell.trace_id, cell.span_id
    if _sources and (trace is None or span is None or cell.has_callers_span):
        trace, span = _from_sources(cell)
    return cell.request_id, cell.tenant_id, trace, span


Source = Callable[[], Mapping[str, Any]]
"""Supplies `trace_id` and `span_id`, as lower hex, of the span that is running."""

_sources: tuple[Source, ...] = ()


def add_source(fn: Source) -> None:
    """
    Ask *fn* for trace_id and span_id at emit when the Context has none.

    The last one added is asked first. What it raises is counted, never raised.
    """
    global _sources
    _sources = (fn, *_sources)


def remove_source(fn: Source) -> None:
    """
    Stop asking *fn*; nothing happens if it is not asked.
    """
    global _sources
    _sources = tuple(source for source in _sources if source is not fn)


def _from_sources(cell: Context | None) -> tuple[str | None, str | None]:
    known = (None, None) if cell is None else (cell.trace_id, cell.span_id)
    is_fixed = known[1] is not None and cell is not None and not cell.has_callers_span
    asking = _ASKING.get()
    if _sources in asking:
        return known
    token = _ASKING.set((*asking, _sources))
    try:
        for source in _sources:
            trace, span = _ids_of(source)
            # A span of some other trace would be a false lead.
            if trace is not None and known[0] in (None, trace):
                return trace, known[1] if is_fixed else span or known[1]
    finally:
        _ASKING.reset(token)
    return known


def _ids_of(source: Source) -> tuple[str | None, str | None]:
    try:
        given = source()
        trace, span = given.get("trace_id"), given.get("span_id")
    except Exception:  # a source must not cost the row
        _process.failures["sources"] += 1
        return None, None
    if not isinstance(trace, str) or _TRACE_ID.fullmatch(trace) is None:
        return None, None
    is_span = isinstance(span, str) and _SPAN_ID.fullmatch(span) is not None
    return trace, span if is_span else None


# --- threads and executors ----------------------------------------------------------


def carry(fn: Callable[P, R]) -> Callable[P, R]:
    """
    Bind the present context to *fn*, for a thread, an executor or a callback.

    A plain function gets all context variables; of a coroutine function, which runs
    inside somebody's task, only fasten's own are set while it runs.
    """
    if is_async(fn):
        return cast("Callable[P, R]", _carry_async(cast("Any", fn)))
    frozen = copy_context()

    @wraps(fn)
    def carried(*args: P.args, **kwargs: P.kwargs) -> R:
        # One Context object cannot be entered twice at a time; its copy is O(1).
        return frozen.copy().run(fn, *args, **kwargs)

    return carried


def _carry_async(
    fn: Callable[P, Coroutine[Any, Any, R]],
) -> Callable[P, Coroutine[Any, Any, R]]:
    cell = _CELL.get()

    @wraps(fn)
    async def carried(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _CELL.set(cell)
        try:
            return await fn(*args, **kwargs)
        finally:
            _CELL.reset(token)

    return carried


def is_async(fn: object) -> bool:
    """
    Tell whether *fn* is a coroutine function, or an object that is called like one.
    """
    call = getattr(fn, "__call__", None)  # noqa: B004  (its code, not its presence)
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(call)


class ContextThreadPoolExecutor(ThreadPoolExecutor):
    """
    A ThreadPoolExecutor whose jobs run in the context of whoever submits them.
    """

    def submit(
        self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Future[R]:
        """
        Schedule *fn* as `ThreadPoolExecutor.submit` does, in the present context.
        """
        run = cast("Callable[..., R]", copy_context().run)
        return super().submit(run, fn, *args, **kwargs)


# --- carriers -----------------------------------------------------------------------


@runtime_checkable
class Carrier(Protocol):
    """
    A message's headers, as far as a shim needs them.
    """

    def get(self, key: str, /) -> str | bytes | None:
        """
        Return the header's value, or None.
        """

    def set(self, key: str, value: str, /) -> None:
        """
        Write the header.
        """


def inject(carrier: Carrier | MutableMapping[str, str], key: str = HEADER) -> None:
    """
    Write the current request id into an outgoing message; outside a scope, nothing.

    *carrier* is a Carrier, or a plain mapping of headers.
    """
    rid = current_request_id()
    if rid is None:
        return
    if hasattr(carrier, "set"):
        carrier.set(key, rid)
    else:
        carrier[key] = rid


def extract(carrier: Carrier | Mapping[str, Any], key: str = HEADER) -> str | None:
    """
    Return the request id that an incoming message carries, or None.

    Without a usable id under *key* (also in lower case) or `request_id`, the trace
    id of a valid `traceparent` is taken.
    """
    for name in (key, key.lower(), "request_id"):
        rid = accept(carrier.get(name))
        if rid is not None:
            return rid
    ids = parse_traceparent(carrier.get("traceparent"))
    return None if ids is None else ids[0]


# --- fasten's own work --------------------------------------------------------------

_SUPPRESSED: ContextVar[bool] = ContextVar("fasten_suppressed", default=False)


is_suppressed: Final[Callable[[], bool]] = _SUPPRESSED.get
"""Tell whether fasten itself is at work here, so that its processors drop events."""


@contextmanager
def suppressed() -> Iterator[None]:
    """
    Mark a with-block as fasten's own work: what it logs is not recorded.
    """
    token = _SUPPRESSED.set(True)
    try:
        yield
    finally:
        _SUPPRESSED.reset(token)
