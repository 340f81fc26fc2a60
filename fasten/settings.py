# SPDX-License-Identifier: Apache-2.0
"""
Settings, read once from a mapping: durations, sizes, switches, DSNs, secrets.

Nothing here looks at the process's own environment, opens a store or waits.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal, TypeVar
from urllib.parse import unquote

import attrs

from fasten.errors import SettingsError

__all__ = [
    "VARIABLES",
    "Dsn",
    "OnFull",
    "Secret",
    "Settings",
    "parse_bool",
    "parse_dsn",
    "parse_duration",
    "parse_size",
]

_T = TypeVar("_T")

# --- small grammars ---------------------------------------------------------------
# Patterns are compiled by `re` at their first use: import stays cheap.

_SECONDS: Final = {
    "s": 1,
    "m": 60,
    "h": 3_600,
    "d": 86_400,
    "w": 604_800,
    "y": 31_536_000,
}
_DAY_S: Final = 86_400
_LONGEST_S: Final = 1_000 * _SECONDS["y"]
_SHORT_FORM: Final = r"(?:[0-9]+[smhdwy])+"
_PART: Final = r"([0-9]+)([smhdwy])"
_ISO_FORM: Final = (
    r"P(?=[0-9T])(?:([0-9]+)Y)?(?:([0-9]+)W)?(?:([0-9]+)D)?"
    r"(?:T(?=[0-9])(?:([0-9]+)H)?(?:([0-9]+)M)?(?:([0-9]+(?:\.[0-9]{1,6})?)S)?)?"
)


def parse_duration(text: str) -> int | float:
    """
    Read `90s`, `6h`, `1w2d`, `7y` (a year is 365 days) or ISO 8601 `PT1H30M`.

    Returns:
        Seconds; whole ones as an int.

    Raises:
        ValueError: *text* is no duration, has no unit, or is over 1000 years.
    """
    total = _duration(text) if len(text) <= 64 else None
    if total is None:
        raise ValueError(
            f"{_shown(text)} is not a duration; write a number and a unit of "
            "s m h d w y, as in 90s, 6h, 1w2d, or ISO 8601 without months (PT1H30M)"
        )
    if total > _LONGEST_S:
        raise ValueError(f"{_shown(text)} is more than 1000 years; write a shorter one")
    return total


def _duration(text: str) -> int | float | None:
    if re.fullmatch(_SHORT_FORM, text):
        return sum(int(n) * _SECONDS[unit] for n, unit in re.findall(_PART, text))
    iso = re.fullmatch(_ISO_FORM, text)
    if iso is None:
        return None
    *whole, seconds = (part or "0" for part in iso.groups())
    total = sum(int(n) * _SECONDS[u] for n, u in zip(whole, "ywdhm", strict=True))
    return total + (float(seconds) if "." in seconds else int(seconds))


_BYTES: Final[Mapping[str, int]] = {
    "": 1,
    "b": 1,
    **{unit: 1024**n for n, unit in enumerate(("k", "m", "g", "t"), 1)},
    **{f"{unit}ib": 1024**n for n, unit in enumerate(("k", "m", "g", "t"), 1)},
    **{f"{unit}b": 1000**n for n, unit in enumerate(("k", "m", "g", "t"), 1)},
}
_SIZE: Final = r"([0-9]{1,18}) ?([A-Za-z]{0,3})"


def parse_size(text: str) -> int:
    """
    Read a number of bytes: `65536`, `64k`, `256MiB` (both of 1024) or `1GB` (of 1000).

    Raises:
        ValueError: *text* is no size.
    """
    match = re.fullmatch(_SIZE, text)
    factor = _BYTES.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(
            f"{_shown(text)} is not a size; write bytes or a unit of 1024 or 1000, "
            "as in 65536, 256MiB, 1GB"
        )
    return int(match[1]) * factor


_SWITCH: Final = {
    **dict.fromkeys(("on", "true", "yes", "1"), True),
    **dict.fromkeys(("off", "false", "no", "0"), False),
}


def parse_bool(text: str) -> bool:
    """
    Read a switch: `on`/`off`, `true`/`false`, `yes`/`no`, `1`/`0`, in any case.

    Raises:
        ValueError: *text* is no switch.
    """
    try:
        return _SWITCH[text.lower()]
    except KeyError:
        raise ValueError(f"{_shown(text)} is not a switch; write on or off") from None


_USERINFO: Final = r"(?s://.*@)"


def _shown(value: object) -> str:
    """
    Spell a value that is no secret, bounded; a DSN set by mistake loses its password.
    """
    if not isinstance(value, str | int | float | timedelta | os.PathLike):
        return f"a value of type {type(value).__name__}"
    text = re.sub(_USERINFO, "//***@", repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- secrets and DSNs -------------------------------------------------------------


@attrs.frozen(repr=False)
class Secret:
    """
    Text that shows itself only to those who ask by `reveal()`.
    """

    _text: str

    def reveal(self) -> str:
        """
        Return the text; keep it out of names that outlive the call.
        """
        return self._text

    def __repr__(self) -> str:
        return "Secret('***')"

    def __str__(self) -> str:
        return "***"


Backend = Literal["sqlite", "postgresql"]
"""The two kinds of store."""


@attrs.frozen(kw_only=True, repr=False)
class Dsn:
    """
    Where one stream is stored; made by `parse_dsn`, compared by what it leads to.

    *path* is absolute (SQLite only). *given_display* is the DSN as given without its
    password; *display* has the absolute path beside a relative one. *fingerprint*
    names the store and table and outlives a change of user, password and options.
    """

    backend: Backend
    path: str | None = None
    schema: str | None = None
    table: str
    fingerprint: str
    given_display: str = attrs.field(eq=False)
    display: str = attrs.field(eq=False)
    _url: Secret | None = attrs.field(default=None, alias="url")

    def conninfo(self) -> str:
        """
        Return what libpq takes: a `postgresql://` URL, password in it, no `table`.

        Raises:
            ValueError: this is a SQLite store; it has a *path*.
        """
        if self._url is None:
            raise ValueError(f"{self.display} is a file, not a server; use its path")
        return self._url.reveal()

    def __repr__(self) -> str:
        shown = re.sub(_PUBLIC_USER, "//", self.display)
        return f"<Dsn {shown} table={_qualified(self.schema, self.table)}>"


_PUBLIC_USER: Final = r"//[^/?]*@"
_DSN: Final = r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(?:\?([^#]*))?(#.*)?"
_BACKENDS: Final[Mapping[str, Backend]] = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgres": "postgresql",
    "postgresql": "postgresql",
    "postgresql+psycopg": "postgresql",
}
_TABLE: Final = r"(?:([A-Za-z_][A-Za-z0-9_]{0,62})\.)?([A-Za-z_][A-Za-z0-9_]*)"
# Postgres cuts names at 63 bytes; `<table>_checkpoint` and its like must stay apart.
_MAX_TABLE: Final = 48
_HOST: Final = r"(\[[0-9A-Za-z:.%]+\]|[^:\[\]]*)(?::([0-9]{0,5}))?"
_STRAY_PERCENT: Final = r"%(?![0-9A-Fa-f]{2})|%00"
_DSN_FORMS: Final = (
    "write sqlite:///./audit.db, sqlite:////abs/audit.db "
    "or postgresql://user:password@host:5432/database"
)
# What may be shown of a query string; of any other option not even the name is,
# because a password with a bare & in it looks like one.
_OPEN_OPTIONS: Final = frozenset(
    (
        "application_name",
        "channel_binding",
        "connect_timeout",
        "dbname",
        "host",
        "hostaddr",
        "port",
        "sslmode",
        "sslrootcert",
        "table",
        "target_session_attrs",
    )
)


def parse_dsn(given: str | Secret, *, cwd: Path, table: str = "audit_log") -> Dsn:
    """
    Read a SQLite or Postgres DSN; *table* is meant where it has no `?table=`.

    A relative SQLite path is resolved against *cwd*.

    Raises:
        SettingsError: the DSN is unusable; the message holds no secret of it.
    """
    try:
        return _dsn(_revealed(given), cwd, table)
    except ValueError as error:
        fault = str(error)
    # A traceback may print this frame's locals, and the password is in this one.
    del given
    raise SettingsError(fault)


def _dsn(given: str, cwd: Path, table: str) -> Dsn:
    """
    Do what `parse_dsn` does, with ValueErrors whose frames hold the DSN: catch them.
    """
    if any(c.isspace() or not c.isprintable() for c in given):
        raise ValueError(
            f"{_masked(given)} holds white space or a control character; a DSN is one "
            "word: join its lines, and write %20 for a blank"
        )
    match = re.fullmatch(_DSN, given)
    if match is None:
        raise ValueError(f"{_masked(given)} is not a DSN; {_DSN_FORMS}")
    scheme, authority, path, query, fragment = match.groups(default="")
    backend = _BACKENDS.get(scheme.lower())
    if backend is None:
        raise ValueError(
            f"{_masked(given)} has the unknown scheme {scheme!r}; {_DSN_FORMS}"
        )
    late_at = backend == "postgresql" and "@" in path + query
    if fragment or late_at or re.search(_STRAY_PERCENT, given):
        raise ValueError(f"{_masked(given)} {_BARE}")
    parts = _Parts(given, scheme, authority, path, *_options(given, query))
    made = _sqlite_dsn if backend == "sqlite" else _postgres_dsn
    return made(parts, cwd, table)


_BARE: Final = (
    "holds a bare # or %, or an @ after the host; inside user, password and options "
    "write %23 for #, %25 for %, %40 for @, %2F for /, %3F for ?"
)


@attrs.frozen(eq=False, repr=False)
class _Parts:
    """
    A DSN taken apart; percent-encoding kept, `table` apart from the other options.
    """

    given: str
    scheme: str
    authority: str
    path: str
    table: str
    options: tuple[tuple[str, str], ...]

    def option(self, name: str) -> str:
        return next((unquote(v) for k, v in reversed(self.options) if k == name), "")


def _options(given: str, query: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    pairs = [item.partition("=") for item in query.split("&") if item]
    if not all(name and equals for name, equals, _ in pairs):
        raise ValueError(
            f"{_masked(given)} holds an option without a value; write ?name=value, and "
            "%3F for ? and %26 for & inside user, password and values"
        )
    tables = [unquote(value) for name, _, value in pairs if name == "table" and value]
    if len(tables) > 1:
        raise ValueError(f"{_masked(given)} names two tables; keep one table=")
    others = tuple((name, value) for name, _, value in pairs if name != "table")
    return (tables[0] if tables else ""), others


def _table(parts: _Parts, default: str) -> tuple[str | None, str]:
    match = re.fullmatch(_TABLE, parts.table or default)
    if match is None or len(match[2]) > _MAX_TABLE:
        raise ValueError(
            f"{_masked(parts.given)} has an unusable table name; write letters, digits "
            f"and _, at most {_MAX_TABLE}, not a digit first, and on Postgres at most "
            "one schema. before it"
        )
    return match[1], match[2]


def _sqlite_dsn(parts: _Parts, cwd: Path, default_table: str) -> Dsn:
    schema, table = _table(parts, default_table)
    _refuse_for_sqlite(parts, schema)
    relative = unquote(parts.path[1:])
    path = os.path.normpath(cwd / relative)
    shown = parts.given
    return Dsn(
        backend="sqlite",
        path=path,
        table=table,
        fingerprint=_fingerprint("sqlite", path, table),
        given_display=shown,
        display=shown if relative.startswith("/") else f"{shown} ({path})",
    )


def _refuse_for_sqlite(parts: _Parts, schema: str | None) -> None:
    shown = _masked(parts.given)
    if ":memory:" in parts.given or parts.option("mode") == "memory":
        raise ValueError(f"{shown} lives in memory; rows must outlive it: {_DSN_FORMS}")
    if parts.authority:
        raise ValueError(
            f"{shown} has two slashes where three belong; write sqlite:///./audit.db "
            "or sqlite:////abs/audit.db"
        )
    if parts.path in ("", "/") or parts.path.endswith("/"):
        raise ValueError(f"{shown} names no file; {_DSN_FORMS}")
    if parts.path.startswith("/file:") or parts.options:
        raise ValueError(
            f"{shown} has options; a SQLite DSN takes ?table= and no other"
        )
    if schema is not None:
        raise ValueError(f"{shown} names a schema; SQLite has none: drop the prefix")


def _postgres_dsn(parts: _Parts, _cwd: Path, default_table: str) -> Dsn:
    schema, table = _table(parts, default_table)
    userinfo, at, hosts = parts.authority.rpartition("@")
    servers = _servers(parts, hosts)
    if "/" in parts.path[1:]:
        raise ValueError(
            f"{_masked(parts.given)} has more than one / after the host; write %2F for "
            "a / inside user, password and database"
        )
    user, _, _ = userinfo.partition(":")
    database = unquote(parts.option("dbname") or parts.path[1:] or user)
    # libpq ends the password at the first @, users of other URLs at the last.
    userinfo = userinfo.replace("@", "%40") + at
    query = "&".join(f"{name}={value}" for name, value in parts.options)
    url = f"postgresql://{userinfo}{hosts}{parts.path}{'?' if query else ''}{query}"
    shown = _shown_url(parts, user, hosts)
    return Dsn(
        backend="postgresql",
        schema=schema,
        table=table,
        fingerprint=_fingerprint(
            "postgresql", *servers, database, _qualified(schema, table)
        ),
        given_display=shown,
        display=shown,
        url=Secret(url),
    )


def _servers(parts: _Parts, hosts: str) -> list[str]:
    """
    Return `host:port` of every server, sorted: their order does not move the store.
    """
    matches = [re.fullmatch(_HOST, host) for host in hosts.split(",")]
    pairs = [(m[1], m[2] or "") for m in matches if m and int(m[2] or 1) in _PORTS]
    if len(pairs) != len(matches):
        raise ValueError(
            f"{_masked(parts.given)} has an unusable host or port; write host:5432 or "
            "[::1]:5432, and %3A for : and %2F for / inside user and password"
        )
    named = (parts.option("host") or parts.option("hostaddr")).split(",")
    names = named if named != [""] else [unquote(host) for host, _ in pairs]
    ports = parts.option("port").split(",") if parts.option("port") else []
    ports = ports or [port for _, port in pairs]
    ports = ports if len(ports) == len(names) else ports[:1] * len(names)
    return sorted(
        f"{name if name.startswith('/') else name.lower()}:{port or 5432}"
        for name, port in zip(names, ports, strict=True)
    )


_PORTS: Final = range(1, 65_536)


def _qualified(schema: str | None, table: str) -> str:
    return f"{schema}.{table}" if schema else table


def _fingerprint(*parts: str) -> str:
    return sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _shown_url(parts: _Parts, user: str, hosts: str) -> str:
    who = parts.authority.rpartition("@")[0]
    who = f"{user}:***@" if ":" in who else f"{user}@" if who else ""
    query = parts.given.partition("?")[2]
    tail = f"?{_open_options(query)}" if query else ""
    return f"{parts.scheme}://{who}{hosts}{parts.path}{tail}"


def _open_options(query: str) -> str:
    items = query.split("&")
    return "&".join(i if i.partition("=")[0] in _OPEN_OPTIONS else "***" for i in items)


def _masked(given: str) -> str:
    """
    Show what can be shown of a DSN that may be broken anywhere.
    """
    scheme, found, rest = given.partition("://")
    if not found or not re.fullmatch(r"[A-Za-z0-9+.-]{1,32}", scheme):
        return "'***'"
    is_file = scheme.lower().startswith("sqlite") and rest.startswith("/")
    _, at, rest = ("", "", rest) if is_file else rest.rpartition("@")
    where, question, query = rest.partition("?")
    if not at and not is_file:
        # `user:password` with the host forgotten reads as host and port.
        where = re.sub(r":(?![0-9]{1,5}(?:[/,]|$))[^/]*", ":***", where)
    where = "".join(c if c.isprintable() else " " for c in where)[:200]
    tail = f"{question}{_open_options(query)}" if question else ""
    return f"{scheme}://{'***@' if at else ''}{where}{tail}"


# --- what each variable holds -------------------------------------------------------


@attrs.frozen(kw_only=True)
class OnFull:
    """
    What `emit` does when neither spool nor queue takes a row.

    *block_s* is how long `block` waits before it drops, in seconds.
    """

    kind: Literal["drop_count", "block", "raise"]
    block_s: float = 0.0


def _read_text(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.read(65_536)


@attrs.frozen(kw_only=True, eq=False, repr=False)
class _Place:
    """
    Where the settings are read: what relative paths and the node's name come from.
    """

    hostname: str
    cwd: Path
    read_file: Callable[[Path], str]


_Parse = Callable[[object, _Place], _T]
"""Turn what was given into the field's value, or raise ValueError with the cure."""


def _text(value: object, _place: _Place) -> str:
    fits = isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()
    if not fits:
        raise ValueError(
            f"{_shown(value)} is not text of 1 to 255 printable characters"
        )
    return str(value)


def _switch(value: object, _place: _Place) -> bool:
    if isinstance(value, bool):
        return value
    return parse_bool(value if isinstance(value, str) else str(_number(value)))


def _number(value: object) -> int:
    """
    Read a whole number, given as one or as its digits.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
        return int(value)
    raise ValueError(f"{_shown(value)} is not a whole number; write digits, as in 1000")


def _at_least(low: int, number: int) -> int:
    if not low <= number <= 2**53:
        raise ValueError(f"{number} is out of bounds; write {low} or more")
    return number


def _count(low: int) -> _Parse[int]:
    return lambda value, _place: _at_least(low, _number(value))


def _size(value: object, _place: _Place) -> int:
    size = parse_size(value) if isinstance(value, str) else _number(value)
    return _at_least(1, size)


def _choice(*allowed: str) -> _Parse[Any]:
    def parse(value: object, _place: _Place) -> str:
        if isinstance(value, str) and value.lower() in allowed:
            return value.lower()
        raise ValueError(f"{_shown(value)} is not one of {', '.join(allowed)}")

    return parse


def _on_full(value: object, _place: _Place) -> OnFull:
    if isinstance(value, OnFull):
        return value
    text = value.lower() if isinstance(value, str) else ""
    if text in ("drop_count", "raise"):
        return OnFull(kind="raise" if text == "raise" else "drop_count")
    match = re.fullmatch(r"block:0*([1-9][0-9]{0,8})", text)
    if match is None:
        raise ValueError(
            f"{_shown(value)} is not drop_count, raise or block:<ms>, as in block:250"
        )
    return OnFull(kind="block", block_s=int(match[1]) / 1000)


def _seconds(value: object) -> int | float:
    """
    Read a duration; a bare number from Python is seconds, as with `time.sleep`.
    """
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        return parse_duration(value)
    raise ValueError(
        f"{_shown(value)} is not a duration; write 6h or timedelta(hours=6)"
    )


def _interval(low: float) -> _Parse[float]:
    def parse(value: object, _place: _Place) -> float:
        seconds = _seconds(value)
        if not low <= seconds <= _LONGEST_S:
            raise ValueError(f"{_shown(value)} is out of bounds; write {low}s or more")
        return seconds

    return parse


def _period(value: object, _place: _Place) -> int:
    """
    Read how long rows stay: a bare number is days, anything else a duration.
    """
    if isinstance(value, str) and not value.isdecimal():
        seconds = _seconds(value)
    elif isinstance(value, timedelta):
        seconds = value.total_seconds()
    else:
        seconds = _number(value) * _DAY_S
    if not 1 <= seconds <= _LONGEST_S:
        raise ValueError(
            f"{_shown(value)} is out of bounds; write days, as in 30, or a duration "
            "of 1s to 1000y"
        )
    return int(seconds)


def _days(value: object, place: _Place) -> int:
    days, rest = divmod(_period(value, place), _DAY_S)
    if rest:
        raise ValueError(f"{_shown(value)} is not whole days; write days, as in 180")
    return days


def _override(value: object, place: _Place) -> Mapping[str, int]:
    if isinstance(value, Mapping):
        pairs = [(str(name), period) for name, period in value.items()]
    else:
        split = [item.partition("=") for item in _items(value)]
        pairs = [(name.strip(), period.strip()) for name, _, period in split]
    periods = {name: _period(period, place) for name, period in pairs}
    if len(periods) < len(pairs) or not periods.keys() <= {"short", "medium", "long"}:
        raise ValueError(
            f"{_shown(value)} names a class twice or one that is not short, medium or "
            "long; write long=7y,medium=1y"
        )
    return periods


def _items(value: object, separators: str = ",") -> list[str]:
    """
    Split a list: text at its *separators*, or the items of a Python collection.
    """
    if isinstance(value, str):
        found: Iterable[object] = re.split(f"[{separators}]", value)
    elif isinstance(value, list | tuple | set | frozenset):
        found = value
    else:
        found = [value]
    texts = [os.fspath(v) if isinstance(v, os.PathLike) else v for v in found]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{_shown(value)} is not a list of names")
    return [text.strip() for text in map(str, texts) if text.strip()]


def _streams(value: object, _place: _Place) -> frozenset[str]:
    names = frozenset(_items(value))
    if not names <= {"audit", "sys", "api"}:
        raise ValueError(
            f"{_shown(value)} is not a list of audit, sys, api; leave it empty for none"
        )
    return names


def _names(value: object, _place: _Place) -> tuple[str, ...]:
    return tuple(_items(value))


def _path(value: object, place: _Place) -> str:
    if not isinstance(value, str | os.PathLike) or "\0" in str(value):
        raise ValueError(f"{_shown(value)} is not a path")
    return os.path.normpath(place.cwd / value)


def _paths(value: object, place: _Place) -> tuple[str, ...]:
    return tuple(_path(item, place) for item in _items(value, f",{os.pathsep}"))


# --- what the secret ones hold: no message below may show a value -------------------


def _dsn_for(stream: str) -> _Parse[Dsn]:
    def parse(value: object, place: _Place) -> Dsn:
        if isinstance(value, Dsn):
            return value
        return _dsn(_revealed(value), place.cwd, f"{stream}_log")

    return parse


def _revealed(value: object) -> str:
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, str):
        return str(value)
    raise ValueError(f"a value of type {type(value).__name__} is not text")


def _secrets(value: object) -> list[str]:
    many = value if isinstance(value, list | tuple | set | frozenset) else [value]
    items = [item.strip() for one in many for item in _revealed(one).split(",")]
    return list(dict.fromkeys(item for item in items if item))


def _tokens(value: object, _place: _Place) -> tuple[Secret, ...]:
    tokens = _secrets(value)
    if not all(re.fullmatch(r"[\x21-\x7e]+", token) for token in tokens):
        raise ValueError(
            "a token holds a blank or a character that no Authorization header can "
            "carry; use visible ASCII, as `openssl rand -hex 32` prints"
        )
    return tuple(map(Secret, tokens))


def _signing_keys(value: object, place: _Place) -> tuple[Secret, ...]:
    return tuple(_signing_key(item, place) for item in _secrets(value))


def _signing_key(item: str, place: _Place) -> Secret:
    """
    Return the base64 of a seed, or PEM text: a path has been read by then.
    """
    known = _key_text(item)
    if known is None:
        known = _key_text(_file_text(item, place).strip())
    if known is None:
        raise ValueError(
            "neither the path of a PKCS#8 PEM file without a passphrase nor the base64 "
            "of a 32-byte Ed25519 seed; `fasten keygen` makes one"
        )
    return Secret(known)


def _key_text(text: str) -> str | None:
    if text.startswith("-----BEGIN PRIVATE KEY-----"):
        return text
    try:
        padded = text.translate({45: "+", 95: "/"}) + "=" * (-len(text) % 4)
        seed = b64decode(padded, validate=True)
    except ValueError:
        return None
    return b64encode(seed).decode() if len(seed) == 32 else None


# One key in 64 begins with a slash: what is cut short is no path because of that.
_LIKE_A_KEY: Final = r"(?=.*[A-Z])(?=.*[a-z])(?=.*[0-9])[A-Za-z0-9+/_-]{24,}"
_PLAIN_PATH: Final = rf"(?!{_LIKE_A_KEY}$)\.{{0,2}}/[^:=@\s]{{1,200}}"


def _file_text(path: str, place: _Place) -> str:
    """
    Read a small file; show its path only where it cannot be a secret put there.
    """
    shown = (
        path if re.fullmatch(_PLAIN_PATH, path) else "(not shown: it may be a secret)"
    )
    try:
        return place.read_file(place.cwd / path)
    except OSError as error:
        cause = error.strerror or type(error).__name__
    except ValueError:
        cause = "not UTF-8 text"
    raise ValueError(f"cannot read the file {shown}: {cause}; name a readable file")


# --- all of them ----------------------------------------------------------------------

_SECRETS: Final = (
    "audit_dsn",
    "api_dsn",
    "sys_dsn",
    "outbox_dsn",
    "reader_token",
    "signing_key",
)
_NOTHING: Final[Mapping[str, object]] = {}


def _field(parse: _Parse[_T], default: _T) -> _T:
    made: _T = attrs.field(default=default, metadata={"parse": parse})
    return made


@attrs.frozen(kw_only=True)
class Settings:
    """
    One field per FASTEN_* variable, its lower-case name without the prefix.

    Intervals, periods and the grace are seconds; sizes are bytes; paths are
    absolute. *outbox_dsn* None means the audit DSN, *codes* None what
    `Registry.discover` finds. Each *signing_key* reveals the base64 of a seed or PEM
    text. *warnings* are sentences for the operator, none of which stops a start.
    """

    service_id: str = attrs.field(metadata={"parse": _text})
    node_id: str = attrs.field(metadata={"parse": _text})
    tenant_id: str | None = _field(_text, None)
    audit_dsn: Dsn | None = attrs.field(
        default=None, metadata={"parse": _dsn_for("audit")}
    )
    api_dsn: Dsn | None = attrs.field(default=None, metadata={"parse": _dsn_for("api")})
    sys_dsn: Dsn | None = attrs.field(default=None, metadata={"parse": _dsn_for("sys")})
    codes: tuple[str, ...] | None = _field(_paths, None)
    strict: bool = _field(_switch, True)
    audit_store_failure_strategy: Literal["queue", "raise"] = _field(
        _choice("queue", "raise"), "queue"
    )
    spool: bool = _field(_switch, True)
    spool_dir: str | None = _field(_path, None)
    spool_max_bytes: int = _field(_size, 256 * 1024**2)
    durability: Literal["process", "power"] = _field(
        _choice("process", "power"), "process"
    )
    on_full: OnFull = attrs.field(
        default=OnFull(kind="drop_count"), metadata={"parse": _on_full}
    )
    queue_capacity: int = _field(_count(1), 10_000)
    audit_retention_class_short: int = _field(_period, 30 * _DAY_S)
    audit_retention_class_medium: int = _field(_period, 180 * _DAY_S)
    audit_retention_class_long: int = _field(_period, 1095 * _DAY_S)
    audit_retention_override: Mapping[str, int] = attrs.field(
        factory=dict, metadata={"parse": _override}
    )
    retention_sweep_interval: float = _field(_interval(1), 21_600.0)
    retention_grace: float = _field(_interval(0), 86_400.0)
    api_retention_days: int = _field(_days, 180)
    sys_retention_days: int = _field(_days, 30)
    sys_ring_size: int = _field(_count(0), 10_000)
    api_ring_size: int = _field(_count(0), 10_000)
    stdout: frozenset[str] = _field(_streams, frozenset(("audit", "sys", "api")))
    redact_keys: tuple[str, ...] = _field(_names, ())
    redact_replacement: str = _field(_text, "***")
    max_detail_bytes: int = _field(_size, 65_536)
    reader_token: tuple[Secret, ...] = _field(_tokens, ())
    trust_request_id: bool = _field(_switch, True)
    log: bool = _field(_switch, True)
    signing_key: tuple[Secret, ...] = _field(_signing_keys, ())
    checkpoint_interval: float = _field(_interval(1), 60.0)
    outbox_dsn: Dsn | None = attrs.field(
        default=None, metadata={"parse": _dsn_for("audit")}
    )
    warnings: tuple[str, ...] = attrs.field(default=(), eq=False)

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str],
        overrides: Mapping[str, object] = _NOTHING,
        *,
        hostname: str,
        cwd: Path,
        read_file: Callable[[Path], str] = _read_text,
    ) -> Settings:
        """
        Read *environ*; *overrides*, the keyword arguments of `init`, win.

        An override of None or "" means "not set", whatever *environ* holds. Callers
        should not keep either mapping in a local of their own: a traceback that
        prints locals would print the passwords in it.

        Raises:
            SettingsError: one error for all faults, each with its cure.
        """
        place = _Place(hostname=hostname, cwd=cwd, read_file=read_file)
        outcome = _read(environ, overrides, place)
        # A traceback may print this frame's locals; the secrets are in these two.
        del environ, overrides
        if outcome.faults:
            raise SettingsError(_summary(outcome.faults))
        return cls(**outcome.values, warnings=tuple(outcome.warnings))

    def digest(self) -> str:
        """
        Return the SHA-256, in hex, of every setting that is no secret.

        DSNs count by their fingerprint: a new password is no new setting.
        """
        hidden = ("reader_token", "signing_key", "warnings")
        plain = {
            field.name: _plain(getattr(self, field.name))
            for field in attrs.fields(type(self))
            if field.name not in hidden
        }
        return sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _plain(value: object) -> object:
    match value:
        case Dsn():
            return value.fingerprint
        case OnFull():
            return [value.kind, value.block_s]
        case frozenset():
            return sorted(value)
        case Mapping():
            return dict(value)
        case float():
            return int(value) if value.is_integer() else value
    return value


_PARSERS: Final[Mapping[str, _Parse[Any]]] = {
    field.name: field.metadata["parse"]
    for field in attrs.fields(Settings)
    if "parse" in field.metadata
}
_TWINS: Final = tuple(f"{name}_file" for name in _SECRETS)

VARIABLES: Final = tuple(f"FASTEN_{n.upper()}" for n in (*_PARSERS, *_TWINS))
"""Every variable that is read, the `_FILE` twins of the secret ones last."""


# --- reading ------------------------------------------------------------------------


@attrs.define(eq=False, repr=False)
class _Outcome:
    """
    What came of reading: values that parsed, and a line for each that did not.
    """

    values: dict[str, Any] = attrs.field(factory=dict)
    faults: list[str] = attrs.field(factory=list)
    warnings: list[str] = attrs.field(factory=list)


def _read(
    environ: Mapping[str, str], overrides: Mapping[str, object], place: _Place
) -> _Outcome:
    given = _merged(environ, overrides)
    outcome = _Outcome(faults=_unknown(overrides), warnings=_strangers(environ))
    for name, parse in _PARSERS.items():
        try:
            value = _given(name, given, place)
            if value is not None:
                outcome.values[name] = parse(value, place)
        except ValueError as error:
            outcome.faults.append(f"{_label(name, given, overrides)}: {error}")
    outcome.faults += _shared_tables(outcome.values)
    outcome.warnings += _unexpanded(given)
    return outcome


def _merged(
    environ: Mapping[str, str], overrides: Mapping[str, object]
) -> dict[str, object]:
    """
    Lay the overrides over the environment; a name takes its `_FILE` twin with it.
    """
    found = {n: environ.get(f"FASTEN_{n.upper()}") for n in (*_PARSERS, *_TWINS)}
    given: dict[str, object] = {
        name: value if name in _SECRETS else value.strip()
        for name, value in found.items()
        if value is not None
    }
    for name in overrides:
        given.pop(name.removesuffix("_file"), None)
        given.pop(f"{name.removesuffix('_file')}_file", None)
    given.update(overrides)
    return {name: value for name, value in given.items() if _is_set(name, value)}


def _is_set(name: str, value: object) -> bool:
    # An empty FASTEN_STDOUT is a value: print no stream.
    return value is not None and (name == "stdout" or not _is_blank(value))


def _is_blank(value: object) -> bool:
    return isinstance(value, str) and not value


def _given(name: str, given: Mapping[str, object], place: _Place) -> object:
    """
    Return what was given under *name* or in the file of its twin, or None.
    """
    twin = f"{name}_file"
    if twin in given:
        return _from_twin(name, given, place)
    if name == "node_id":
        return given.get(name, place.hostname)
    if name == "service_id" and name not in given:
        raise ValueError(_missing_service(place))
    return given.get(name)


def _from_twin(name: str, given: Mapping[str, object], place: _Place) -> str:
    twin = f"FASTEN_{name.upper()}_FILE"
    path = given[f"{name}_file"]
    if name in given:
        raise ValueError(f"{twin} is set too; keep one of the two")
    if not isinstance(path, str | os.PathLike):
        kind = type(path).__name__
        raise ValueError(f"a value of type {kind} is not a path")  # noqa: TRY004
    text = _file_text(os.fspath(path), place).rstrip("\r\n")
    if not text:
        raise ValueError("the file is empty; write the secret into it")
    return text


def _missing_service(place: _Place) -> str:
    try:
        held = place.read_file(place.cwd / ".env")
    except (OSError, ValueError):
        held = ""
    if re.search(r"^\s*(?:export\s+)?FASTEN_SERVICE_ID\s*=", held, re.MULTILINE):
        return (
            f"not set, but {place.cwd / '.env'} holds it, and no .env is read "
            "unasked; run `set -a; . ./.env; set +a` before the program, or give "
            "the fasten command --env-file .env"
        )
    return "not set; name the service, as in FASTEN_SERVICE_ID=api-server"


def _label(
    name: str, given: Mapping[str, object], overrides: Mapping[str, object]
) -> str:
    source = f"{name}_file" if f"{name}_file" in given and name not in given else name
    label = f"FASTEN_{source.upper()}"
    return f"{label} ({source}= of init)" if source in overrides else label


def _unknown(overrides: Mapping[str, object]) -> list[str]:
    return [
        f"{name}= is no setting; {_meant(_nearest(name))}"
        for name in overrides
        if name not in (*_PARSERS, *_TWINS)
    ]


_CARRIED: Final = "FASTEN_REQUEST_ID"  # how the subprocess shim passes an id on


def _strangers(environ: Mapping[str, str]) -> list[str]:
    warnings = []
    for name in sorted(environ):
        is_ours = name.startswith("FASTEN_TEST_") or name in (*VARIABLES, _CARRIED)
        if name.startswith("FASTEN_") and not is_ours:
            near = _nearest(name)
            meant = _meant(f"FASTEN_{near.upper()}" if near else "")
            warnings.append(f"{name} is no setting and was ignored; {meant}")
    return warnings


def _nearest(name: str) -> str:
    bare = name[:100].lower().removeprefix("fasten_")
    return "".join(get_close_matches(bare, [*_PARSERS, *_TWINS], 1))


def _meant(near: str) -> str:
    return f"did you mean {near}?" if near else "no real name is near it"


def _shared_tables(values: Mapping[str, Any]) -> list[str]:
    faults, seen = [], dict[str, str]()
    for name in ("audit_dsn", "api_dsn", "sys_dsn"):
        dsn = values.get(name)
        if dsn is None:
            continue
        first = seen.setdefault(dsn.fingerprint, name)
        if first != name:
            faults.append(
                f"FASTEN_{name.upper()}: leads to the same table as "
                f"FASTEN_{first.upper()}, {_qualified(dsn.schema, dsn.table)}; "
                "give each stream its own ?table="
            )
    return faults


def _unexpanded(given: Mapping[str, object]) -> list[str]:
    return [
        f"FASTEN_{name.upper()} holds ${{...}} as it stands: a shell expands it, "
        "an env file read by Docker or systemd does not"
        for name in _SECRETS
        if name.endswith("_dsn") and "${" in str(given.get(name))
    ]


def _summary(faults: list[str]) -> str:
    if len(faults) == 1:
        return faults[0]
    return "\n  ".join((f"{len(faults)} settings are unusable:", *faults))
