# SPDX-License-Identifier: Apache-2.0
"""
The engine: takes rows from callers, and sees to it that they are stored.

Instance first: `Engine` is a plain object whose clock, ids and settings are given
to it. The module's functions delegate to the default one, which `init()` makes.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import json
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Final,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
)
from uuid import UUID

from fasten import codes, context, processors, spool
from fasten.codes import ActorKind, Method, Outcome, Registry, Severity
from fasten.context import Snapshot, snapshot
from fasten.delivery import Delivery
from fasten.errors import (
    AuditStoreError,
    FastenError,
    InvalidAnchor,
    InvalidQuery,
    NotInitialized,
    QueueFull,
    UnknownCode,
)
from fasten.outbox import Held, Outbox, refuse_awaited
from fasten.records import Author, own_row
from fasten.redact import Redactor
from fasten.rows import (
    API_COLUMNS,
    AUDIT_COLUMNS,
    Page,
    Pending,
    Query,
    UlidMinter,
    format_timestamp,
    quote,
)
from fasten.settings import Dsn, Settings, parse_dsn
from fasten.streams import Draft, LineWriter, Ring, Row, Stream

if TYPE_CHECKING:
    from fasten.repository import AuditRepository, StreamRepository

__all__ = [
    "Engine",
    "Queue",
    "aemit",
    "aflush",
    "aquery",
    "close",
    "default",
    "emit",
    "flush",
    "health",
    "init",
    "query",
    "record_api",
    "stats",
    "trail",
]

logger = logging.getLogger("fasten")

EXIT_S: Final = 2.0
_OWN_BYTES: Final = 1024 * 1024
_API_FIELDS: Final = frozenset(("shape", *API_COLUMNS))


class Queue(Protocol):
    """
    What `emit` hands rows to: the spool, or a test's trail.
    """

    def append(self, payload: bytes, row: tuple[Any, ...]) -> int:
        """
        Take a row; return its index, 0 when there is no room.
        """


# One table per anchor: enum member or string in, plain string out. A plain string is
# what drivers bind fastest, and a StrEnum member hashes as its value.
_OUTCOMES: Final = {o.value: o.value for o in Outcome}
_SEVERITIES: Final = {s.value: s.value for s in Severity}
_METHODS: Final = {m.value: m.value for m in Method}
_KINDS: Final = {k.value: k.value for k in ActorKind} | {"schedule": "scheduler"}


class Engine:
    """
    One running fasten: a spool, its drainer, three streams.

    *queue* replaces spool and stores altogether, *outbox* takes the rows that are
    given a connection: what `testing.capture` uses.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        registry: Registry = codes.registry,
        clock_ns: Callable[[], int] = time.time_ns,
        mint: Callable[[int], str] | None = None,
        queue: Queue | None = None,
        outbox: Callable[[tuple[Any, ...]], object] | None = None,
    ) -> None:
        self.settings = settings
        self.registry = registry
        self._clock_ns = clock_ns
        self._ulids = UlidMinter()
        self._mint: Callable[[int], str] = mint or self._ulids
        self._redactor = Redactor(
            settings.redact_keys, settings.redact_replacement, settings.max_detail_bytes
        )
        # fasten's own records name up to 1,000 ids: no cap may cut evidence.
        self._own_redactor = Redactor(settings.redact_keys, max_bytes=_OWN_BYTES)
        self._is_closed = False
        self.mistakes = 0
        self.lines = LineWriter() if settings.stdout else None
        self.delivery = None if queue is not None else Delivery(self)
        self._queue: Queue = queue or self.delivery.spool  # type: ignore[union-attr]
        self._outbox = outbox
        self._drainer = self.delivery.drainer if self.delivery else None
        self._raises = settings.audit_store_failure_strategy == "raise"
        self.audit_ring = Ring(settings.queue_capacity)
        self.sys = self._stream("sys", settings.sys_ring_size)
        self.api = self._stream("api", settings.api_ring_size)

    # -- audit ----------------------------------------------------------------------

    def emit(self, code: str, target: str | int | UUID, **anchors: Any) -> str:
        """
        Record with this engine what `fasten.emit` records with the default one.
        """
        return emit(code, target, engine=self, **anchors)

    def _enqueue(self, row: tuple[Any, ...]) -> None:
        """
        Queue a row that does not come through `emit`.
        """
        payload = spool.pack(row)
        if not self._queue.append(payload, row):
            self._overflow(payload, row)
        if self._drainer is not None:
            self._drainer.wake()

    def _entry(self, code: object, detail: object) -> Any:
        """
        Return what a caller may emit under *code*, or say why not.
        """
        entry = self.registry.entries.get(code) if isinstance(code, str) else None
        if entry is None:
            raise self.registry.unknown(code)
        if entry.domain == "fasten":
            raise UnknownCode(
                f"{entry.code} is fasten's own and cannot be emitted; register a code "
                "of your own for what happened"
            )
        meta = self.registry.meta(entry.code)
        misfits = meta.check_detail({} if detail is None else detail)
        if misfits:
            raise InvalidAnchor(f"detail of {entry.code}: {'; '.join(misfits)}")
        return entry

    def _emit_leniently(
        self,
        error: FastenError,
        code: object,
        target: object,
        actor: object,
        detail: object,
        *texts: object,
    ) -> str:
        """
        Store a caller's mistake as a marked row: FASTEN_STRICT is off.
        """
        self.mistakes += 1
        name = code if isinstance(code, str) and codes.is_code(code) else "INVALID_CODE"
        entry = self.registry.entries.get(name)
        if entry is None or entry.domain == "fasten":
            # Not even a mistake may pass for a record of fasten's own.
            entry = codes.entry_for(name)
        rid, who, kind, tenant, _, origin, behalf, trace, span = snapshot()
        anchor, optional = self._redactor.anchor, self._optional_text
        ns = self._clock_ns()
        id_ = self._mint(ns)
        marked: dict[str, Any] = {
            "_mistake": str(error),
            "given": [text for text in texts if text is not None],
        }
        if detail is not None:
            marked["detail"] = detail
        row = Pending(
            id=id_,
            timestamp_us=ns // 1000,
            code=entry.code,
            action=entry.action,
            severity=entry.severity,
            category=entry.category,
            domain=entry.domain,
            retention_class=entry.retention_class,
            outcome="unknown",
            actor=anchor(_text(actor) or who),
            actor_kind="user" if _text(actor) else kind,
            on_behalf_of=optional(behalf),
            tenant_id=optional(tenant) or self.settings.tenant_id,
            client=optional(origin),
            target=anchor(_text(target) or "unknown"),
            method="sdk",
            reason=None,
            request_id=rid,
            trace_id=trace,
            span_id=span,
            detail=self._redactor.encode(marked),
        )
        self._enqueue(tuple(row))
        return id_

    def emit_own(
        self, code: str, target: str, detail: Mapping[str, Any], **anchors: str | None
    ) -> str:
        """
        Record something that fasten itself did; such rows have domain `fasten`.

        *anchors* replace what stands for fasten itself, as in actor="auditor".
        """
        row = Pending(*self.own_row(code, target, detail))
        anchor = self._redactor.anchor
        given: dict[str, Any] = {k: v and anchor(v) for k, v in anchors.items()}
        self._enqueue(tuple(row._replace(**given)))
        return row.id

    def own_row(
        self, code: str, target: str, detail: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """
        Make a row of fasten's own, in `Pending` order.
        """
        self.registry.ensure()  # an operator's command has had no `init`
        ns = self._clock_ns()
        row = own_row(
            self.registry.entries[code],
            target,
            self._own_redactor.encode(dict(detail)),
            id=self._mint(ns),
            timestamp_us=ns // 1000,
            request_id=context.current_request_id() or context.sentinel(),
            author=Author(tenant_id=self.settings.tenant_id),
        )
        return tuple(row)

    def stored(self, rows: Sequence[tuple[Any, ...]], *, is_sealed: bool) -> None:
        """
        Print rows that have arrived; keep them in the ring where there is no store.
        """
        entries = self.registry.entries
        lines = self.lines if "audit" in self.settings.stdout else None
        for row in rows:
            if not is_sealed:
                self.audit_ring.append(_audit_dict(row))
            if lines is not None:
                entry = entries.get(row[_CODE])
                with_detail = entry is None or not entry.pii_in_detail
                lines.put(audit_line(row, with_detail=with_detail))

    def checkpointed(self, notes: Sequence[str]) -> None:
        """
        Print checkpoints, so that the log pipeline carries them off this host.
        """
        if self.lines is not None and "audit" in self.settings.stdout:
            for note in notes:
                self.lines.put({"shape": "checkpoint", "note": note})

    def forget(self, is_meant: Callable[[Mapping[str, Any]], bool]) -> None:
        """
        Let go of the rows in memory that *is_meant* picks: somebody was erased.
        """
        for ring in (self.audit_ring, self.sys.ring, self.api.ring):
            ring.forget(is_meant)

    def _refuse_closed(self) -> None:
        raise NotInitialized(
            "fasten is closed; call fasten.init() again before emitting"
        )

    def _overflow(self, payload: bytes, row: tuple[Any, ...]) -> None:
        """
        Do with a row that found no room what FASTEN_ON_FULL says.
        """
        policy = self.settings.on_full
        if policy.kind == "raise":
            if self.delivery is not None:
                self.delivery.losses.refuse()
            raise QueueFull(
                f"no room for {row[2]}: spool and queue are full and FASTEN_ON_FULL is "
                "raise; look at fasten.health() and at the store"
            )
        if policy.kind == "block" and self.delivery is not None:
            # The drainer itself, in a logging handler, would wait for itself.
            is_free = not self.delivery.drainer.is_this_thread
            deadline = time.monotonic() + policy.block_s * is_free
            while time.monotonic() < deadline:
                self.delivery.drainer.wake()
                time.sleep(0.001)
                if self._queue.append(payload, row):
                    return
        if self.delivery is not None:
            self.delivery.losses.drop()

    def _store_now(self, row: tuple[Any, ...], connection: Any) -> str:
        """
        Hand the row to the drainer and wait for the store's answer.
        """
        if connection is not None:
            return self._store_within(row, connection)
        delivery = self.delivery
        id_ = str(row[0])
        if delivery is None or not delivery.has_store:
            self._enqueue(row)
            return id_
        fault = delivery.store_now(row)
        if fault is not None:
            raise AuditStoreError(
                f"the row was not stored: {fault.message}"
                + ("; it may exist, look it up by id" if fault.is_ambiguous else ""),
                id=id_,
                ambiguous=fault.is_ambiguous,
            )
        return id_

    def _store_within(self, row: tuple[Any, ...], connection: Any) -> str:
        """
        Write the row into the caller's own transaction.
        """
        id_ = str(row[0])
        if isinstance(connection, Held):
            connection.row = row
            return id_
        try:
            refuse_awaited(connection)
            if self._outbox is not None:
                self._outbox(row)
            else:
                self.outbox.store(row, connection)
        except TypeError as error:
            if self.settings.strict:
                raise
            self._enqueue_marked(row, error)
        return id_

    @property
    def outbox(self) -> Outbox:
        """
        Return what writes rows into callers' transactions.

        Raises:
            AuditStoreError: there is no store that they could be moved to.
        """
        found = self.delivery.outbox if self.delivery else None
        if found is None:
            raise AuditStoreError(
                "emit(connection=) needs a store; set FASTEN_AUDIT_DSN (and "
                "FASTEN_OUTBOX_DSN where the transactions are in another database)"
            )
        return found

    def _enqueue_marked(self, row: tuple[Any, ...], error: Exception) -> None:
        """
        Store a row whose connection was a mistake: FASTEN_STRICT is off.
        """
        self.mistakes += 1
        detail = {"_mistake": str(error), "detail": json.loads(row[-1])}
        self._enqueue((*row[:-1], self._redactor.encode(detail)))

    async def aemit(self, code: str, target: str | int | UUID, **anchors: Any) -> str:
        """
        Record as `emit` does, through connections that must be awaited.

        Raises:
            FastenError: whatever `emit` raises.
        """
        connection = anchors.pop("connection", None)
        if connection is None:
            # With `on_failure: raise` it waits for the store: not in the event loop.
            entry = self.registry.entries.get(code)
            waits = self._raises or (entry is not None and entry.on_failure == "raise")
            if waits:
                return await asyncio.to_thread(self.emit, code, target, **anchors)
            return self.emit(code, target, **anchors)
        held = Held(connection)
        id_ = self.emit(code, target, connection=held, **anchors)
        if held.row is None:
            return id_
        if self._outbox is not None:
            self._outbox(held.row)
            return id_
        try:
            await self.outbox.astore(held.row, connection)
        except TypeError as error:
            if self.settings.strict:
                raise
            self._enqueue_marked(held.row, error)
        return id_

    # -- sys and api ------------------------------------------------------------------

    def _stream(self, name: Literal["sys", "api"], size: int) -> Stream:
        queue = self.delivery.queues.get(name) if self.delivery else None
        lines = self.lines if name in self.settings.stdout else None
        return Stream(name, Ring(size), lines=lines, queue=queue)

    @property
    def sink(self) -> processors.Sink:
        """
        Return where log lines go.
        """
        settings = self.settings
        return processors.Sink(
            # A line to the ring alone is spared a step.
            record=self._record_sys if self.sys.queue else self.sys.record,
            clean=self._redactor.clean,
            tidy=self._redactor.tidy,
            service_id=settings.service_id,
            source_node_id=settings.node_id,
            tenant_id=settings.tenant_id,
            clock_ns=self._clock_ns,
        )

    def _record_sys(self, row: Row | Draft, *, is_printed: bool = True) -> None:
        self.sys.record(row, is_printed=is_printed)
        if self.sys.queue is not None:
            self._wake_streams()

    def record_api(self, **fields: Any) -> None:
        """
        Take one HTTP request, as the service answered it; never raise.
        """
        try:
            found = snapshot()
            rid = context.accept(fields.pop("request_id", None)) or found[0]
            extra = fields.keys() - _API_FIELDS
            if extra:
                # Cleaned now: what a caller hands over may change until it is read.
                given = {name: fields.pop(name) for name in sorted(extra)}
                fields["extra"] = self._redactor.clean(given)
            at_us = self._clock_ns() // 1000
            self.api.record((self._api_row, rid, found, at_us, fields))
            if self.api.queue is not None:
                self._wake_streams()
        except Exception:  # a transport's mistake must not become the caller's 500
            self.mistakes += 1

    def _api_row(
        self, rid: str, found: Snapshot, at_us: int, fields: Mapping[str, Any]
    ) -> Row:
        settings, text, get = self.settings, self._optional_text, fields.get
        row = {
            "shape": "api",
            "method": text(get("method")) or "",
            "path": text(get("path")) or "",
            "route": text(get("route")),
            "status": get("status"),
            "duration_ms": get("duration_ms"),
            "request_id": rid,
            "service_id": settings.service_id,
            "source_node_id": settings.node_id,
            "tenant_id": text(get("tenant_id") or found[3]) or settings.tenant_id,
            "actor": text(get("actor") or found[1]),
            "client": text(get("client") or found[5]),
            "bytes": get("bytes"),
            "complete": bool(get("complete", True)),
            "timestamp": format_timestamp(at_us),
        }
        if found[7] is not None:
            row["trace_id"], row["span_id"] = found[7:]
        return {**row, **get("extra", {})}

    def _optional_text(self, value: object) -> str | None:
        return None if value is None else self._redactor.anchor(str(value))

    def _wake_streams(self) -> None:
        if self.delivery is not None:
            self.delivery.wake_streams()

    # -- reading --------------------------------------------------------------------

    def query(
        self,
        stream: str = "audit",
        *,
        order: str = "desc",
        limit: int = 100,
        cursor: str | None = None,
        **filters: Any,
    ) -> Page:
        """
        Return a page of one stream; *filters* are the reader's.

        Raises:
            InvalidQuery: a filter's name or value is unusable.
        """
        given = {"order": order, "limit": limit, "cursor": cursor, **filters}
        return self.answer(Query.parse(stream, given, now_us=self.now_us()))

    def now_us(self) -> int:
        """
        Return the engine's time, in microseconds since 1970: what `since=2h` is from.
        """
        return self._clock_ns() // 1000

    def answer(self, query: Query) -> Page:
        """
        Return the page that *query* asks for.

        Raises:
            AuditStoreError: the store cannot be read now.
        """
        if query.stream == "audit":
            return self._answer_audit(query)
        stream = self.sys if query.stream == "sys" else self.api
        delivery = self.delivery
        if delivery is None or query.stream not in delivery.queues:
            return stream.ring.query(query)
        return delivery.read(
            lambda: delivery.stream_store(query.stream).query(query), query.stream
        )

    def _answer_audit(self, query: Query) -> Page:
        delivery = self.delivery
        if delivery is None or not delivery.has_store:
            return self.audit_ring.query(query)
        return delivery.read(lambda: delivery.audit.query(query), "audit")

    def trail(self, request_id: str) -> list[Any]:
        """
        Return everything recorded under one request id, oldest first.
        """
        rows: list[Any] = []
        for stream in ("audit", "sys", "api"):
            cursor: str | None = None
            while True:
                page = self.query(
                    stream,
                    limit=1000,
                    cursor=cursor,
                    order="asc",
                    request_id=request_id,
                )
                rows += page.rows
                cursor = page.next
                if cursor is None:
                    break
        return sorted(rows, key=lambda row: row.timestamp)

    # -- life --------------------------------------------------------------------------

    def flush(self, timeout: float = 5.0) -> bool:
        """
        Wait until every row emitted before the call is stored; seconds at the most.
        """
        return True if self.delivery is None else self.delivery.flush(timeout)

    def close(self, timeout: float = 2.0) -> bool:
        """
        Deliver what waits, within *timeout* seconds, and stop.

        What is left stays in the spool. Calling it again does nothing.
        """
        if self._is_closed:
            return True
        self._is_closed = True
        return self._shut(timeout)

    def _shut(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        done = True if self.delivery is None else self.delivery.close(timeout)
        if self.lines is not None:
            self.lines.close(max(0.1, min(0.5, deadline - time.monotonic())))
        return done

    def at_exit(self) -> None:
        """
        Close as the interpreter goes; rows emitted later still reach the spool.
        """
        if self._is_closed:
            return
        self._shut(EXIT_S)
        if self.delivery is not None:
            self.delivery.spool.outlast_threads()

    def after_fork_in_child(self) -> None:
        """
        Start over in a forked child: the parent owns its rows, threads and files.
        """
        self._ulids.reseed()
        for part in (self.lines, self.sys, self.api):
            if part is not None:
                part.after_fork_in_child()
        if self.delivery is not None:
            self.delivery.after_fork_in_child()

    def stats(self) -> dict[str, Any]:
        """
        Return the counters.
        """
        if self.delivery is None:
            return {}
        return {**self.delivery.stats(), "mistakes": self.mistakes}

    def health(self) -> dict[str, Any]:
        """
        Return `state` (ok, degraded, spool_only, failing) and what explains it.
        """
        if self.delivery is None:
            return {"state": "ok", "reasons": [], "spool": "memory"}
        return self.delivery.health()


def _spell(name: str, value: object) -> str:
    """
    Spell an anchor's value as text.
    """
    text = _text(value)
    if text:
        return text
    raise InvalidAnchor(
        f"{name}={_shown(value)} is not a name; pass a non-empty str, an int or a UUID"
    )


def _text(value: object) -> str | None:
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (int, UUID)) and not isinstance(value, bool):
        return str(value)
    return None


def _shown(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except Exception:  # a caller's own __repr__: the error is about something else
        return f"<{type(value).__name__}>"


def _choose(name: str, value: object, known: Mapping[str, str]) -> str:
    found = known.get(value) if isinstance(value, str) else None
    if found is None:
        allowed = " ".join(sorted(set(known.values())))
        raise InvalidAnchor(f"{name}={_shown(value)} is none of: {allowed}")
    return found


_CODE: Final = AUDIT_COLUMNS.index("code")
_DETAIL: Final = AUDIT_COLUMNS.index("detail")
_SALT: Final = AUDIT_COLUMNS.index("salt")
_PREFIXES: Final = tuple(f'"{name}":' for name in AUDIT_COLUMNS)


def audit_line(
    row: Sequence[Any], *, with_detail: bool = True, with_salt: bool = False
) -> str:
    """
    Spell a row, in the order of AUDIT_COLUMNS, as one NDJSON line.

    The salt is what keeps the digest of an erased value from being guessed: it goes
    into an export only.
    """
    parts = ['{"shape":"audit"']
    for index, value in enumerate(row):
        if value is None or (index == _SALT and not with_salt):
            text = "null"
        elif index == _DETAIL:
            text = value if with_detail else "null"
        else:
            text = quote(value) if isinstance(value, str) else str(value)
        parts.append(_PREFIXES[index] + text)
    return ",".join(parts) + "}"


def _audit_dict(row: Sequence[Any]) -> dict[str, Any]:
    values = dict(zip(AUDIT_COLUMNS, row, strict=True))
    values["detail"] = json.loads(values["detail"]) if values["detail"] else None
    return values


# --- the default engine -----------------------------------------------------------

_default: Engine | None = None
_starting: Final = threading.RLock()


def default() -> Engine:
    """
    Return the engine that `init()` made.

    Raises:
        NotInitialized: there is none.
    """
    if _default is None:
        raise NotInitialized("call fasten.init() before the first emit")
    return _default


def install(engine: Engine | None, *, takes_early: bool = True) -> Engine | None:
    """
    Make *engine* the default one; return the one before.

    *takes_early* says whether it gets the log lines that waited for an engine.
    """
    global _default
    before, _default = _default, engine
    processors.bind_sink(engine.sink if engine else None, takes_early=takes_early)
    if engine is not None:
        context.set_service(engine.settings.service_id)
        context.trust_request_ids(engine.settings.trust_request_id)
    return before


def init(**settings: Any) -> Engine:
    """
    Start fasten from FASTEN_* variables; keyword arguments win over them.

    Returns at once, whatever state the store is in: that is `health()`. Called
    again, it flushes and replaces the engine.

    Raises:
        SettingsError: names every variable that is missing or unusable.
        InvalidCodes: a codes file has mistakes.
    """
    with _starting:
        try:
            parsed = Settings.from_env(
                _environ,
                {**_given, **settings},
                hostname=socket.gethostname(),
                cwd=Path.cwd(),
            )
        finally:
            # A traceback may print this frame's locals, and a DSN is among them.
            settings.clear()
        if _stand_in is not None:
            return _stand_in(parsed)
        engine = _make(parsed)
        before = install(engine)
        if before is not None:
            before.close()
    return engine


_stand_in: Callable[[Settings], Engine] | None = None
_environ: Mapping[str, str] = os.environ
_given: Mapping[str, Any] = {}


def stand_in(
    make: Callable[[Settings], Engine] | None,
) -> Callable[[Settings], Engine] | None:
    """
    Let `init()` call *make* instead of opening stores; return what it called before.

    For `fasten.testing`.
    """
    global _stand_in
    before, _stand_in = _stand_in, make
    return before


def read_from(
    environ: Mapping[str, str], given: Mapping[str, Any]
) -> tuple[Mapping[str, str], Mapping[str, Any]]:
    """
    Let `init()` read *environ*, and *given* as its own arguments; return what it read.

    For `fasten.testing`.
    """
    global _environ, _given
    before = _environ, _given
    _environ, _given = environ, given
    return before


def current() -> Engine | None:
    """
    Return the default engine, or None.
    """
    return _default


def prepare(settings: Settings) -> None:
    """
    Tell what is odd about *settings*, and define the codes that they name.

    Raises:
        InvalidCodes: a codes file has mistakes.
    """
    for warning in settings.warnings:
        logger.warning("fasten: %s", warning)
    paths = settings.codes if settings.codes is not None else codes.discover(Path.cwd())
    codes.registry.ensure()
    codes.registry.configure(paths)


def _make(settings: Settings) -> Engine:
    prepare(settings)
    engine = Engine(settings)
    if settings.log:
        processors.insert_into_configured()
    else:
        processors.remove_from_configured()
    _survive(engine)
    if engine.delivery is not None:
        engine.delivery.start()
    return engine


def _survive(engine: Engine) -> None:
    """
    Arrange for exit and fork, without keeping the engine alive.
    """
    reference = weakref.ref(engine)

    def at_exit() -> None:
        if (alive := reference()) is not None:
            alive.at_exit()

    def delivery() -> Delivery | None:
        alive = reference()
        return alive.delivery if alive is not None else None

    def before() -> None:
        if (alive := delivery()) is not None:
            alive.before_fork()

    def in_parent() -> None:
        if (alive := delivery()) is not None:
            alive.after_fork_in_parent()

    def in_child() -> None:
        if (alive := reference()) is not None:
            alive.after_fork_in_child()

    atexit.register(at_exit)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=before, after_in_parent=in_parent, after_in_child=in_child
        )


P = ParamSpec("P")
R = TypeVar("R")


def _of_default(method: Callable[Concatenate[Engine, P], R]) -> Callable[P, R]:
    """
    Make the module's function of an Engine's method: the same on the default engine.
    """

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return method(_default or _late(), *args, **kwargs)

    signature = inspect.signature(method)
    without_self = list(signature.parameters.values())[1:]
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=without_self
    )
    call.__qualname__ = method.__name__
    return call


def _late() -> Engine:
    """
    Answer a call before init(): an error, or a start where nothing may raise.
    """
    if os.environ.get("FASTEN_STRICT", "").lower() in ("off", "false", "0", "no"):
        return init()
    return default()


# The hot path: one function, written out. What it calls is measured in
# benchmarks/; a helper more costs a tenth of it.
def emit(  # noqa: PLR0915  (see above)
    code: str,
    target: str | int | UUID,
    *,
    actor: str | int | UUID | None = None,
    actor_kind: str | None = None,
    outcome: str = "success",
    method: str | None = None,
    severity: str | None = None,
    detail: Any = None,
    tenant_id: str | None = None,
    on_behalf_of: str | None = None,
    reason: str | None = None,
    client: str | None = None,
    connection: Any = None,
    engine: Engine | None = None,
) -> str:
    """
    Record that *actor* did *code* to *target*; return the row's id.

    The ambient context fills what is not given; *engine* is the default one where it
    is not. Writes to the spool only: no network, no database, but for codes with
    `on_failure: raise` and for a *connection*.

    Raises:
        UnknownCode: nothing registered *code*.
        InvalidAnchor: an anchor is missing, or of the wrong kind, or *detail* is not
            what its code declares.
        NotInitialized: `init()` was not called, or `close()` was.
        AuditStoreError: the row had to be stored at once, and was not.
    """
    self = engine or _default or _late()
    try:
        entry = self.registry.entries.get(code)
        if entry is None or entry.reserved:
            entry = self._entry(code, detail)
        if self._is_closed:
            self._refuse_closed()
        (rid, who, kind, tenant, how, origin, behalf, trace, span) = snapshot()
        anchor = self._redactor.anchor
        if type(target) is not str or not target:
            target = _spell("target", target)
        if actor is not None:
            if type(actor) is not str or not actor:
                actor = _spell("actor", actor)
            who, kind = actor, "system" if actor == "system" else "user"
        if actor_kind is not None:
            kind = _choose("actor_kind", actor_kind, _KINDS)
        if outcome != "success":
            outcome = _choose("outcome", outcome, _OUTCOMES)
        if method is not None:
            how = method
        how = "sdk" if how is None else _choose("method", how, _METHODS)
        if tenant_id is not None:
            tenant = _spell("tenant_id", tenant_id)
        elif tenant is None:
            tenant = self.settings.tenant_id
        if on_behalf_of is not None:
            behalf = _spell("on_behalf_of", on_behalf_of)
        if client is not None:
            origin = _spell("client", client)
        if reason is not None:
            reason = anchor(_spell("reason", reason))
        if severity is not None:
            entry = entry.at(_choose("severity", severity, _SEVERITIES))
    except FastenError as error:
        if self.settings.strict or self._is_closed:
            raise
        return self._emit_leniently(
            error, code, target, actor, detail, reason, outcome, method
        )
    target, who = anchor(target), anchor(who)
    tenant = None if tenant is None else anchor(tenant)
    behalf = None if behalf is None else anchor(behalf)
    origin = None if origin is None else anchor(origin)
    text = "{}" if detail is None else self._redactor.encode(detail)
    ns = self._clock_ns()
    id_, us = self._mint(ns), ns // 1000
    # fmt: off
    (code, action, level, category, domain, class_, on_failure, _, packed,
     _) = entry
    row = (
        id_, us, code, action, level, category, domain, class_, outcome, who, kind,
        behalf, tenant, origin, target, how, reason, rid, trace, span, text,
    )
    # fmt: on
    if connection is not None or on_failure == "raise" or self._raises:
        return self._store_now(row, connection)
    # What spool.pack(row) gives, at a fifth of its cost: a test holds them equal.
    # fmt: off
    payload = "\0".join((
        id_, str(us), packed, outcome, who, kind, behalf or "", tenant or "",
        origin or "", target, how, reason or "", rid, trace or "", span or "", text,
    )).encode()
    # fmt: on
    if not self._queue.append(payload, row):
        self._overflow(payload, row)
    drainer = self._drainer
    if drainer is not None and (drainer.is_asleep or not drainer.is_running):
        drainer.wake()
    return id_


trail = _of_default(Engine.trail)
flush = _of_default(Engine.flush)
stats = _of_default(Engine.stats)
health = _of_default(Engine.health)


async def aemit(code: str, target: str | int | UUID, **anchors: Any) -> str:
    """
    Record as `emit` does, through connections that must be awaited.

    Raises:
        FastenError: whatever `emit` raises.
    """
    return await (_default or _late()).aemit(code, target, **anchors)


def query(stream: str = "audit", *, dsn: str | None = None, **filters: Any) -> Page:
    """
    Return a page of one stream of the default engine, or of the store at *dsn*.

    Raises:
        InvalidQuery: a filter's name or value is unusable.
        AuditStoreError: the store cannot be read now.
    """
    if dsn is None:
        return default().query(stream, **filters)
    return read_store(
        parse_dsn(dsn, cwd=Path.cwd(), table=f"{stream}_log"), stream, filters
    )


def read_store(dsn: Dsn, stream: str, filters: Mapping[str, Any]) -> Page:
    """
    Return a page of the store at *dsn*, with no engine running.

    Raises:
        InvalidQuery: a filter's name or value is unusable.
        AuditStoreError: the store cannot be read now.
    """
    from fasten.repository import AuditRepository, Database, StreamRepository

    asked = Query.parse(stream, filters, now_us=time.time_ns() // 1000)
    database = Database(dsn)
    repository: AuditRepository | StreamRepository = (
        AuditRepository(dsn, database)
        if stream == "audit"
        else StreamRepository(dsn, stream, database)  # type: ignore[arg-type]
    )
    try:
        return repository.query(asked)
    except InvalidQuery:
        raise
    except FileNotFoundError as error:
        raise AuditStoreError(str(error)) from None
    except Exception as error:  # the driver's: told without its DSN
        problem = database.problem(error)
        raise AuditStoreError(f"the store cannot be read: {problem.message}") from None
    finally:
        database.release()


async def aquery(stream: str = "audit", **filters: Any) -> Page:
    """
    Return what `query` returns, without blocking the event loop.
    """
    return await asyncio.to_thread(query, stream, **filters)


def record_api(**fields: Any) -> None:
    """
    Take one HTTP request as its transport saw it; never raise.
    """
    if _default is not None:
        _default.record_api(**fields)


async def aflush(timeout: float = 5.0) -> bool:  # noqa: ASYNC109  (as flush)
    """
    Wait as `flush` does, without blocking the event loop.
    """
    return await asyncio.to_thread(flush, timeout)


def close(timeout: float = 2.0) -> bool:
    """
    Deliver what waits, within *timeout* seconds, and stop; false when rows stay.
    """
    return True if _default is None else _default.close(timeout)
