# SPDX-License-Identifier: Apache-2.0
"""
The rows of the three streams, as values: columns, time, ids, JSON and queries.

What a row means to a chain lives in `chain`; how it is stored, in `repository`.
"""

from __future__ import annotations

import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from enum import Enum
from itertools import product
from json.encoder import encode_basestring
from typing import Any, Final, Literal, NamedTuple, get_args

import attrs

from fasten.codes import ActorKind, Method, Outcome, RetentionClass, Severity
from fasten.errors import InvalidQuery
from fasten.settings import parse_duration

__all__ = [
    "ALL_TENANTS",
    "API_COLUMNS",
    "AUDIT_COLUMNS",
    "END",
    "FILTERS",
    "MAX_LIMIT",
    "SHORT_FORMS",
    "SYS_COLUMNS",
    "WIRE_VERSION",
    "ApiRow",
    "AuditRow",
    "Everyone",
    "Page",
    "Pending",
    "Query",
    "SysRow",
    "UlidMinter",
    "canonical_json",
    "canonical_number",
    "code_units",
    "decode_cursor",
    "encode_cursor",
    "format_timestamp",
    "parse_timestamp",
    "quote",
    "ulid_ms",
    "ulid_stamp",
]

WIRE_VERSION: Final = "2"

AUDIT_COLUMNS: Final = (
    "wire_version",
    "id",
    "origin_id",
    "timestamp",
    "monotonic_seq",
    "code",
    "action",
    "severity",
    "outcome",
    "actor",
    "actor_kind",
    "on_behalf_of",
    "service_id",
    "source_node_id",
    "tenant_id",
    "client",
    "target",
    "category",
    "domain",
    "method",
    "reason",
    "request_id",
    "trace_id",
    "span_id",
    "detail",
    "retention_class",
    "stored_at",
    "shipped_at",
    "canonical_form_id",
    "prev_hash",
    "hash",
    "salt",
    "commitment",
)
"""The wire keys of an audit row, in order; also the columns of its table."""

SYS_COLUMNS: Final = (
    "level",
    "event",
    "request_id",
    "service_id",
    "source_node_id",
    "tenant_id",
    "timestamp",
    "logger",
)
API_COLUMNS: Final = (
    "method",
    "path",
    "route",
    "status",
    "duration_ms",
    "request_id",
    "service_id",
    "source_node_id",
    "tenant_id",
    "actor",
    "client",
    "bytes",
    "complete",
    "timestamp",
)


class Pending(NamedTuple):
    """
    A row as `emit` leaves it: everything but what the store assigns.

    *timestamp_us* is microseconds since 1970; *detail* is canonical JSON text.
    A plain tuple in this order is what the hot path builds, caches and spools.
    """

    id: str
    timestamp_us: int
    code: str
    action: str
    severity: str
    category: str
    domain: str
    retention_class: str
    outcome: str
    actor: str
    actor_kind: str
    on_behalf_of: str | None
    tenant_id: str | None
    client: str | None
    target: str
    method: str
    reason: str | None
    request_id: str
    trace_id: str | None
    span_id: str | None
    detail: str


# --- time -----------------------------------------------------------------------


def format_timestamp(us: int) -> str:
    """
    Spell microseconds since 1970 as `YYYY-MM-DDTHH:MM:SS.ffffffZ`.
    """
    known, text = _last_second
    micros = us - known * 1_000_000
    if not 0 <= micros < 1_000_000:
        seconds, micros = divmod(us, 1_000_000)
        text = _second(seconds)
    # Digits behind a 1, cut off: the quickest way to six of them.
    return f"{text}.{str(1_000_000 + micros)[1:]}Z"


def parse_timestamp(text: str) -> int:
    """
    Read what `format_timestamp` wrote, or any ISO 8601 time; naive means UTC.

    Raises:
        ValueError: *text* is not a time.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


_last_second: tuple[int, str] = (0, "1970-01-01T00:00:00")


def _second(seconds: int) -> str:
    # Rows come in time order: one remembered second answers nearly all of them.
    # The pair is replaced whole, so a racing thread sees the old or the new one.
    global _last_second
    text = _spell_second(seconds)
    _last_second = (seconds, text)
    return text


def _spell_second(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    try:
        day = datetime.fromordinal(719_163 + days)
    except (ValueError, OverflowError):
        # A clock can claim any time; the wire's years have four digits.
        return "0001-01-01T00:00:00" if days < 0 else "9999-12-31T23:59:59"
    hours, rest = divmod(rest, 3_600)
    minutes, secs = divmod(rest, 60)
    return (
        f"{day.year:04d}-{day.month:02d}-{day.day:02d}"
        f"T{hours:02d}:{minutes:02d}:{secs:02d}"
    )


# --- ids ------------------------------------------------------------------------

_CROCKFORD: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS: Final = [a + b for a in _CROCKFORD for b in _CROCKFORD]


def _base32(value: int, pairs: int) -> str:
    return "".join(_PAIRS[value >> 10 * i & 1023] for i in reversed(range(pairs)))


def ulid_stamp(ms: int) -> str:
    """
    Spell milliseconds since 1970 as the first ten characters of a ULID.
    """
    high, low = ms >> 30, ms
    return (
        f"{_PAIRS[high >> 10 & 255]}{_PAIRS[high & 1023]}{_PAIRS[low >> 20 & 1023]}"
        f"{_PAIRS[low >> 10 & 1023]}{_PAIRS[low & 1023]}"
    )


def ulid_ms(id: str) -> int:
    """
    Return the milliseconds since 1970 in an `evt-` ULID.

    Raises:
        ValueError: it is none.
    """
    ms = 0
    for letter in id[4:14]:
        ms = ms << 5 | _CROCKFORD.index(letter)
    return ms


class UlidMinter:
    """
    Mint `evt-` ULIDs that only grow within this process.

    Of the 80 bits behind the time the upper 60 are drawn once and the lower 20
    count up, so ids stay unique and in order whatever the clock does; a clock that
    steps back is held at its highest value. See https://github.com/ulid/spec.
    """

    def __init__(self, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._entropy = entropy
        self.reseed()

    def reseed(self) -> None:
        """
        Draw new random bits: a forked child must not count on from its parent.
        """
        # The top bit stays free: counting up can never overflow 60 bits.
        high = int.from_bytes(self._entropy(8), "big") >> 5
        # Tuples, replaced whole: threads race through here without a lock.
        self._time = (0, f"evt-{ulid_stamp(0)}")
        self._runs = {high: _run(high)}
        self._run = self._runs[high]

    def __call__(self, time_ns: int) -> str:
        """
        Return the next id, at *time_ns* nanoseconds since 1970.
        """
        ms, stamp = self._time
        now_ms = time_ns // 1_000_000
        if now_ms > ms:
            stamp = f"evt-{ulid_stamp(now_ms)}"
            self._time = (now_ms, stamp)
        high, head, tails = self._run
        for tail in tails:
            return stamp + head + tail
        # Once in a million ids. Of the threads that get here the first one's
        # setdefault() decides: all go on with the same run.
        self._run = self._runs.setdefault(high + 1, _run(high + 1))
        self._runs.pop(high - 1, None)
        return self(time_ns)


def _run(high: int) -> tuple[int, str, Iterator[str]]:
    """
    Return the upper 60 bits, their text, and the texts of the 20 below.

    An iterator in C hands each value to one thread only, and is the fastest counter.
    """
    return high, _base32(high, 6), map("".join, product(_PAIRS, repeat=2))


# --- JSON -----------------------------------------------------------------------

quote: Callable[[str], str] = encode_basestring
"""
Spell a string as JSON, with the escapes of RFC 8785 and no others.
"""


def canonical_number(value: float) -> str:
    """
    Spell a finite float as ECMAScript does (RFC 8785, section 3.2.2.3).

    Raises:
        ValueError: *value* is not finite.
    """
    if value - value != 0:
        raise ValueError(f"{value} has no JSON form")
    # Both languages print the shortest digits that read back as the same double;
    # they differ in when they switch to an exponent.
    text = float.__repr__(value)
    if "e" in text:
        return _ecma_exponent(text)
    if text.endswith(".0"):
        return "0" if text == "-0.0" else text[:-2]
    return text


def _ecma_exponent(text: str) -> str:
    mantissa, _, power = text.partition("e")
    exponent = int(power)
    if not -6 <= exponent < 21:
        return f"{mantissa}e{exponent:+d}"
    sign = "-" if mantissa.startswith("-") else ""
    digits = mantissa.lstrip("-").replace(".", "")
    if exponent < 0:
        return f"{sign}0.{'0' * (-exponent - 1)}{digits}"
    return f"{sign}{digits:0<{exponent + 1}}"


def code_units(key: str) -> bytes:
    """
    Return what RFC 8785 sorts keys by: UTF-16, which is not the order of `str`.

    Raises:
        TypeError: *key* is not a string.
    """
    return str.encode(key, "utf-16-be", "surrogatepass")


def canonical_json(value: Any) -> str:
    """
    Encode JSON-shaped *value* as RFC 8785 text; integers keep all their digits.

    Raises:
        TypeError: *value* holds something that JSON has no form for.
        ValueError: it holds a number that is not finite.
    """
    spell = _SPELL.get(type(value))
    if spell is None:
        spell = next((s for k, s in _SPELL.items() if isinstance(value, k)), None)
    if spell is None:
        raise TypeError(f"{type(value).__name__} has no JSON form")
    return spell(value)


def _array(value: Sequence[Any]) -> str:
    return f"[{','.join(map(canonical_json, value))}]"


def _object(value: Mapping[str, Any]) -> str:
    # The two orders differ only past U+D7FF.
    is_plain = "".join(value).isascii()
    names = sorted(value) if is_plain else sorted(value, key=code_units)
    return f"{{{','.join([f'{quote(k)}:{canonical_json(value[k])}' for k in names])}}}"


_SPELL: Final[Mapping[type, Callable[[Any], str]]] = {
    str: quote,
    bool: lambda value: "true" if value else "false",
    int: int.__repr__,
    float: canonical_number,
    type(None): lambda _: "null",
    dict: _object,
    list: _array,
    tuple: _array,
}


# --- what readers get -----------------------------------------------------------


@attrs.frozen(kw_only=True)
class AuditRow:
    """
    One audit row; attributes are named as the wire keys.
    """

    wire_version: str = WIRE_VERSION
    id: str
    origin_id: str
    timestamp: str
    monotonic_seq: int | None = None
    code: str
    action: str
    severity: str
    outcome: str
    actor: str | None
    actor_kind: str
    on_behalf_of: str | None = None
    service_id: str
    source_node_id: str
    tenant_id: str | None = None
    client: str | None = None
    target: str | None
    category: str
    domain: str
    method: str
    reason: str | None = None
    request_id: str
    trace_id: str | None = None
    span_id: str | None = None
    detail: dict[str, Any] | None
    retention_class: str
    stored_at: str | None = None
    shipped_at: str | None = None
    canonical_form_id: str | None = None
    prev_hash: str | None = None
    hash: str | None = None
    salt: str | None = None
    commitment: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """
        Return the wire form: every wire key, in order.
        """
        return {name: getattr(self, name) for name in AUDIT_COLUMNS}


@attrs.frozen(kw_only=True)
class SysRow:
    """
    One structured log line; *fields* holds what the caller added to it.
    """

    level: str
    event: str
    request_id: str
    service_id: str
    source_node_id: str
    tenant_id: str | None = None
    timestamp: str
    logger: str | None = None
    fields: dict[str, Any] = attrs.field(factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """
        Return the wire form: the fixed keys, then the free fields.
        """
        fixed = {name: getattr(self, name) for name in SYS_COLUMNS}
        return {"shape": "sys", **fixed, **self.fields}


@attrs.frozen(kw_only=True)
class ApiRow:
    """
    One HTTP request, as the service answered it.
    """

    method: str
    path: str
    route: str | None = None
    status: int | None
    duration_ms: float | None
    request_id: str
    service_id: str
    source_node_id: str
    tenant_id: str | None = None
    actor: str | None = None
    client: str | None = None
    bytes: int | None = None
    complete: bool = True
    timestamp: str
    fields: dict[str, Any] = attrs.field(factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """
        Return the wire form: the fixed keys, then what the transport added.
        """
        fixed = {name: getattr(self, name) for name in API_COLUMNS}
        return {"shape": "api", **fixed, **self.fields}


# --- queries --------------------------------------------------------------------

Stream = Literal["audit", "sys", "api"]
"""The three streams."""

ReadingOrder = Literal["asc", "desc", "stored"]
"""Oldest or newest first; or as a store took its audit rows, late ones last."""

SEAL_COLUMNS: Final = ("canonical_form_id", "prev_hash", "hash", "salt", "commitment")

FILTERS: Final[Mapping[str, Sequence[str]]] = {
    "audit": tuple(c for c in AUDIT_COLUMNS if c not in ("detail", *SEAL_COLUMNS)),
    "sys": ("request_id", "level", "event", "logger", "service_id"),
    "api": ("request_id", "method", "path", "route", "status", "actor"),
}
SHORT_FORMS: Final = {
    "tenant": "tenant_id",
    "node": "source_node_id",
    "service": "service_id",
    "seq": "monotonic_seq",
}
_BOUNDS: Final = ("since", "until", "limit", "offset", "cursor", "order", "count")
_CHOICES: Final = {
    ("audit", "severity"): Severity,
    ("audit", "outcome"): Outcome,
    ("audit", "actor_kind"): ActorKind,
    ("audit", "method"): Method,
    ("audit", "retention_class"): RetentionClass,
}
_INTEGERS: Final = ("monotonic_seq", "status")
_TIMES: Final = ("timestamp", "stored_at", "shipped_at")
MAX_LIMIT: Final = 1000
END: Final = "end"
"""The cursor behind every row that is stored now, in the order `stored`."""
_MAX_VALUE: Final = 4096


class Everyone(Enum):
    """
    The type of `ALL_TENANTS`, so that no string can be mistaken for it.
    """

    ALL_TENANTS = "all tenants"


ALL_TENANTS: Final = Everyone.ALL_TENANTS
"""Every tenant's rows, and those without a tenant; the only way to everything."""


@attrs.frozen(kw_only=True)
class Query:
    """
    What to read from one stream: filters, a window of time, a page.

    *scope* is the reader's own tenant, applied beside any filter; *within_s* seconds
    are what a store may take for it.
    """

    stream: Stream = "audit"
    filters: Mapping[str, str | int] = attrs.field(factory=dict)
    since_us: int | None = None
    until_us: int | None = None
    limit: int = 100
    offset: int = 0
    cursor: str | None = None
    order: ReadingOrder = "desc"
    count: bool = False
    q: str | None = None
    scope: str | Everyone | None = ALL_TENANTS
    within_s: float | None = None

    @classmethod
    def parse(
        cls,
        stream: str,
        given: Mapping[str, object],
        *,
        now_us: int,
        scope: str | Everyone | None = ALL_TENANTS,
        default_order: Literal["asc", "desc"] = "desc",
    ) -> Query:
        """
        Build a query from parameters; None means not given.

        Raises:
            InvalidQuery: a name or value is unusable; it says which.
        """
        _require_stream(stream)
        values: dict[str, Any] = {"order": default_order}
        filters: dict[str, str | int] = {}
        for name, value in given.items():
            if value is None:
                continue
            key = SHORT_FORMS.get(name, name) if stream == "audit" else _long(name)
            if key in FILTERS[stream]:
                if key in filters:
                    raise InvalidQuery(f"{key} is given twice; give it once", name)
                filters[key] = _filter_value(stream, key, value)
            else:
                values.update(_bound(stream, name, value, now_us))
        if "cursor" in values and values["order"] != "stored":
            decode_cursor(stream, values["cursor"])
        return cls(stream=stream, filters=filters, scope=scope, **values)  # type: ignore[arg-type]

    def is_last(self, page: Page) -> bool:
        """
        Tell whether there is nothing behind *page*, for now: it leads nowhere else.

        A page with few rows, or none, may not be the last one: what a store looks
        through at once is bounded.
        """
        return page.next in (None, self.cursor)

    def matches(self, row: Mapping[str, Any]) -> bool:
        """
        Tell whether a row in wire form is meant by filters, window and scope.
        """
        if self.scope is not ALL_TENANTS and row.get("tenant_id") != self.scope:
            return False
        if any(row.get(key) != value for key, value in self.filters.items()):
            return False
        if self.q is not None and not _contains(row, self.q):
            return False
        if self.since_us is None and self.until_us is None:
            return True
        at = parse_timestamp(row["timestamp"])
        return (self.since_us is None or at >= self.since_us) and (
            self.until_us is None or at < self.until_us
        )


@attrs.frozen(kw_only=True)
class Page:
    """
    One page of a query; *next* is the cursor of the following one, or None.

    In the order `stored` there is always one: rows that are stored later follow.
    *completeness* is `store`, `ring` (this process only) or `store-degraded`.
    """

    rows: list[Any]
    next: str | None = None
    completeness: str = "store"
    total: int | None = None


def encode_cursor(stream: str, key: str | int) -> str:
    """
    Make the opaque cursor that stands for "after the row with this key".
    """
    return urlsafe_b64encode(f"{stream[0]}{key}".encode()).decode().rstrip("=")


def decode_cursor(stream: str, cursor: str) -> str:
    """
    Return the key in *cursor*.

    Raises:
        InvalidQuery: it is not one of this stream's cursors.
    """
    try:
        raw = cursor.encode("ascii")
        text = urlsafe_b64decode(raw + b"=" * (-len(raw) % 4)).decode("ascii")
    except ValueError:
        text = ""
    if not (2 <= len(text) <= 64 and text[0] == stream[0] and text.isprintable()):
        raise InvalidQuery(
            f"cursor {_shown(cursor)} is not from a page of {stream}; "
            "use the `next` of the page before",
            "cursor",
        )
    return text[1:]


def _require_stream(stream: str) -> None:
    if stream not in FILTERS:
        raise InvalidQuery(
            f"unknown stream {_shown(stream)}; use audit, sys or api", "stream"
        )


def _long(name: str) -> str:
    return "service_id" if name == "service" else name


def _shown(value: object) -> str:
    return repr(value)[:80]


def _contains(row: Mapping[str, Any], needle: str) -> bool:
    folded = needle.casefold()
    return any(folded in str(v).casefold() for v in row.values())


def _filter_value(stream: str, key: str, value: object) -> str | int:
    if isinstance(value, Enum):
        value = value.value
    if key in _INTEGERS:
        return _integer(key, value, 0, 2**63 - 1)
    text = str(value)
    if len(text) > _MAX_VALUE or "\0" in text:
        raise InvalidQuery(f"{key} is over {_MAX_VALUE} characters or holds NUL", key)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise InvalidQuery(f"{key} holds a lone surrogate; send UTF-8", key)
    if key in _TIMES and stream == "audit":
        return format_timestamp(_time(key, text, "a time"))
    choices = _CHOICES.get((stream, key))
    return text if choices is None else _choice(key, text, choices)


def _choice(key: str, text: str, choices: type[Enum]) -> str:
    try:
        # By the enum itself: it knows its aliases (`schedule`).
        return str(choices(text).value)
    except ValueError:
        allowed = " ".join(str(c.value) for c in choices)
        raise InvalidQuery(f"{key} {_shown(text)} is none of: {allowed}", key) from None


def _bound(stream: str, name: str, value: object, now_us: int) -> dict[str, Any]:
    match name:
        case "since" | "until":
            return {f"{name}_us": _moment(name, value, now_us)}
        case "limit":
            return {"limit": _integer(name, value, 1, MAX_LIMIT)}
        case "offset":
            return {"offset": _integer(name, value, 0, 2**31 - 1)}
        case "cursor":
            return {"cursor": str(value)}
        case "order" if value in _orders(stream):
            return {"order": value}
        case "count" if str(value).lower() in ("true", "false"):
            return {"count": str(value).lower() == "true"}
        case "q" if stream == "sys":
            return {"q": _filter_value(stream, "q", value)}
        case "order" | "count":
            choices = _orders(stream) if name == "order" else ("true", "false")
            allowed = " or ".join(choices)
            raise InvalidQuery(f"{name} {_shown(value)} is not {allowed}", name)
    known = [*FILTERS[stream], *_BOUNDS]
    near = get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known are {' '.join(known)}"
    raise InvalidQuery(f"unknown parameter {_shown(name)}{hint}", name)


def _orders(stream: str) -> tuple[str, ...]:
    return get_args(ReadingOrder) if stream == "audit" else ("asc", "desc")


def _integer(name: str, value: object, low: int, high: int) -> int:
    # Digits only: `int` itself also takes spaces, underscores and other scripts.
    text = str(value)
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(high))):
        text = "-1"
    if not low <= int(text) <= high:
        raise InvalidQuery(
            f"{name} {_shown(value)} is not an integer from {low} to {high}", name
        )
    return int(text)


def _moment(name: str, value: object, now_us: int) -> int:
    """
    Read a time, or a duration back from now such as `2h`.
    """
    if isinstance(value, timedelta):
        return now_us - value // timedelta(microseconds=1)
    try:
        return now_us - round(parse_duration(str(value)) * 1_000_000)
    except ValueError:
        return _time(name, str(value), "a time or a duration back from now (2h, 7d)")


def _time(name: str, text: str, wanted: str) -> int:
    try:
        return parse_timestamp(text)
    except (ValueError, OverflowError):
        raise InvalidQuery(
            f"{name} {_shown(text)} is not {wanted}; "
            "a time is 2026-04-20T12:00:00Z, naive means UTC",
            name,
        ) from None
