# SPDX-License-Identifier: Apache-2.0
"""
Keep secrets, and anything too large, too deep or too odd, out of every row.

Secret keys lose their whole value; values shaped like a secret become a mark. What
JSON has no form for is spelled, never raised on. When the rows are written, and
which of their texts come here, is decided elsewhere.

What a value becomes, besides itself:

* a secret key's value: the replacement, `***`; a key that counts tokens keeps numbers
* a text that holds a JWT, private key, AWS, GitHub, Stripe or OpenAI key, or a card
  number: the mark alone, `***JWT***`; the password in a URL: the replacement
* NaN and the infinities: `"NaN"`, `"Infinity"`, `"-Infinity"`; an integer beyond
  2**53 - 1: its digits as a string; NUL and lone surrogates: U+FFFD
* a time: UTC, as in a row's timestamp, and a naive one is UTC; a timedelta: `PT90S`
* bytes: their text if they are UTF-8, else `base64:...`
* an Enum: its value; Decimal, UUID, Path, IP address: their text; sets: sorted lists
* attrs, dataclass, pydantic, namedtuple: an object; what they hide from `repr` is
  replaced
* an exception: its type and message; any other object: `<TypeName>`, never its `repr`
* a key that is no string: its JSON text; keys that end up equal: `key`, `key_2`, ...
* what is too deep, refers to itself, raises, or does not fit: a mark of its own
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from itertools import accumulate, islice
from operator import itemgetter
from pathlib import PurePath
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID

from fasten.rows import canonical_json, canonical_number, quote

__all__ = ["MAX_ANCHOR", "MAX_DEPTH", "MAX_INTEGER", "Redactor"]

MAX_ANCHOR: Final = 4096
"""Characters of an anchor (target, actor, reason, ...); longer ones are cut."""

MAX_DEPTH: Final = 32
"""Objects and lists inside each other; deeper ones become a mark."""

MAX_INTEGER: Final = 2**53 - 1
"""The largest integer that every reader of JSON reads exactly."""

_CUT: Final = "***CUT***"
_CYCLE: Final = "***CYCLE***"
_TOO_DEEP: Final = "***TOO_DEEP***"
_UNREADABLE: Final = "***UNREADABLE***"
_TRUNCATED: Final = "_truncated"
_FAILED: Final = "_redaction_failed"
_CARD_MARK: Final = "***CC***"


# --- keys -------------------------------------------------------------------------

_SECRET_KEYS: Final = re.compile(
    "apikey|password|passwd|token|secret|authorization|bearer|m2mkey|certprivate"
    "|privatekey|accesskey|sessionid|cookie|credential"
).search
_NOTHING: Final = re.compile(r"(?!)").search
_COUNTS: Final = re.compile(
    r"tokens(?:_?used)?(?![a-z])"
    r"|token_?(?:counts?|usage|limit|budget|cost|total)(?![a-z])"
    r"|(?:count|number|num|max|min|total)_?token(?![a-z])"
)
_SEPARATORS: Final = re.compile(r"[\W_]+")
_BOUNDARY: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[\W_]+")
_KEEP, _SECRET, _COUNTER = range(3)
_COUNTABLE: Final = (int, float, type(None))
_LONGEST_MEMO: Final = 64
_MOST_KEYS: Final = 4096
_MOST_LAYOUTS: Final = 512


def _folded(key: str) -> str:
    """
    Reduce a key to its letters and digits: `API-Key`, `apiKey`, `api.key` are one.
    """
    if not key.isascii():
        key = unicodedata.normalize("NFKC", key).casefold()
    return _SEPARATORS.sub("", key.lower())


def _counts_tokens(key: str) -> bool:
    """
    Tell whether *key* is the name of a usage counter, such as `promptTokens`.
    """
    return _COUNTS.search(_BOUNDARY.sub("_", key).lower()) is not None


# --- value shapes -----------------------------------------------------------------

# Each pattern has a fixed length or stops at once: `search` stays linear on any text,
# and a whole value is replaced, so nothing has to be matched to its end.
_SHAPES: Final = (
    ("***PRIVATE_KEY***", re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY").search),
    ("***AWS_KEY***", re.compile(r"A[KS]IA[A-Z0-9]{16}").search),
    (
        "***GH_TOKEN***",
        re.compile(r"gh[posur]_[A-Za-z0-9]{20}|github_pat_[A-Za-z0-9_]{20}").search,
    ),
    ("***STRIPE_KEY***", re.compile(r"[rs]k_live_[A-Za-z0-9]{10}").search),
    (
        "***OPENAI_KEY***",
        # Not after a letter or digit: a `task-` id is no key.
        re.compile(
            r"(?<![A-Za-z0-9])sk-(?:(?:proj|svcacct|admin|ant)-[A-Za-z0-9_-]{20}"
            r"|(?:[A-Za-z0-9]{1,12}-){0,3}[A-Za-z0-9_]{20})"
        ).search,
    ),
)
# One match swallows a whole run of token characters, so that a long run of `eyJeyJ...`
# is read once, not once per `eyJ`. Only a match with a group is a JWT.
_JWT: Final = re.compile(
    r"eyJ[A-Za-z0-9_-]{8,}+(\.(?:eyJ[A-Za-z0-9_-]{4}|[A-Za-z0-9_-]*+\.[A-Za-z0-9_-]*))?+"
)
_JWT_MARK: Final = "***JWT***"
_MARKS: Final = {_JWT_MARK, _CARD_MARK, *(mark for mark, _ in _SHAPES)}
_JWT_CHARACTERS: Final = (
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-."
)

# The cheap question asked of every text: its characters are sorted into four kinds.
# Each secret, password in a URL and unstorable NUL has a character that is rare in
# names and hexadecimal ids, and only then is the text looked at again; 13 digits in a
# row, single separators among them, may be a card.
_KINDS: Final = bytes(
    48 if c in "0123456789 -" else 107 if c in "JVgk/\0" else 73 if c == "I" else 120
    for c in map(chr, range(256))
)
_RARE: Final = "k"
_IN_CAPITALS: Final = "I"  # CONFIG_UPDATED has one; an AWS key has it behind K or S
_SHORTEST_CARD: Final = "0" * 13
_SUSPECT: Final = re.compile(
    r"J(?<=eyJ)|I(?<=A[KS]I)A|PRIVATE KEY|gh[posur]_|github_pat_"
    r"|k(?:(?<=[rs]k)_live_|(?<=sk)(?<![A-Za-z0-9]sk)-)"
).search
_SHORTEST_SECRET: Final = 12
_SMALLEST_CARD: Final = 4_000_000_000_000

_OVERLAP: Final = 4096
"""How far past a cut a text is scanned, for a secret that the cut goes through."""

_CARD: Final = re.compile(
    r"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})"  # Visa
    r"|5[1-5][0-9]{14}"  # Mastercard, and its newer range
    r"|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{12}"
    r"|3[47][0-9]{13}"  # American Express
    r"|3(?:0[0-5]|[689][0-9])[0-9]{11}"  # Diners Club
    r"|35(?:2[89]|[3-8][0-9])[0-9]{12,15}"  # JCB
    r"|(?:6011|64[4-9][0-9]|65[0-9]{2})[0-9]{12,15}"  # Discover
    r"|62[0-9]{14,17}"  # UnionPay
    r"|(?:50[0-9]{2}|5[6-8][0-9]{2}|6304|67[0-9]{2})[0-9]{12,15}"  # Maestro
).fullmatch
_CARD_LENGTHS: Final = range(13, 20)
_NUMBER_RUN: Final = re.compile(r"(?<![0-9])(?<![0-9]\.)[0-9]+(?:[ -][0-9]+)*+")
# UUIDs and long hexadecimal or base64 words hold digits by chance.
_OPAQUE: Final = re.compile(
    r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}|[0-9A-Za-z]{30,}+"
)
# Luhn's sum, by the digits' values and by those of every second one doubled.
_VALUES: Final = bytes(n % 48 % 10 for n in range(256))
_DOUBLED: Final = bytes(b"\0\2\4\6\10\1\3\5\7\11"[n] for n in _VALUES)

_WORD: Final = re.compile(r"\S+")
# The part of a URL before its password; a port is none.
_USER: Final = re.compile(r"://[^/?#:\[\]]*:(?![0-9]{1,5}[/?#,])")
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")


def _secret(text: str, replacement: str, *, cards: bool) -> str | None:
    """
    Return what has to stand in the place of *text*, or None if it holds no secret.
    """
    return _told(text, _kinds(text), replacement, cards=cards)


def _kinds(text: str) -> str:
    # Back to `str`, where `in` takes a tenth of the time.
    return text.encode().translate(_KINDS).decode()


def _told(text: str, kinds: str, replacement: str, *, cards: bool) -> str | None:
    mark = None
    if _may_be_secret(text, kinds) and _is_suspect(text):
        mark = _shape(text)
    if mark is None and cards and _SHORTEST_CARD in kinds and _holds_card(text):
        mark = _CARD_MARK
    if mark is None and "@" in text and "://" in text:
        hidden = _hide_passwords(text, replacement)
        return hidden if hidden != text else None
    return mark


def _may_be_secret(text: str, kinds: str) -> bool:
    return _RARE in kinds or (
        _IN_CAPITALS in kinds and ("KIA" in text or "SIA" in text)
    )


def _is_suspect(text: str) -> bool:
    """
    Tell whether *text* may hold a secret, cards and passwords of URLs excepted.

    Looking for fixed parts costs half of what the pattern does.
    """
    return (
        "gh" in text
        or "sk-" in text
        or "eyJ" in text
        or "KIA" in text
        or "SIA" in text
        or "k_live_" in text
        or "github_pat_" in text
        or "PRIVATE KEY" in text
    ) and _SUSPECT(text) is not None


def _shape(text: str) -> str | None:
    """
    Return the mark of the first kind of secret in *text*, cards excepted.
    """
    for mark, search in _SHAPES:
        if search(text):
            return mark
    return _JWT_MARK if any(m[1] for m in _JWT.finditer(text)) else None


def _holds_card(text: str) -> bool:
    runs = _NUMBER_RUN.finditer(_OPAQUE.sub("x", text))
    return any(_run_holds_card(m[0]) for m in runs if len(m[0]) >= len(_SHORTEST_CARD))


def _run_holds_card(run: str) -> bool:
    """
    Try each stretch of whole groups: `4111 1111 1111 1111 12` is a card and a month.
    """
    groups = run.replace("-", " ").split(" ")
    digits = "".join(groups)
    ends = list(accumulate(map(len, groups)))
    reached = set(ends)
    return any(
        _is_card(digits[start : start + length])
        for start in (0, *ends[:-1])
        if digits[start] in "23456"
        for length in _CARD_LENGTHS
        if start + length in reached
    )


def _is_card(digits: str) -> bool:
    if len(digits) not in _CARD_LENGTHS or not _CARD(digits):
        return False
    last_first = digits[::-1].encode()
    total = sum(last_first[::2].translate(_VALUES))
    return (total + sum(last_first[1::2].translate(_DOUBLED))) % 10 == 0


def _hide_passwords(text: str, replacement: str) -> str:
    """
    Replace the password of every URL in *text*: a DSN is a secret.
    """

    def hide(word: re.Match[str]) -> str:
        at = word[0].rfind("@")
        user = _USER.search(word[0], 0, at) if at > 0 else None
        if user is None or user.end() == at:
            return word[0]
        return f"{word[0][: user.end()]}{replacement}{word[0][at:]}"

    return _WORD.sub(hide, text)


def _without_half_secret(text: str) -> str:
    """
    Drop from the end of a cut text what may be the first half of a secret.

    Only those of any length are looked for: shorter ones were found whole, by
    scanning past the cut.
    """
    half = text.find("eyJ", len(text.rstrip(_JWT_CHARACTERS)))
    if half >= 0:
        return text[:half]
    url = text.rfind("://")
    if url >= 0 and not _WORD.fullmatch(text, url):
        return text
    user = _USER.match(text, url) if url >= 0 else None
    return text[: user.end()] if user else text


# --- the redactor -----------------------------------------------------------------


class _Unusual(Exception):
    """
    The quick way does not cover this value; the careful one does.
    """


class _Full(Exception):
    """
    The value does not fit as it is.
    """


class _Key(NamedTuple):
    """
    A key as it is written, its bytes as JSON, and what becomes of its value.
    """

    name: str
    size: int
    verdict: int


class _Layout(NamedTuple):
    """
    What is known of all objects with the same keys in the same order.

    *pieces* is the canonical text, with a gap for each value that *pick* gets in
    canonical order; secret keys stand in it with their replacement, as in *hidden*.
    *counters* are the places in what *pick* gets that must be numbers.
    """

    pick: Callable[[Any], Sequence[Any]]
    pieces: list[str]
    counters: tuple[int, ...]
    hidden: dict[str, str]


class _Form(NamedTuple):
    """
    What is known of all fields with the same keys in the same order.

    *texts* gets the values that have always been strings, *others* all else but the
    objects within, whose names are *inner*. *hidden* is put in the place of secrets.
    """

    texts: Callable[[Any], Sequence[Any]]
    others: Callable[[Any], Sequence[Any]] | None
    inner: tuple[str, ...]
    counters: tuple[str, ...]
    hidden: dict[str, str]
    loose: frozenset[str]


_SCALARS: Final = (int, float, bool, type(None))
_WORDS: Final = {True: "true", False: "false", None: "null"}
_WIDE: Final = 32
_LONG: Final = 4096
_NESTED: Final = 2
"""What the quick way covers: entries, characters, levels below the top."""


class Redactor:
    """
    Redact, encode and bound what callers give; its methods never raise.

    Args:
        keys: more names of secret keys; the default ones always stay.
        replacement: what a secret key's value becomes.
        max_bytes: of a detail's text in UTF-8, at least 256.
    """

    def __init__(
        self,
        keys: Iterable[str] = (),
        replacement: str = "***",
        max_bytes: int = 65536,
    ) -> None:
        self._replacement = _UNSTORABLE.sub("\ufffd", replacement)[:64]
        self._max_bytes = max_bytes
        self._own_keys: tuple[str, ...] = ()
        self.extend(keys)

    def extend(self, keys: Iterable[str]) -> None:
        """
        Treat *keys* as secret too, in any case, with or without separators.
        """
        self._own_keys += tuple(filter(None, map(_folded, keys)))
        own = re.compile("|".join(map(re.escape, self._own_keys)))
        self._is_own = own.search if self._own_keys else _NOTHING
        # Of keys only: a memo of values would keep secrets.
        self._keys: dict[str, _Key] = {}
        self._layouts: dict[tuple[str, ...], _Layout] = {}
        # As plain tuples: those are taken apart at half the cost.
        self._forms: dict[tuple[str, ...], tuple[Any, ...]] = {}

    def encode(self, detail: object) -> str:
        """
        Return *detail* as the canonical JSON text (RFC 8785) of an object.

        What is not an object is wrapped as `{"value": ...}`. Over *max_bytes* it is
        cut to what fits, short values first, and marked with `"_truncated": true`.
        """
        if detail is None:
            return "{}"
        try:
            if type(detail) is dict:
                return self._quick(detail)
        except Exception:
            # _Unusual, or the caller's own code or threads at work: take care.
            pass
        try:
            return canonical_json(self._copy(detail))
        except Exception:
            return f'{{"{_FAILED}":true}}'

    def clean(self, fields: Mapping[str, object]) -> dict[str, Any]:
        """
        Return a redacted copy of *fields*, of plain values and in their order.

        For log events and api rows; the rules and bounds of `encode`.
        """
        return self.tidy(fields.copy() if type(fields) is dict else fields)

    # Each step is a tenth of a log line's cost: one function, and what C can do at
    # once, C does.
    def tidy(self, fields: Mapping[str, object]) -> dict[str, Any]:
        """
        Return what `clean` does; it may be *fields* itself, changed, if that is a dict.
        """
        try:
            if type(fields) is dict:
                strings: list[Any] = []
                parts: list[dict[str, Any]] = [fields]
                forms = self._forms
                for part in parts:
                    form = forms.get(tuple(part)) or self._learn_form(part)
                    texts, others, inner, counters, hidden, _ = form
                    if hidden:
                        part.update(hidden)
                    strings += texts(part)
                    for value in others(part) if others else ():
                        kind = type(value)
                        if kind is int or kind is float:
                            if not -_SMALLEST_CARD < value < _SMALLEST_CARD:
                                _integer(value) if kind is int else _float(value)
                        elif kind is str:
                            strings.append(value)
                        elif value is not None and kind is not bool:
                            self._learn_form(part, form)
                            raise _Unusual
                    if counters:
                        _require_countable(part, counters)
                    if inner:
                        parts += _copied(part, inner, len(parts))
                text = self._join(strings, parts)
                kinds = text.encode().translate(_KINDS).decode()
                # A character takes six bytes at most; a key, or a number in its
                # place, 230. Most need not be counted.
                if (
                    6 * len(text) + 230 * _WIDE * len(parts) > self._max_bytes
                    and 6 * len(text) + 230 * sum(map(len, parts)) > self._max_bytes
                ):
                    raise _Unusual
                if (
                    _RARE not in kinds
                    and _SHORTEST_CARD not in kinds
                    and _IN_CAPITALS not in kinds
                ) or ("\0" not in text and _told(text, kinds, "", cards=True) is None):
                    return fields
        except Exception:
            # As in `encode`.
            pass
        try:
            return self._copy(fields)
        except Exception:
            return {_FAILED: True}

    def anchor(self, value: str) -> str:
        """
        Return *value* without secrets; card numbers stay, since IMEIs look like them.

        NUL and lone surrogates become U+FFFD; it is cut at `MAX_ANCHOR` characters.
        """
        try:
            if (
                type(value) is str
                and (
                    len(value) < _SHORTEST_SECRET
                    or (len(value) <= MAX_ANCHOR and _is_harmless(value))
                )
                and value.isascii()
                and value.isprintable()
            ):
                return value
            return self._anchor(value)
        except Exception:
            # No string, or a subclass with ideas of its own.
            return _UNREADABLE

    def _anchor(self, value: str) -> str:
        given = str.__str__(value)
        text = self.scrub(given[: MAX_ANCHOR + _OVERLAP], cards=False)
        if text in _MARKS or max(len(given), len(text)) <= MAX_ANCHOR:
            return text
        return _without_half_secret(text[: MAX_ANCHOR - len(_CUT)]) + _CUT

    # --- what the careful way asks, too ---

    @property
    def replacement(self) -> str:
        """
        What a secret key's value becomes.
        """
        return self._replacement

    def scrub(self, text: str, *, cards: bool = True) -> str:
        """
        Return *text* with what cannot be stored replaced, or the mark of its secret.
        """
        if not text.isascii() or "\0" in text:
            text = _UNSTORABLE.sub("\ufffd", text)
        if len(text) < _SHORTEST_SECRET:
            return text
        return _secret(text, self._replacement, cards=cards) or text

    def key(self, text: str) -> _Key:
        """
        Return what is to be known of a key; *text* may be of any length.
        """
        known = self._keys.get(text)
        if known is not None:
            return known
        name = self.scrub(text)
        key = _Key(name, _size(name), self._judge(text))
        if _is_plain_key(text):
            _remember(self._keys, text, key, _MOST_KEYS)
        return key

    def _judge(self, key: str) -> int:
        folded = _folded(key)
        if self._is_own(folded):
            return _SECRET
        if not _SECRET_KEYS(folded):
            return _KEEP
        is_token_only = not _SECRET_KEYS(folded.replace("token", "-"))
        return _COUNTER if is_token_only and _counts_tokens(key) else _SECRET

    def _copy(self, given: object) -> dict[str, Any]:
        try:
            return _Walk(self, self._max_bytes, is_strict=True).top(given)
        except _Full:
            room = self._max_bytes - len(f'"{_TRUNCATED}":true,')
            copied = _Walk(self, room, is_strict=False).top(given)
            return {**copied, _TRUNCATED: True}

    # --- the quick way ---

    def _quick(self, detail: dict[str, object]) -> str:
        strings: list[str] = []
        text = self._object(detail, strings, _NESTED)
        if strings:
            self._require_clean("\n".join(strings))
        size = len(text) if text.isascii() else len(text.encode())
        if size > self._max_bytes or ("\\" in text and "\\u0000" in text):
            raise _Unusual
        return text

    def _join(self, strings: list[Any], parts: list[dict[str, Any]]) -> str:
        """
        Join what was to be strings; note of *parts* which of their values are none.
        """
        try:
            return "\n".join(strings)
        except TypeError:
            for part in parts:
                self._learn_form(part, self._forms.get(tuple(part)))
            raise _Unusual from None

    def _learn_form(
        self, fields: dict[str, Any], known: tuple[Any, ...] | None = None
    ) -> tuple[Any, ...]:
        """
        Note of which types the values are; *known* is what was noted before.
        """
        names = tuple(fields)
        if len(names) > _WIDE or not all(map(_is_plain_key, names)):
            raise _Unusual
        verdicts = {name: self.key(name).verdict for name in names}
        hidden = {n: self._replacement for n in names if verdicts[n] == _SECRET}
        kinds = {name: type(value) for name, value in {**fields, **hidden}.items()}
        inner = {name for name in names if kinds[name] is dict}
        loose = {name for name in names if kinds[name] is not str}
        if known is not None:
            inner.update(_Form(*known).inner)
            loose.update(_Form(*known).loose)
        others = [name for name in names if name in loose - inner]
        made = _Form(
            texts=_picker([name for name in names if name not in loose]),
            others=_picker(others) if others else None,
            inner=tuple(inner),
            counters=tuple(n for n in names if verdicts[n] == _COUNTER),
            hidden=hidden,
            loose=frozenset(loose),
        )
        form = tuple(made)
        _remember(self._forms, names, form, _MOST_LAYOUTS)
        return form

    def _require_clean(self, joined: str) -> None:
        if _secret(joined, self._replacement, cards=True) is not None:
            raise _Unusual

    def _object(self, given: dict[Any, Any], strings: list[str], depth: int) -> str:
        if len(given) > _WIDE or len(strings) > _WIDE:
            raise _Unusual
        names = tuple(given)
        pick, pieces, counters, _ = self._layouts.get(names) or self._learn(names)
        values = pick(given)
        if counters:
            _require_numbers(values, counters)
        pieces = pieces.copy()
        gap = -1
        for value in values:
            gap += 2
            kind = type(value)
            if kind is str:
                if len(value) >= _SHORTEST_SECRET:
                    strings.append(value if len(value) <= _LONG else _give_up())
                pieces[gap] = quote(value)
            elif kind is int and 0 <= value < _SMALLEST_CARD:
                pieces[gap] = str(value)
            elif kind is float:
                text = repr(value)
                is_same = text[-1] != "0" and 1e-4 <= value < 1e12
                pieces[gap] = text if is_same else _float(value)
            elif kind is bool or value is None:
                pieces[gap] = _WORDS[value]
            elif kind is dict and depth:
                pieces[gap] = self._object(value, strings, depth - 1)
            else:
                pieces[gap] = self._part(value, strings, depth)
        return "".join(pieces)

    def _part(self, value: Any, strings: list[str], depth: int) -> str:
        """
        Encode one value, as `_object` does for most.
        """
        spell = _SPELL_EXACTLY.get(type(value))
        if spell is not None:
            text = spell(value)
            if len(text) >= _SHORTEST_SECRET:
                strings.append(text if len(text) <= _LONG else _give_up())
            return quote(text)
        if value is None or value is True or value is False:
            return _WORDS[value]
        if type(value) is int:
            return _integer(value)
        if type(value) is float:
            return _float(value)
        if not depth:
            raise _Unusual
        if type(value) is dict:
            return self._object(value, strings, depth - 1)
        if type(value) is list or type(value) is tuple:
            return self._array(value, strings, depth - 1)
        if isinstance(value, Enum):
            return self._part(value.value, strings, depth - 1)
        raise _Unusual

    def _array(self, given: Sequence[Any], strings: list[str], depth: int) -> str:
        if len(given) > _WIDE or len(strings) > _WIDE:
            raise _Unusual
        parts = [self._part(value, strings, depth) for value in given]
        return f"[{','.join(parts)}]"

    def _learn(self, names: tuple[Any, ...]) -> _Layout:
        if not all(map(_is_plain_key, names)):
            raise _Unusual
        kept: list[str] = []
        counters: list[int] = []
        pieces = [""]
        for name in sorted(names):
            pieces[-1] += f"{',' if pieces != [''] else '{'}{quote(name)}:"
            verdict = self.key(name).verdict
            if verdict == _SECRET:
                pieces[-1] += quote(self._replacement)
                continue
            if verdict == _COUNTER:
                counters.append(len(kept))
            kept.append(name)
            pieces += ["", ""]
        pieces[-1] += "}" if names else "{}"
        secrets = [name for name in names if self.key(name).verdict == _SECRET]
        hidden = dict.fromkeys(secrets, self._replacement)
        layout = _Layout(_picker(kept), pieces, tuple(counters), hidden)
        _remember(self._layouts, names, layout, _MOST_LAYOUTS)
        return layout


_K = TypeVar("_K")
_V = TypeVar("_V")


def _remember(memo: dict[_K, _V], key: _K, value: _V, most: int) -> None:
    # Keys may come from outside: what grows without end is started over.
    if len(memo) >= most:
        memo.clear()
    memo[key] = value


def _give_up() -> Any:
    raise _Unusual


def _is_harmless(text: str) -> bool:
    """
    Tell cheaply that *text* is no secret; False only means that it may be one.
    """
    return not _SUSPECT(text) and "://" not in text


def _is_plain_key(name: object) -> bool:
    """
    Tell whether *name* may be kept in memory, and sorts like its UTF-16.
    """
    return (
        type(name) is str
        and len(name) <= _LONGEST_MEMO
        and name.isprintable()
        and max(name, default="") < "\ud800"
        and _secret(name, "", cards=True) is None
    )


def _picker(names: Sequence[str]) -> Callable[[Any], Sequence[Any]]:
    if len(names) > 1:
        return itemgetter(*names)
    if not names:
        return _pick_nothing
    get = itemgetter(names[0])
    return lambda given: (get(given),)


def _pick_nothing(_given: Any) -> Sequence[Any]:
    return ()


def _require_countable(part: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if type(part[name]) not in _COUNTABLE:
            raise _Unusual


def _copied(part: dict[str, Any], names: Iterable[str], known: int) -> list[Any]:
    """
    Replace the objects in *part* by copies, and return these; *known* are there.
    """
    copies = []
    for name in names:
        value = part[name]
        if type(value) is dict and known <= _NESTED:
            part[name] = value = value.copy()
            copies.append(value)
        elif value is not None:
            raise _Unusual
    return copies


def _require_numbers(values: Sequence[Any], places: Iterable[int]) -> None:
    for place in places:
        if type(values[place]) is not int and type(values[place]) is not float:
            raise _Unusual


def _integer(value: Any) -> str:
    text = str(value) if -MAX_INTEGER <= value <= MAX_INTEGER else ""
    if not text or _is_card(text):
        raise _Unusual
    return text


def _float(value: Any) -> str:
    text = canonical_number(value)
    if _is_card(text):
        raise _Unusual
    return text


# --- the careful way --------------------------------------------------------------

_HIDDEN: Final = object()
_BROKEN: Final = object()
_LARGEST_INTEGER_BITS: Final = 2048
_BULKY: Final = 256


class _Walk:
    """
    One copy of one value into plain values, charged by what its text will take.

    A strict walk raises _Full where something does not fit; the other one leaves it
    out. *room* is in bytes of canonical JSON; *work* also counts what is read and
    then replaced, so that a value full of secrets is no way round the bound.
    """

    def __init__(self, redactor: Redactor, room: int, *, is_strict: bool) -> None:
        self._redactor = redactor
        self._room = room
        self._work = 4 * (room + _OVERLAP)
        self._is_strict = is_strict
        # The smallest value that has to fit before it is begun: any number or mark.
        self._least = 0 if is_strict else max(40, _size(redactor.replacement))
        self._path: set[int] = set()

    def top(self, given: object) -> dict[str, Any]:
        """
        Copy *given* as an object; what is none is wrapped.
        """
        if not issubclass(type(given), dict):
            self._room -= len('{"value":}')
        copied = self.value(given, 0)
        if self._room < 0:
            self._leave_out()
        return copied if type(copied) is dict else {"value": copied}

    def value(self, given: object, depth: int) -> Any:
        """
        Copy any value; one that raises becomes a mark.
        """
        room = self._room
        try:
            return self._value(given, depth)
        except _Full:
            raise
        except Exception:
            # The caller's own code: properties, iterators, `__str__`.
            self._room = room
            return self._text(_UNREADABLE)

    def _value(self, given: Any, depth: int) -> Any:
        kind = type(given)
        self._work -= 1
        if kind is str:
            return self._text(given)
        if kind is int:
            return self._integer(given)
        if kind is float:
            return self._float(given)
        if given is None or kind is bool:
            self._room -= 5 if given is False else 4
            return given
        if given is _HIDDEN:
            return self._text(self._redactor.replacement)
        if given is _BROKEN:
            return self._text(_UNREADABLE)
        text = _spelled(given)
        if text is not None:
            return self._text(text)
        return self._compound(given, depth)

    def _compound(self, given: Any, depth: int) -> Any:
        if depth >= MAX_DEPTH:
            return self._text(_TOO_DEEP)
        if isinstance(given, bytes | bytearray | memoryview):
            return self._bytes(given)
        inner = _inner(given)
        if inner is not given:
            return self.value(inner, depth + 1)
        if id(given) in self._path:
            return self._text(_CYCLE)
        self._path.add(id(given))
        try:
            return self._container(given, depth)
        finally:
            self._path.discard(id(given))

    def _container(self, given: Any, depth: int) -> Any:
        # Nothing takes less than two bytes: what is past this could never fit.
        limit = max(self._room, 0) // 2 + 2
        pairs = _pairs(given, limit)
        if pairs is not None:
            return self._object(pairs, depth)
        elements = _elements(given, limit)
        if elements is None:
            return self._text(f"<{type(given).__name__[:64]}>")
        copied = self._array(elements, depth)
        return sorted(copied, key=canonical_json) if _is_set(given) else copied

    def _object(self, pairs: list[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        if depth == 0 and not self._is_strict:
            pairs.sort(key=_is_bulky)
        copied: dict[str, Any] = {}
        self._room -= 2
        for key, value in pairs:
            if self._is_out():
                break
            self._entry(copied, key, value, depth)
        return copied

    def _entry(self, copied: dict[str, Any], key: Any, value: Any, depth: int) -> None:
        text = _key_text(key)
        self._work -= min(len(text), max(self._room, 0)) + 1
        if len(text) > self._room:
            return self._leave_out()
        name, size, verdict = self._redactor.key(text)
        if name in copied:
            name = self._numbered(name, copied)
            size = _size(name)
        size += 2 if copied else 1
        if self._room - size < self._least:
            return self._leave_out()
        self._room -= size
        if verdict == _SECRET or (verdict == _COUNTER and not _is_count(value)):
            value = _HIDDEN
        copied[name] = self.value(value, depth + 1)
        return None

    def _array(self, elements: Iterable[Any], depth: int) -> list[Any]:
        copied: list[Any] = []
        self._room -= 2
        for element in elements:
            if self._is_out():
                break
            self._room -= 1 if copied else 0
            copied.append(self.value(element, depth + 1))
        return copied

    def _text(self, text: str) -> str:
        window = text[: max(self._room, 0) + _OVERLAP]
        self._work -= len(window)
        shown = self._redactor.scrub(window)
        size = _size(shown)
        is_part = len(window) < len(text) and shown not in _MARKS
        if is_part or size > self._room:
            self._leave_out()
            shown = _cut(shown, self._room)
            size = _size(shown)
        self._room -= size
        return shown

    def _bytes(self, given: bytes | bytearray | memoryview) -> str:
        raw = bytes(given[: max(self._room, 0) + _OVERLAP])
        try:
            return self._text(raw.decode())
        except UnicodeDecodeError:
            # Base64 would hide a secret from the eyes of `scrub`.
            latin = raw.decode("latin-1")
            shown = self._redactor.scrub(latin.replace("\0", " "), cards=False)
            if shown in _MARKS:
                return self._text(shown)
            return self._text(f"base64:{b64encode(raw).decode()}")

    def _integer(self, given: int) -> Any:
        if not -MAX_INTEGER <= given <= MAX_INTEGER:
            bits = given.bit_length()
            if bits > _LARGEST_INTEGER_BITS:
                return self._text(f"<int of {bits} bits>")
            return self._text(str(given))
        return self._number(given, str(given))

    def _float(self, given: float) -> Any:
        if given - given != 0:
            return self._text(_NOT_FINITE[str(given)])
        return self._number(given, canonical_number(given))

    def _number(self, given: float, text: str) -> Any:
        if _is_card(text):
            return self._text(_CARD_MARK)
        self._room -= len(text)
        return given

    def _numbered(self, name: str, taken: Mapping[str, object]) -> str:
        number = len(taken) + 1
        while f"{name}_{number}" in taken:
            number += 1
            self._work -= 1
        return f"{name}_{number}"

    def _is_out(self) -> bool:
        if self._room >= self._least and self._work > 0:
            return False
        self._leave_out()
        return True

    def _leave_out(self) -> None:
        if self._is_strict:
            raise _Full


_NOT_FINITE: Final = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def _size(text: str) -> int:
    return len(quote(text).encode())


def _cut(text: str, room: int) -> str:
    """
    Cut *text* and mark it, so that it takes no more than *room* bytes as JSON.
    """
    room -= _size(_CUT)
    text = text[: max(room, 0)]
    while text and (size := _size(text) - 2) > room:
        # Most texts are even: one step. Each takes a sixteenth at least.
        text = text[: len(text) * room // size * 15 // 16]
    return _without_half_secret(text) + _CUT


def _is_bulky(pair: tuple[Any, Any]) -> bool:
    kind = type(pair[1])
    return kind not in _SCALARS and (kind is not str or len(pair[1]) > _BULKY)


def _is_count(value: Any) -> bool:
    # None hides nothing: what was not counted.
    return value is None or _is_number(value)


def _is_number(value: Any) -> bool:
    value = _inner(value)
    return isinstance(value, int | float | Decimal) and type(value) is not bool


def _is_set(given: object) -> bool:
    return isinstance(given, AbstractSet)


def _key_text(key: Any) -> str:
    if type(key) is str:
        return key
    try:
        key = _inner(key)
        if isinstance(key, bytes):
            return key.decode("utf-8", "replace")
        if key is None or type(key) in _SCALARS:
            return canonical_json(key)
        text = _spelled(key)
        return text if text is not None else f"<{type(key).__name__[:64]}>"
    except Exception:
        # A key with code of its own, NaN, or too many digits.
        return _UNREADABLE


# --- what values are --------------------------------------------------------------

_AS_STR: Final = (
    Decimal,
    Fraction,
    UUID,
    PurePath,
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)


def _spelled(given: Any) -> str | None:
    """
    Return the text of a value that is one text, or None.
    """
    if isinstance(given, Enum):
        # Whatever else it is a child of, its value is what counts.
        return None
    if isinstance(given, str):
        return str.__str__(given)
    if isinstance(given, datetime):
        return _utc(given)
    if isinstance(given, date | time):
        return given.isoformat()
    if isinstance(given, timedelta):
        return _iso_duration(given)
    return str(given) if isinstance(given, _AS_STR) else None


def _utc(moment: datetime) -> str:
    try:
        # A zone without an offset is none: `astimezone` would take the machine's.
        moment = moment.astimezone(UTC) if moment.utcoffset() is not None else moment
    except OverflowError:
        # The first and last day of time, in a zone that reaches past them.
        return datetime.isoformat(moment)
    naive = moment.replace(tzinfo=None)
    return f"{datetime.isoformat(naive, timespec='microseconds')}Z"


def _iso_duration(span: timedelta) -> str:
    seconds, micros = divmod(abs(span) // timedelta(microseconds=1), 1_000_000)
    fraction = f".{micros:06d}".rstrip("0") if micros else ""
    return f"{'-' if span < timedelta() else ''}PT{seconds}{fraction}S"


_SPELL_EXACTLY: Final[Mapping[type, Callable[[Any], str]]] = {
    str: str,
    datetime: _utc,
    date: date.isoformat,
    timedelta: _iso_duration,
    Decimal: str,
    UUID: str,
}
"""What `_spelled` says of the exact types that are common in details."""


def _inner(given: Any) -> Any:
    """
    Return what *given* stands for: an Enum's value, a NumPy scalar's, an int's.
    """
    if isinstance(given, Enum):
        return given.value
    if isinstance(given, int) and type(given) not in (bool, int):
        return int.__int__(given)
    if isinstance(given, float) and type(given) is not float:
        return float.__float__(given)
    item = getattr(type(given), "item", None)
    if item is not None and hasattr(given, "dtype") and given.ndim == 0:
        plain = item(given)
        return plain if type(plain) is not type(given) else given
    return given


def _pairs(given: Any, limit: int) -> list[tuple[Any, Any]] | None:
    """
    Return the entries or fields of what becomes an object, or None.
    """
    kind = type(given)
    if isinstance(given, dict):
        return _snapshot(lambda: dict.items(given), limit)
    if isinstance(given, Mapping):
        return [(key, _read(given.__getitem__, key)) for key in islice(given, limit)]
    if isinstance(given, BaseException):
        return [("type", kind.__name__), ("message", _read(str, given))]
    if hasattr(kind, "_asdict"):
        return list(given._asdict().items())
    if hasattr(kind, "__attrs_attrs__"):
        return _attributes(given, kind.__attrs_attrs__)
    if hasattr(kind, "__dataclass_fields__"):
        return _attributes(given, dataclasses.fields(given))
    if hasattr(kind, "model_dump"):
        return _dumped(given, getattr(kind, "model_fields", {}))
    return None


def _attributes(given: Any, fields: Iterable[Any]) -> list[tuple[Any, Any]]:
    # What a class keeps out of its `repr`, or spells its own way there, is a secret.
    get = partial(getattr, given)
    return [(f.name, _read(get, f.name) if f.repr is True else _HIDDEN) for f in fields]


def _dumped(given: Any, fields: Mapping[str, Any]) -> list[tuple[Any, Any]] | None:
    dumped = given.model_dump()
    if not isinstance(dumped, dict):
        return [("value", dumped)]
    hidden = {n for n, f in fields.items() if not getattr(f, "repr", True)}
    return [(key, _HIDDEN if key in hidden else dumped[key]) for key in dumped]


def _elements(given: Any, limit: int) -> list[Any] | None:
    """
    Return the first elements of what becomes a list; iterators are left alone.
    """
    if isinstance(given, Sequence | AbstractSet | ValuesView):
        return _snapshot(lambda: given, limit)
    return None


def _snapshot(entries: Callable[[], Iterable[_V]], limit: int) -> list[_V]:
    for _ in range(3):
        try:
            return list(islice(entries(), limit))
        except RuntimeError:
            # Another thread changed its size just now.
            continue
    return list(islice(entries(), limit))


def _read(get: Callable[[Any], Any], key: Any) -> Any:
    try:
        return get(key)
    except Exception:
        # The caller's own code.
        return _BROKEN
