# SPDX-License-Identifier: Apache-2.0
"""
Codes: what a row may be called, and what each name stands for.

A `Registry` is what an engine looks codes up in; the functions of this module are
those of the default one. What a row holds beside its code is in `rows`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import EllipsisType
from typing import Any, Final, Literal, NamedTuple, TypeVar

import attrs

from fasten.errors import CodeConflict, InvalidCodes, UnknownCode

__all__ = [
    "OWN_CODES",
    "ActorKind",
    "Entry",
    "Meta",
    "Method",
    "Outcome",
    "Registry",
    "RetentionClass",
    "Severity",
    "discover",
    "dump",
    "entry_for",
    "is_code",
    "load",
    "meta",
    "register",
    "registry",
    "reload",
]


class Severity(StrEnum):
    """
    How loud a row is.
    """

    DEBUG = "debug"
    INFO = "info"
    WARN = "warn"
    ERROR = "error"
    CRITICAL = "critical"


class RetentionClass(StrEnum):
    """
    How long a row stays: the settings say what each class is worth.
    """

    SHORT = "short"
    MEDIUM = "medium"
    LONG = "long"


class ActorKind(StrEnum):
    """
    What kind of WHO did it; `schedule` is read as `scheduler`.
    """

    USER = "user"
    ADMIN = "admin"
    SERVICE = "service"
    SYSTEM = "system"
    SCHEDULER = "scheduler"
    AGENT = "agent"

    @classmethod
    def _missing_(cls, value: object) -> ActorKind | None:
        return cls.SCHEDULER if value == "schedule" else None


class Method(StrEnum):
    """
    HOW it came about: the transport or face it came through.
    """

    HTTP = "http"
    MQTT = "mqtt"
    CLI = "cli"
    SCHEDULER = "scheduler"
    UI = "ui"
    AGENT_TOOL = "agent_tool"
    SDK = "sdk"
    TASK = "task"
    GRPC = "grpc"
    KAFKA = "kafka"
    NATS = "nats"
    AMQP = "amqp"


class Outcome(StrEnum):
    """
    How it ended, as far as the emitter knows.
    """

    SUCCESS = "success"
    FAILURE = "failure"
    DENIED = "denied"
    UNKNOWN = "unknown"


# --- what a code stands for ---------------------------------------------------------

_E = TypeVar("_E", bound=StrEnum)
_CODE: Final = r"[A-Z][A-Z0-9_]{0,127}"
_ACTION: Final = r"[a-z0-9][a-z0-9_]{0,127}"
_DOMAIN: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"
_OWN_DOMAIN: Final = "fasten"

OWN_CODES: Final = frozenset(
    (
        "AUDIT_READ",
        "AUDIT_ROWS_DROPPED",
        "AUDIT_ROW_ERASED",
        "AUDIT_ROW_QUARANTINED",
        "AUDIT_SELF_TEST",
        "AUDIT_STARTED",
        "CHAIN_RESTORED",
        "RETENTION_POLICY_CHANGED",
    )
)
"""Codes of fasten itself: no caller may register or emit them."""


def is_code(text: str) -> bool:
    """
    Say whether *text* has the form of a code: `^[A-Z][A-Z0-9_]*$`, 128 at most.
    """
    return re.fullmatch(_CODE, text) is not None


def _shown(value: object) -> str:
    if not isinstance(value, str | int | float | None):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _near(name: str, known: Iterable[str], otherwise: str) -> str:
    near = get_close_matches(name[:100], list(known), 1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def _enum(kind: type[_E], name: str, value: object, default: _E) -> _E:
    if value is ...:
        return default
    if isinstance(value, str) and value in kind.__members__.values():
        return kind(value)
    allowed = [member.value for member in kind]
    hint = _near(str(value), allowed, "write one of " + ", ".join(allowed))
    raise InvalidCodes(
        f"{name} {_shown(value)} is not one of the {kind.__name__}; {hint}"
    )


# One converter a field: `...` is its default, and its faults name it. attrs and the
# reader of codes files both go through these.


def _severity(value: str | EllipsisType) -> Severity:
    return _enum(Severity, "severity", value, Severity.INFO)


def _retention_class(value: str | EllipsisType) -> RetentionClass:
    return _enum(RetentionClass, "retention_class", value, RetentionClass.MEDIUM)


def _on_failure(value: str | EllipsisType) -> Literal["queue", "raise"]:
    match value:
        case EllipsisType() | "queue":
            return "queue"
        case "raise":
            return "raise"
    raise InvalidCodes(f"on_failure {_shown(value)} is not known; write queue or raise")


def _category(value: str | EllipsisType | None) -> str | None:
    return _optional("category", value, _DOMAIN, "letters, digits and _ . -")


def _domain(value: str | EllipsisType | None) -> str | None:
    return _optional("domain", value, _DOMAIN, "letters, digits and _ . -")


def _action(value: str | EllipsisType | None) -> str | None:
    return _optional("action", value, _ACTION, "a lower-case word, as in created")


def _id(value: str | EllipsisType | None) -> str | None:
    return _optional("id", value, _CODE, "the code itself, as in USER_CREATED")


def _optional(name: str, value: object, form: str, cure: str) -> str | None:
    if value is None or value is ...:
        return None
    if isinstance(value, str) and re.fullmatch(form, value):
        return str(value)
    raise InvalidCodes(f"{name} {_shown(value)} is not usable; write {cure}")


def _description(value: str | EllipsisType) -> str:
    return _prose("description", value)


def _emitter(value: str | EllipsisType) -> str:
    return _prose("emitter", value)


def _prose(name: str, value: object) -> str:
    if value is ...:
        return ""
    if isinstance(value, str):
        return str(value)
    raise InvalidCodes(f"{name} {_shown(value)} is not text; put it in quotes")


def _pii_in_detail(value: bool | EllipsisType) -> bool:  # noqa: FBT001
    if value is ...:
        return False
    if isinstance(value, bool):
        return value
    raise InvalidCodes(f"pii_in_detail {_shown(value)} is not true or false")


# --- what its detail holds ----------------------------------------------------------

_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "list": (list, tuple),
    "dict": (dict,),
}
_FIELD_KEYS: Final = frozenset(("type", "required", "optional"))


def _detail(
    value: Mapping[str, object] | EllipsisType | None,
) -> Mapping[str, str] | None:
    if value is None or value is ...:
        return None
    if not isinstance(value, Mapping):
        raise InvalidCodes(
            f"detail {_shown(value)} is not a mapping of fields to types"
        )
    return {_field_name(name): _field_type(name, spec) for name, spec in value.items()}


def _field_name(name: object) -> str:
    if isinstance(name, str) and name:
        return str(name)
    raise InvalidCodes(f"detail has a field named {_shown(name)}; put it in quotes")


def _field_type(name: str, spec: object) -> str:
    """
    Return the type's name, with a `?` behind it where the field may be missing.
    """
    if isinstance(spec, str) and spec.removesuffix("?") in _TYPES:
        return str(spec)
    if isinstance(spec, Mapping) and spec.keys() <= _FIELD_KEYS:
        is_optional = spec.get("optional", not spec.get("required", True))
        kind = spec.get("type")
        flags = (spec.get("required", True), spec.get("optional", False))
        if kind in list(_TYPES) and all(isinstance(flag, bool) for flag in flags):
            return f"{kind}{'?' if is_optional else ''}"
    raise InvalidCodes(
        f"detail field {_shown(name)} has the type {_shown(spec)}; write one of "
        f"{', '.join(_TYPES)}, with ? behind it if optional"
    )


@attrs.frozen
class Meta:
    """
    What a code stands for; strings are as good as enums, `...` means the default.

    *category* is the domain and *action* the code's last word unless given. *domain*
    and *id* may repeat what the code is registered under, and are checked then.
    *on_failure* `raise` makes its emit write at once. *detail* maps field names to
    `str int float bool list dict`, with a `?` behind the type of an optional one.

    Raises:
        InvalidCodes: a value is not one of those.
    """

    category: str | None = attrs.field(default=None, converter=_category)
    action: str | None = attrs.field(default=None, converter=_action)
    severity: Severity = attrs.field(default=Severity.INFO, converter=_severity)
    description: str = attrs.field(default="", converter=_description)
    emitter: str = attrs.field(default="", converter=_emitter)
    retention_class: RetentionClass = attrs.field(
        default=RetentionClass.MEDIUM, converter=_retention_class
    )
    pii_in_detail: bool = attrs.field(default=False, converter=_pii_in_detail)
    on_failure: Literal["queue", "raise"] = attrs.field(
        default="queue", converter=_on_failure
    )
    detail: Mapping[str, str] | None = attrs.field(default=None, converter=_detail)
    domain: str | None = attrs.field(default=None, converter=_domain, kw_only=True)
    id: str | None = attrs.field(default=None, converter=_id, kw_only=True)

    def check_detail(self, detail: object) -> list[str]:
        """
        Say what of *detail* does not fit the fields declared; [] if all does.

        The sentences name fields and types, never a value.
        """
        if self.detail is None:
            return []
        if not isinstance(detail, Mapping):
            return [f"detail is a {type(detail).__name__}, not a mapping"]
        problems = [
            problem
            for name, kind in self.detail.items()
            if (problem := _misfit(detail, name, kind))
        ]
        strangers = [name for name in detail if name not in self.detail]
        known = ", ".join(self.detail) or "none"
        return problems + [
            f"{_shown(name)} is no field of it; "
            + _near(str(name), self.detail, f"known are {known}")
            for name in strangers
        ]


def _misfit(detail: Mapping[str, object], name: str, kind: str) -> str | None:
    wanted = kind.removesuffix("?")
    value = detail.get(name)
    if value is None:
        return None if kind.endswith("?") else f"{name} is missing; give it a {wanted}"
    is_flag = isinstance(value, bool)
    if isinstance(value, _TYPES[wanted]) and is_flag == (wanted == "bool"):
        return None
    return f"{name} is a {type(value).__name__}, not a {wanted}"


class Entry(NamedTuple):
    """
    A registered code as `emit` needs it: plain strings, and most of them joined.

    *packed* is code, action, severity, category, domain and retention class, with
    NUL between them. *reserved* codes are looked at twice: fasten's own, which nobody
    may emit, and those whose detail is declared.
    """

    code: str
    action: str
    severity: str
    category: str
    domain: str
    retention_class: str
    on_failure: str
    pii_in_detail: bool
    packed: str
    reserved: bool

    def at(self, severity: str) -> Entry:
        """
        Return the entry with another *severity*.
        """
        if severity == self.severity:
            return self
        texts = (*self[:2], severity, *self[3:6])
        return self._replace(severity=severity, packed="\0".join(texts))


def entry_for(code: str, domain: str = "unregistered") -> Entry:
    """
    Return what *code* would be with every default, without registering it.
    """
    return _entry(_resolved(domain, code, Meta()))


def _entry(made: Meta) -> Entry:
    texts = (
        str(made.id),
        str(made.action),
        made.severity.value,
        str(made.category),
        str(made.domain),
        made.retention_class.value,
    )
    return Entry(
        *texts,
        on_failure=made.on_failure,
        pii_in_detail=made.pii_in_detail,
        packed="\0".join(texts),
        reserved=made.domain == _OWN_DOMAIN or made.detail is not None,
    )


def _resolved(domain: str, code: str, given: Meta) -> Meta:
    """
    Fill in what follows from *domain* and *code*; PII stays for the short class only.
    """
    kept = RetentionClass.SHORT if given.pii_in_detail else given.retention_class
    return attrs.evolve(
        given,
        category=given.category or domain,
        action=given.action or _last_word(code),
        retention_class=kept,
        domain=domain,
        id=code,
    )


def _last_word(code: str) -> str:
    return code.rstrip("_").rpartition("_")[2].lower()


# --- where definitions come from ------------------------------------------------------


class ConflictingCodes(InvalidCodes, CodeConflict):
    """
    Codes files have mistakes, and a conflict is one of them.
    """


_MAX_LINES: Final = 1_000


@attrs.define(eq=False, repr=False)
class _Faults:
    """
    The mistakes found so far, all of them for one error.
    """

    lines: list[str] = attrs.field(factory=list)
    has_conflict: bool = False

    def add(self, line: str) -> None:
        self.lines.append(line)

    def conflict(self, line: str) -> None:
        self.lines.append(line)
        self.has_conflict = True

    def raise_for_files(self) -> None:
        if self.lines:
            kind = ConflictingCodes if self.has_conflict else InvalidCodes
            raise kind(self._text())

    def raise_for_call(self) -> None:
        if self.lines:
            kind = CodeConflict if self.has_conflict else InvalidCodes
            raise kind(self._text())

    def _text(self) -> str:
        if len(self.lines) == 1:
            return self.lines[0]
        more = len(self.lines) - _MAX_LINES
        tail = [f"and {more} more"] if more > 0 else []
        head = f"{len(self.lines)} mistakes in codes:"
        return "\n  ".join((head, *self.lines[:_MAX_LINES], *tail))


@attrs.frozen(eq=False, repr=False)
class _Source:
    """
    The definitions of one file or one call, resolved.

    *lines* are where a file has them. *asked_for_more* are codes with PII that asked
    for a longer class than they get.
    """

    origin: str
    metas: dict[str, Meta]
    lines: dict[str, int] = attrs.field(factory=dict)
    asked_for_more: tuple[str, ...] = ()
    is_configured: bool = False
    entries: dict[str, Entry] = attrs.field(init=False)

    @entries.default
    def _entries(self) -> dict[str, Entry]:
        return {code: _entry(made) for code, made in self.metas.items()}

    def place(self, code: str) -> str:
        line = self.lines.get(code)
        return f"{self.origin}:{line}" if line else self.origin


def _check(domain: str, code: str, given: Meta, place: str, faults: _Faults) -> bool:
    """
    Say whether a caller may register *code* like this; note every reason why not.
    """
    before = len(faults.lines)
    if not is_code(code):
        faults.add(
            f"{place}: {_shown(code)} is not a code; write capitals, digits and _, as "
            f"in {_as_code(code)}"
        )
    if code in OWN_CODES or domain.lower() == _OWN_DOMAIN:
        faults.conflict(
            f"{place}: {_shown(code)} is fasten's own, as is its domain; choose another"
        )
    if given.id not in (None, code):
        faults.add(f"{place}: {code} has id {given.id!r}; drop id or make them equal")
    if given.domain not in (None, domain):
        faults.add(
            f"{place}: {code} has domain {given.domain!r} but stands under {domain!r}; "
            "drop one of the two"
        )
    return len(faults.lines) == before


def _as_code(text: str) -> str:
    words = re.sub(r"[^A-Za-z0-9]+", "_", re.sub(r"([a-z])([A-Z])", r"\1_\2", text))
    code = words.strip("_").upper()[:60]
    return code if is_code(code) else "USER_CREATED"


def _conflicts(made: Iterable[_Source], faults: _Faults) -> None:
    first: dict[str, _Source] = {}
    for source in made:
        for code, definition in source.metas.items():
            other = first.setdefault(code, source)
            if other.metas[code] != definition:
                faults.conflict(
                    f"{source.place(code)}: {code} is defined otherwise by "
                    f"{other.place(code)}; keep one of them, or rename one"
                )


# --- the registry ---------------------------------------------------------------------


class Registry:
    """
    All codes one engine knows: the standard catalogue below, users' own above.

    *entries* maps each code to its `Entry`. It is replaced whole, never changed in
    place, so that `emit` may read it while others register. There is no lock, for a
    process may fork at any moment: see `_publish`.
    """

    def __init__(self, catalogue: Path | None = None) -> None:
        self._catalogue = catalogue or _standard_catalogue()
        self._standard: _Source | None = None
        self._sources: dict[object, _Source] = {}
        self._metas: dict[str, Meta] = {}
        self._warned: set[str] = set()
        self._edition = object()
        self.entries: dict[str, Entry] = {}

    def ensure(self) -> None:
        """
        Read the standard catalogue, unless that was done already.

        Raises:
            InvalidCodes: it is missing or broken.
        """
        if self._standard is not None:
            return
        faults = _Faults()
        standard = _read_file(self._catalogue, faults, is_own=True)
        faults.raise_for_files()
        self._standard = standard
        self._publish()

    def register(self, domain: str, codes: Mapping[str, Meta]) -> None:
        """
        Define *codes* under *domain*; all of them, or none if one is wrong.

        The same definition again changes nothing; a standard code may be redefined.

        Raises:
            InvalidCodes: a name or a value is unusable.
            CodeConflict: a code is fasten's own, or defined otherwise elsewhere.
        """
        faults = _Faults()
        made = _from_call(domain, codes, faults)
        _conflicts([*self._sources.copy().values(), made], faults)
        faults.raise_for_call()
        if any(self._metas.get(code) != m for code, m in made.metas.items()):
            self._sources[object()] = made
            self._publish()
        self._warn([made])

    def load(self, *paths: str | os.PathLike[str]) -> None:
        """
        Define what codes files say; a file read before is read anew.

        Raises:
            InvalidCodes: one error for all mistakes of all files, each with file,
                line and cure. Nothing has been defined then.
            CodeConflict: the same error, if one of them is a conflict.
        """
        made = self._read({str(Path(path).absolute()): False for path in paths})
        self._warn(made)

    def configure(self, paths: Iterable[str]) -> None:
        """
        Define what the settings' files say, in place of those of earlier settings.

        Files given to `load` stay.

        Raises:
            InvalidCodes: as `load`; the earlier files' codes stay then.
        """
        wanted = [str(Path(path).absolute()) for path in paths]
        sources = self._sources.copy()
        configured = {key for key, source in sources.items() if source.is_configured}
        loaded = sources.keys() - configured
        fresh = {path: True for path in wanted if path not in loaded}
        self._warn(self._read(fresh, dropped=configured - set(wanted)))

    @property
    def configured(self) -> Mapping[object, object]:
        """
        Return what the settings' files say, by path: for `restore`.
        """
        sources = self._sources.copy()
        return {key: source for key, source in sources.items() if source.is_configured}

    def restore(self, configured: Mapping[object, Any]) -> None:
        """
        Take back what `configured` returned, in place of what was configured since.
        """
        for path in self.configured.keys() - configured.keys():
            self._sources.pop(path, None)
        self._sources.update(configured)
        self._publish()

    def reload(self) -> None:
        """
        Read every file anew; all or nothing.

        Raises:
            InvalidCodes: as `load`; every code is as it was then.
        """
        sources = self._sources.copy()
        files = {k: s.is_configured for k, s in sources.items() if isinstance(k, str)}
        self._warn(self._read(files))

    def discover(self, cwd: Path) -> tuple[str, ...]:
        """
        Return the codes files of *cwd*: `codes.yaml`, then `*.codes.yaml` by name.
        """
        found = [cwd / "codes.yaml", *sorted(cwd.glob("*.codes.yaml"))]
        return tuple(str(f) for f in found if f.is_file() and not self._is_standard(f))

    def dump(self) -> list[str]:
        """
        Return a line `id,domain,severity` for each code, sorted by id.
        """
        self.ensure()
        entries = sorted(self.entries.values())
        return [f"{e.code},{e.domain},{e.severity}" for e in entries]

    def meta(self, code: str) -> Meta:
        """
        Return what *code* stands for, every default filled in.

        Raises:
            UnknownCode: it is not registered.
        """
        self.ensure()
        made = self._metas.get(code) if isinstance(code, str) else None
        if made is None:
            raise self.unknown(code)
        return made

    def unknown(self, code: object) -> UnknownCode:
        """
        Return, not raise, the error that says *code* is not registered.
        """
        self.ensure()
        if not isinstance(code, str):
            return UnknownCode(
                f"unknown code: {_shown(code)} is no code; give text, as in "
                "'USER_CREATED'"
            )
        name = code if code in self.entries else _as_code(code)
        cure = f"register it: fasten.codes.register(domain, {{{name!r}: Meta()}})"
        hint = _near(name, self.entries, cure)
        return UnknownCode(f"unknown code {_shown(code)}; {hint}")

    def _read(
        self, files: Mapping[str, bool], dropped: Iterable[object] = ()
    ) -> list[_Source]:
        """
        Take *files* (path to whether it is of the settings) in, *dropped* sources out.
        """
        faults = _Faults()
        made = {
            path: _read_file(Path(path), faults, is_configured=is_configured)
            for path, is_configured in files.items()
            if not self._is_standard(Path(path))
        }
        gone = {*made, *dropped}
        kept = [s for key, s in self._sources.copy().items() if key not in gone]
        _conflicts([*kept, *made.values()], faults)
        faults.raise_for_files()
        for key in dropped:
            self._sources.pop(key, None)
        self._sources.update(made)
        self._publish()
        return list(made.values())

    def _publish(self) -> None:
        """
        Replace `entries` by what the sources say now.

        Who finds that the sources moved on while it was building builds again: the
        last to publish has seen every change, without a lock that a fork could take
        along.
        """
        mine = self._edition = object()
        while True:
            standard = [self._standard] if self._standard else []
            metas: dict[str, Meta] = {}
            entries: dict[str, Entry] = {}
            for source in [*standard, *self._sources.copy().values()]:
                metas.update(source.metas)
                entries.update(source.entries)
            self._metas, self.entries = metas, entries
            if mine is self._edition:
                return
            mine = self._edition

    def _is_standard(self, path: Path) -> bool:
        """
        Say whether *path* is the standard catalogue, or a copy: a checkout has both.
        """
        try:
            return path.samefile(self._catalogue) or (
                path.stat().st_size == self._catalogue.stat().st_size
                and path.read_bytes() == self._catalogue.read_bytes()
            )
        except OSError:
            return False

    def _warn(self, made: Iterable[_Source]) -> None:
        asked = {code for source in made for code in source.asked_for_more}
        fresh = sorted(asked - self._warned)
        self._warned.update(fresh)
        if fresh:
            warnings.warn(
                f"{', '.join(fresh)}: pii_in_detail forces the retention class short; "
                "write retention_class short there to say so yourself",
                UserWarning,
                stacklevel=3,
            )


def _standard_catalogue() -> Path:
    """
    Return where codes.yaml is: in the package, or one up in a source checkout.
    """
    inside = Path(__file__).with_name("codes.yaml")
    return inside if inside.exists() else inside.parent.parent / "codes.yaml"


def _from_call(domain: str, codes: Mapping[str, Meta], faults: _Faults) -> _Source:
    origin = f"register({_shown(domain)})"
    if not isinstance(domain, str) or not re.fullmatch(_DOMAIN, domain):
        faults.add(_unusable_domain(origin, domain))
        domain = _NO_DOMAIN
    metas: dict[str, Meta] = {}
    for code, given in codes.items():
        if not isinstance(given, Meta):
            faults.add(f"{origin}: {_shown(code)} is {_shown(given)}; give it a Meta")
        elif not isinstance(code, str):
            faults.add(f"{origin}: {_shown(code)} is not a code; give text")
        elif _check(domain, code, given, origin, faults):
            metas[str(code)] = _resolved(str(domain), str(code), given)
    asked = (
        c for c, m in metas.items() if m.retention_class != codes[c].retention_class
    )
    return _Source(origin, metas, asked_for_more=tuple(asked))


# Stands in for a domain that is a fault already, so that its codes are looked at too.
_NO_DOMAIN: Final = "unusable"


def _unusable_domain(place: str, domain: object) -> str:
    return (
        f"{place}: {_shown(domain)} is not a domain; write letters, digits and _ . -, "
        "as in commerce"
    )


# --- codes files --------------------------------------------------------------------

_MAX_FILE: Final = 1_048_576
_MAX_NODES: Final = 200_000
_TOP_KEYS: Final = ("domain", "codes", "domains")
_PLAIN_TAGS: Final = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_SPELLINGS: Final = (
    "write `domain: user` and `codes: {USER_CREATED: {}}`, "
    "or `domains: {user: {USER_CREATED: {}}}`"
)


def _read_file(
    path: Path, faults: _Faults, *, is_own: bool = False, is_configured: bool = False
) -> _Source:
    reader = _FileReader(path, faults, is_own=is_own)
    reader.read()
    return _Source(
        str(path),
        reader.metas,
        lines=reader.lines,
        asked_for_more=tuple(reader.asked_for_more),
        is_configured=is_configured,
    )


class _TooLargeError(Exception):
    """
    The file's aliases expand to more than any codes file holds.
    """


class _FileReader:
    """
    Reads one codes file, node by node: nodes know their lines and their duplicates.
    """

    def __init__(self, path: Path, faults: _Faults, *, is_own: bool) -> None:
        self._path = path
        self._faults = faults
        self._is_own = is_own
        self._nodes_left = _MAX_NODES
        self._construct: Callable[[Any], object] = lambda node: node.value
        self.metas: dict[str, Meta] = {}
        self.lines: dict[str, int] = {}
        self.asked_for_more: list[str] = []

    def read(self) -> None:
        """
        Read the file; whatever is wrong with it is among the faults afterwards.
        """
        import yaml  # not at import: most programs never read a codes file

        try:
            text = self._bytes()
            if text is None:
                return
            # The pure Python loader: deep nesting is an exception there, not a crash.
            loader = yaml.SafeLoader(text)
            self._construct = loader.construct_object
            self._document(loader.get_single_node())
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            self._fault(
                line, f"broken YAML: {error.problem}; see the lines above it too"
            )
        except (yaml.YAMLError, UnicodeError):
            self._fault(1, "not YAML: characters that no text has; save it as UTF-8")
        except (RecursionError, _TooLargeError):
            self._fault(1, "nested or repeated beyond measure; write it out plainly")

    def _bytes(self) -> bytes | None:
        try:
            if self._path.exists() and not self._path.is_file():
                raise OSError(0, "not a regular file")
            with self._path.open("rb") as file:
                text = file.read(_MAX_FILE + 1)
        except OSError as error:
            self._faults.add(
                f"{self._path}: cannot be read: {error.strerror}; name a readable file"
            )
            return None
        if len(text) > _MAX_FILE:
            self._faults.add(f"{self._path}: more than 1 MiB; split it by domain")
            return None
        return text

    def _fault(self, line: int, text: str) -> None:
        self._faults.add(f"{self._path}:{line}: {text}")

    def _document(self, root: Any) -> None:
        if root is None:
            self._fault(1, f"the file is empty; {_SPELLINGS}")
            return
        top = self._pairs(root, f"the file is not a mapping; {_SPELLINGS}")
        for key, (line, _) in top.items():
            if key not in _TOP_KEYS:
                hint = _near(key, _TOP_KEYS, _SPELLINGS)
                self._fault(line, f"unknown key {_shown(key)}; {hint}")
        if ("domain" in top) != ("codes" in top) or not top.keys() & set(_TOP_KEYS):
            self._fault(_line(root), f"domain and codes belong together; {_SPELLINGS}")
        if "domain" in top and "codes" in top:
            self._codes(self._plain(top["domain"][1]), *top["codes"])
        if "domains" in top:
            listed = self._pairs(
                top["domains"][1], f"domains is not a mapping; {_SPELLINGS}"
            )
            for domain, (line, node) in listed.items():
                self._codes(domain, line, node)

    def _codes(self, domain: object, line: int, node: Any) -> None:
        if not isinstance(domain, str) or not re.fullmatch(_DOMAIN, domain):
            self._faults.add(_unusable_domain(f"{self._path}:{line}", domain))
            domain = _NO_DOMAIN
        pairs = self._pairs(
            node, f"the codes of {domain} are not a mapping; {_SPELLINGS}"
        )
        for code, (at, body) in pairs.items():
            self._code(domain, code, at, body)

    def _code(self, domain: str, code: str, line: int, body: Any) -> None:
        given = self._meta(code, line, body)
        place = f"{self._path}:{line}"
        if not self._is_own and not _check(domain, code, given, place, self._faults):
            return
        if code in self.metas:
            first = self.lines[code]
            self._fault(
                line, f"{code} is defined twice, first in line {first}; keep one"
            )
            return
        self.metas[code] = made = _resolved(domain, code, given)
        self.lines[code] = line
        if made.retention_class != given.retention_class:
            self.asked_for_more.append(code)

    def _meta(self, code: str, line: int, body: Any) -> Meta:
        from cattrs import ClassValidationError  # as yaml

        if body.id == "scalar" and self._plain(body) is None:
            return Meta()  # `USER_CREATED:` and nothing behind it
        pairs = self._pairs(body, f"{code} is not a mapping; write {code}: {{}}")
        plain = {key: self._plain(node) for key, (_, node) in pairs.items()}
        try:
            return _structure()(plain)
        except ClassValidationError as error:
            for mistake in _mistakes(error.exceptions):
                self._fault(line, f"{code}: {mistake}")
            return Meta()

    def _pairs(self, node: Any, otherwise: str) -> dict[str, tuple[int, Any]]:
        """
        Return a mapping's keys with line and value; duplicates are faults.
        """
        if node.id != "mapping" or node.tag not in _PLAIN_TAGS:
            self._fault(_line(node), otherwise)
            return {}
        merged: dict[str, tuple[int, Any]] = {}
        own: dict[str, tuple[int, Any]] = {}
        for key_node, value in node.value:
            self._spend()
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged = {**self._merged(value), **merged}
                continue
            key, line = self._plain(key_node), _line(key_node)
            if not isinstance(key, str):
                self._fault(
                    line, f"the key {_shown(key)} is not text; put it in quotes"
                )
            elif key in own:
                first = own[key][0]
                self._fault(line, f"{_shown(key)} stands twice, first in line {first}")
            else:
                own[key] = (line, value)
        return {**merged, **own}

    def _merged(self, value: Any) -> dict[str, tuple[int, Any]]:
        """
        Return what `<<:` brings in; of several mappings the first wins.
        """
        parts = value.value if value.id == "sequence" else [value]
        found: dict[str, tuple[int, Any]] = {}
        for part in parts:
            found = {**self._pairs(part, "<< takes a mapping; give it one"), **found}
        return found

    def _plain(self, node: Any) -> object:
        """
        Return the value of *node*; one that has none is a fault and reads as default.
        """
        self._spend()
        if node.id == "scalar":
            return self._scalar(node)
        if node.tag not in _PLAIN_TAGS:
            self._fault(
                _line(node), f"the tag {_shown(node.tag)} is not allowed; drop it"
            )
            return ...
        if node.id == "sequence":
            return [self._plain(item) for item in node.value]
        pairs = self._pairs(node, "not a mapping")
        return {key: self._plain(value) for key, (_, value) in pairs.items()}

    def _scalar(self, node: Any) -> object:
        import yaml  # as above

        try:
            return self._construct(node)
        except (yaml.YAMLError, ValueError, OverflowError):
            text = f"{_shown(node.value)} cannot be read as {_shown(node.tag)}"
            self._fault(_line(node), f"{text}; drop the tag or put it in quotes")
            return ...

    def _spend(self) -> None:
        # Aliases let a few lines stand for billions; no real file comes near this.
        self._nodes_left -= 1
        if self._nodes_left < 0:
            raise _TooLargeError


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


@cache
def _structure() -> Callable[[Mapping[str, object]], Meta]:
    """
    Return what turns a file's mapping into a Meta and reports all that is wrong.
    """
    from cattrs import Converter  # as yaml
    from cattrs.gen import make_dict_structure_fn, override

    converter = Converter(detailed_validation=True)
    hooks: dict[str, Any] = {
        f.name: override(struct_hook=_hook(f)) for f in attrs.fields(Meta)
    }
    make = make_dict_structure_fn(
        Meta,
        converter,
        _cattrs_forbid_extra_keys=True,
        _cattrs_detailed_validation=True,
        **hooks,
    )
    return lambda given: make(given, Meta)


def _hook(field: attrs.Attribute[Any]) -> Callable[[object, object], Any]:
    check: Any = field.converter
    return lambda value, _type: check(value)


def _mistakes(errors: Iterable[BaseException]) -> Iterator[str]:
    names = [field.name for field in attrs.fields(Meta)]
    for error in errors:
        extra = getattr(error, "extra_fields", None)
        if extra is None:
            yield str(error)
        for name in sorted(extra or ()):
            hint = _near(name, names, f"known are {', '.join(names)}")
            yield f"unknown key {_shown(name)}; {hint}"


# --- the default registry -----------------------------------------------------------

registry: Final = Registry()
"""The registry of `fasten.init()`. Prefer one of your own for an engine of your own."""

register = registry.register
load = registry.load
reload = registry.reload
discover = registry.discover
dump = registry.dump
meta = registry.meta
