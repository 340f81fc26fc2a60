# SPDX-License-Identifier: Apache-2.0
"""
Redaction: the shared corpus, every kind of value, and callers that mean harm.

Secrets are put together at run time, so that no scanner finds one in this file.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections import ChainMap, OrderedDict, UserList, deque
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from ipaddress import ip_address
from pathlib import PurePosixPath
from types import MappingProxyType, SimpleNamespace
from typing import Any, Final, NamedTuple
from uuid import UUID

import attrs
import pytest
import rfc8785
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, SecretStr

from fasten.redact import MAX_ANCHOR, MAX_DEPTH, MAX_INTEGER, Redactor
from fasten.rows import canonical_json
from tests.outside import ROOT

CORPUS: Final = json.loads(
    (ROOT / "tests/conformance/redact-corpus.json").read_text(encoding="utf-8")
)["cases"]

JWT: Final = "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiJ1LTQyIn0.abc123def456ghi789"
AWS: Final = "AKIA" + "IOSFODNN7EXAMPLE"
GITHUB: Final = "ghp_" + "a1B2" * 9
STRIPE: Final = "sk_live_" + "a1B2" * 6
OPENAI: Final = "sk-" + "a1B2" * 8
PEM: Final = "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIE"
CARD: Final = "4111" * 4
CARD = CARD[:4] + "1" * 12
SECRETS: Final = (JWT, AWS, GITHUB, STRIPE, OPENAI, PEM, CARD)


def encoded(detail: Any, **options: Any) -> Any:
    """
    Encode *detail*, check what holds for every detail, and read it back.
    """
    text = Redactor(**options).encode(detail)
    read = json.loads(text, parse_int=_exactly)

    assert text == rfc8785.dumps(read).decode()
    assert len(text.encode()) <= options.get("max_bytes", 65536)
    assert type(read) is dict
    return read


def shown_for(value: Any) -> Any:
    """
    Return what *value* is shown as in a detail, the same as in a log event.
    """
    cleaned = Redactor().clean({"v": value})

    assert encoded({"v": value}) == cleaned
    return cleaned["v"]


def _exactly(digits: str) -> float:
    return int(digits) if abs(int(digits)) <= MAX_INTEGER else float(digits)


class TestCorpus:
    """
    What all languages agree on.
    """

    @pytest.mark.parametrize("case", CORPUS, ids=lambda case: case["name"])
    def test_encode(self, case):
        """
        Each case holds for details.
        """

        assert case["expected"] == encoded(case["input"])

    @pytest.mark.parametrize("case", CORPUS, ids=lambda case: case["name"])
    def test_clean(self, case):
        """
        Each case holds for log events.
        """

        assert case["expected"] == Redactor().clean(case["input"])

    @pytest.mark.parametrize("prefix", ["sk_live_", "rk_live_"])
    def test_stripe(self, prefix):
        """
        Stripe's live keys are the case that the corpus leaves out.
        """

        assert {"note": "***STRIPE_KEY***"} == encoded({"note": prefix + "a1B2" * 6})


class TestKeys:
    """
    Names of secrets, however they are spelled.
    """

    @pytest.mark.parametrize(
        "key",
        [
            "apiKey",
            "X-API-Key",
            "api.key",
            "api key",
            "APIKEY",
            "userPasswd",
            "clientSecret",
            "Proxy-Authorization",
            "m2mKey",
            "M2M-KEY",
            "cert_private",
            "certPrivatePem",
            "privateKeyPem",
            "AWSAccessKeyId",
            "PHPSESSID_session.id",
            "sessionId",
            "Set-Cookie",
            "credentials",
            "access_tokens",
            "\uff50assword",
            "pass\u200bword",
        ],
    )
    def test_is_secret(self, key):
        """
        Case, separators and what stands around a name make no difference.
        """

        assert {key: "***"} == encoded({key: "xxx"}) == Redactor().clean({key: "xxx"})

    @pytest.mark.parametrize(
        "key",
        ["author", "user", "keyboard", "passenger", "monkey", "session", "id", ""],
    )
    def test_is_none(self, key):
        """
        Names that only look a little like one stay.
        """

        assert {key: "xxx"} == encoded({key: "xxx"})

    @pytest.mark.parametrize("value", [None, True, 7, ["a"], {"b": "c"}, object()])
    def test_takes_the_whole_value(self, value):
        """
        A secret key loses its value whole, whatever it is.
        """

        assert {"token": "***"} == encoded({"token": value})

    @pytest.mark.parametrize(
        "key",
        [
            "tokens",
            "prompt_tokens",
            "completion_tokens",
            "total_tokens",
            "promptTokens",
            "cache-read-input-tokens",
            "tokens_used",
            "tokensUsed",
            "max_tokens",
            "maxTokens",
            "token_count",
            "tokenCount",
            "token_usage",
            "num_tokens",
        ],
    )
    @pytest.mark.parametrize("value", [0, 1234, 1.5])
    def test_counters_keep_numbers(self, key, value):
        """
        Usage counters stay when they are numbers, and only then.
        """
        redactor = Redactor()

        assert {key: value} == encoded({key: value}) == redactor.clean({key: value})
        assert {key: "***"} == encoded({key: "xxx"}) == redactor.clean({key: "xxx"})
        assert {key: "***"} == encoded({key: True}) == redactor.clean({key: True})

    @pytest.mark.parametrize(
        "key", ["token", "reset_token", "token_seed", "tokenserial", "bearer_tokens"]
    )
    def test_numbers_are_secrets_elsewhere(self, key):
        """
        A number under a key that counts nothing is a secret like any other.
        """

        assert {key: "***"} == encoded({key: 123456})

    def test_own_keys(self):
        """
        More keys can be added, at any time; they win over counters.
        """
        redactor = Redactor(["IBAN", "max_tokens", "", "_"])
        detail = {"customerIban": 1, "max-tokens": 5, "ok": 1, "token": 1, "ssn": 1}
        before = redactor.encode(detail)
        redactor.extend(["s.s.n"])
        after = redactor.encode(detail)

        assert {**json.loads(before), "ssn": "***"} == json.loads(after)
        assert json.loads(before) == {
            "customerIban": "***",
            "max-tokens": "***",
            "ok": 1,
            "token": "***",
            "ssn": 1,
        }

    def test_replacement(self):
        """
        The replacement can be chosen; the marks of shapes say their kind.
        """
        options = {"replacement": "[gone] %s \"'"}

        assert encoded({"token": 1, "a": JWT, "%s": 1}, **options) == {
            "token": "[gone] %s \"'",
            "a": "***JWT***",
            "%s": 1,
        }

    def test_memory_of_keys_is_bounded(self):
        """
        Keys from outside do not fill the memory.
        """
        redactor = Redactor()
        for number in range(6000):
            redactor.encode({f"key{number}": 1})

        assert len(redactor._keys) <= 4096
        assert len(redactor._layouts) <= 512

    def test_remembers_no_secret(self):
        """
        Nothing of a value, nor a secret used as key, is kept.
        """
        redactor = Redactor()
        for secret in SECRETS:
            redactor.encode({"a": secret, secret: 1, "password": "hunter2"})
            redactor.clean({"a": secret, secret: 1, "password": "hunter2"})
            redactor.anchor(secret)
        kept = repr(vars(redactor))

        assert [] == [s for s in (*SECRETS, "hunter2") if s in kept]


class TestShapes:
    """
    Values that look like a secret.
    """

    @pytest.mark.parametrize(
        ("text", "mark"),
        [
            (f"Bearer {JWT}", "***JWT***"),
            (f"jwt{JWT}", "***JWT***"),
            (JWT.rpartition(".")[0], "***JWT***"),
            (PEM.replace("RSA ", "ENCRYPTED "), "***PRIVATE_KEY***"),
            (f"see:\n{PEM}", "***PRIVATE_KEY***"),
            (f"x{AWS}x", "***AWS_KEY***"),
            (f"\n{GITHUB}\n", "***GH_TOKEN***"),
            ("ghu_" + "a1B2" * 9, "***GH_TOKEN***"),
            ("ghr_" + "a1B2" * 9, "***GH_TOKEN***"),
            ("github_pat_" + "a1B_" * 20, "***GH_TOKEN***"),
            (f"https://{GITHUB}@github.com/x.git", "***GH_TOKEN***"),
            (f"\n{OPENAI}", "***OPENAI_KEY***"),
            ("sk-ant-api03-" + "a1B2" * 8, "***OPENAI_KEY***"),
            ("sk-svcacct-" + "a-B_" * 8, "***OPENAI_KEY***"),
            (f"pay {STRIPE} now", "***STRIPE_KEY***"),
        ],
    )
    def test_takes_the_whole_value(self, text, mark):
        """
        A secret inside a text takes the whole text, in details and anchors.
        """

        assert mark == shown_for(text)
        assert mark == Redactor().anchor(text)

    @pytest.mark.parametrize(
        "text",
        [
            "task-0f8b3c2a-1111-2222-3333-444455556666",
            "sk-bratislava-datacenter-rack-42",
            "disk-usage",
            "network_live_view",
            "AKIAlowercase",
            "eyJ is how a JWT begins",
            "eyJhbGciOiJIUzI1NiJ9",
            "-----BEGIN PUBLIC KEY-----\nMIIE",
            "PRIVATE KEY",
            "ghp_short",
            "github_pat_x",
            "sk_test_" + "a1B2" * 6,
        ],
    )
    def test_stays(self, text):
        """
        Texts that only remind of one stay.
        """

        assert text == shown_for(text)
        assert text == Redactor().anchor(text)

    def test_in_keys(self):
        """
        A secret used as a key becomes its mark; several stay apart.
        """
        detail = {JWT: 1, f"{JWT}x": 2, CARD: 3, "ok": 4}

        assert encoded(detail) == {
            "***JWT***": 1,
            "***JWT***_2": 2,
            "***CC***": 3,
            "ok": 4,
        }

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("postgres://user:pw@db:5432/app", "postgres://user:***@db:5432/app"),
            ("redis://:pw@host/0", "redis://:***@host/0"),
            ("amqp://u:1234@h", "amqp://u:***@h"),
            (
                "postgresql+psycopg://u:p@ss/w?rd@h/db",
                "postgresql+psycopg://u:***@h/db",
            ),
            ("mysql://u@server:pw@host/db", "mysql://u@server:***@host/db"),
            (
                "no route to postgres://u:pw@db.local, retrying",
                "no route to postgres://u:***@db.local, retrying",
            ),
            ("a://b:c@d1 e://f:g@h2", "a://b:***@d1 e://f:***@h2"),
            ("http://h:80/?next=amqp://u:pw@h", "http://h:80/?next=amqp://u:***@h"),
        ],
    )
    def test_passwords_in_urls(self, text, shown):
        """
        The password goes, the rest of the URL stays.
        """

        assert shown == shown_for(text)
        assert shown == Redactor().anchor(text)

    @pytest.mark.parametrize(
        "text",
        [
            "https://example.com:8080/path?email=a@example.com",
            "https://user@example.com/path",
            "https://[::1]:8080/a@b",
            "mailto:a@example.com, see https://example.com",
            "postgres://user:@db/app",
            "time 12:30 @ https://example.com/a:b",
        ],
    )
    def test_urls_without_password(self, text):
        """
        Ports, user names and mail addresses stay.
        """

        assert {"url": text} == encoded({"url": text})
        assert text == Redactor().anchor(text)


def luhn(digits: str) -> str:
    """
    Return *digits* with the last one replaced by the right check digit.
    """
    total = 0
    for place, digit in enumerate(reversed(digits[:-1])):
        value = int(digit) * (2 - place % 2)
        total += value - 9 if value > 9 else value
    return digits[:-1] + str(-total % 10)


class TestCards:
    """
    Card numbers: a known prefix, its length, and Luhn.
    """

    @pytest.mark.parametrize(
        "digits",
        [
            "4222222222222",
            "4000056655665556",
            "5555555555554444",
            "2223003122003222",
            "2720992593019364",
            "378282246310005",
            "30569309025904",
            "38520000023237",
            "6011111111111117",
            "6440000000000000",
            "3530111333300000",
            "6200000000000005",
            "6759649826438453",
            luhn("4" + "1" * 18),
        ],
    )
    def test_is_a_card(self, digits):
        """
        Each issuer's numbers go: as text, as number, and grouped.
        """
        digits = luhn(digits)
        groups = " ".join(digits[n : n + 4] for n in range(0, len(digits), 4))
        dashed = groups.replace(" ", "-")
        spellings = (digits, groups, dashed, f"pan={digits};", int(digits))

        assert {"***CC***"} == {shown_for(value) for value in spellings}

    @pytest.mark.parametrize(
        "text",
        [
            "4111 1111 1111 1111 12/27 123",
            "12 4111-1111-1111-1111",
            "4-1-1-1-1-1-1-1-1-1-1-1-1-1-1-1",
            "\u00004111111111111111",
            "\u00114111111111111111",
            "a\n4111111111111111\nb",
            "4111111111111111.",
            "amount 12.50 4111111111111111",
        ],
    )
    def test_is_found_among_others(self, text):
        """
        Neighbouring numbers, lines and control characters hide no card.
        """

        assert {"n": "***CC***"} == encoded({"n": text})

    @pytest.mark.parametrize(
        "text",
        [
            "14111111111111111",
            "41111111111111112",
            "4111  1111  1111  1111",
            "0.4111111111111111",
            "41111111-1111-4111-8111-111111111111",
            "4111-1111x1111-1111",
            "a" * 10 + CARD + "b" * 10,
            "2026-04-22 12:34:56 2026-04-23 12:34:56",
            "1776859200000000",
        ],
    )
    def test_is_none(self, text):
        """
        Longer runs, fractions, UUIDs, hashes and times are no cards.
        """

        assert {"n": text} == encoded({"n": text})

    def test_as_float(self):
        """
        A card number that went through a float is still one.
        """

        assert {"n": "***CC***"} == encoded({"n": float(CARD)})
        assert {"n": "***CC***"} == Redactor().clean({"n": float(CARD)})

    def test_stays_in_anchors(self):
        """
        Anchors keep what looks like a card: an IMEI does.
        """

        assert CARD == Redactor().anchor(CARD)

    @given(
        st.integers(12, 19).flatmap(
            lambda n: st.text("0123456789", min_size=n, max_size=n)
        )
    )
    def test_luhn(self, digits):
        """
        A wrong check digit makes any number harmless.
        """
        right = luhn(digits)
        wrong = right[:-1] + str((int(right[-1]) + 1) % 10)

        assert {"n": wrong} == encoded({"n": wrong})


class Colour(Enum):
    RED = "red"
    PAIR = ("a", 1)


class Level(IntEnum):
    LOW = 1


class Word(StrEnum):
    YES = "yes"


class Text(str):
    __slots__ = ()

    def __str__(self):
        raise RuntimeError


class Whole(int):
    def __repr__(self):
        raise RuntimeError


class Real(float):
    def __repr__(self):
        raise RuntimeError


class Scalar:
    """
    What NumPy's scalars look like.
    """

    dtype = "int64"
    ndim = 0

    def item(self):
        return 7


class Strange(Scalar):
    def item(self):
        return self


@attrs.define
class Person:
    name: str
    pin: str = attrs.field(repr=False)
    code: str = attrs.field(default="c", repr=lambda _: "masked")


@dataclasses.dataclass
class Login:
    user: str
    pin: str = dataclasses.field(repr=False)


class Order(BaseModel):
    number: int
    note: SecretStr
    pin: str = Field(repr=False)
    inner: dict[str, Any] = {}
    skipped: str = Field(default="x", exclude=True)


class Point(NamedTuple):
    x: int
    password: str


TOKYO: Final = timezone(timedelta(hours=9))


class NoOffset(tzinfo):
    def utcoffset(self, _):
        return None


class TestValues:
    """
    What JSON has no form for.
    """

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (datetime(2026, 4, 22, 21, 0, 0, 5, TOKYO), "2026-04-22T12:00:00.000005Z"),
            (datetime(2026, 4, 22, 12), "2026-04-22T12:00:00.000000Z"),  # noqa: DTZ001
            (datetime(2026, 4, 22, tzinfo=NoOffset()), "2026-04-22T00:00:00.000000Z"),
            (datetime.min.replace(tzinfo=TOKYO), "0001-01-01T00:00:00+09:00"),
            (date(2026, 4, 22), "2026-04-22"),
            (datetime(2026, 4, 22, 1, 2, 3, tzinfo=UTC).time(), "01:02:03"),
            (timedelta(minutes=1, seconds=30), "PT90S"),
            (timedelta(milliseconds=-1500), "-PT1.5S"),
            (Decimal("12.50"), "12.50"),
            (Decimal("NaN"), "NaN"),
            (Fraction(1, 3), "1/3"),
            (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
            (ip_address("2001:db8::1"), "2001:db8::1"),
            (PurePosixPath("/var/log"), "/var/log"),
            (PurePosixPath("/a\udcff"), "/a\ufffd"),
            (Colour.RED, "red"),
            (Colour.PAIR, ["a", 1]),
            (Level.LOW, 1),
            (Word.YES, "yes"),
            (Text("plain"), "plain"),
            (Text(JWT), "***JWT***"),
            (Whole(3), 3),
            (Real(1.5), 1.5),
            (Scalar(), 7),
            (Strange(), "<Strange>"),
            (b"text", "text"),
            (bytearray(b"text"), "text"),
            (memoryview(b"text"), "text"),
            (b"\xff\xfe", "base64://4="),
            (b"\xff" + AWS.encode(), "***AWS_KEY***"),
            (JWT.encode(), "***JWT***"),
            ({3, 1, 2}, [1, 2, 3]),
            (frozenset({"b", "a"}), ["a", "b"]),
            ({"b": 1, "a": 2}.keys(), ["a", "b"]),
            ({"b": 1, "a": 2}.values(), [1, 2]),
            (range(3), [0, 1, 2]),
            (deque([1, 2]), [1, 2]),
            (UserList([1]), [1]),
            (OrderedDict(b=1), {"b": 1}),
            (MappingProxyType({"token": 1}), {"token": "***"}),
            (ChainMap({"a": 1}, {"b": JWT}), {"a": 1, "b": "***JWT***"}),
            (Point(1, "x"), {"x": 1, "password": "***"}),
            (Person("n", "p"), {"name": "n", "pin": "***", "code": "***"}),
            (Login("u", "p"), {"user": "u", "pin": "***"}),
            (
                Order(number=1, note=SecretStr("s"), pin="p", inner={"token": "t"}),
                {
                    "number": 1,
                    "note": "<SecretStr>",
                    "pin": "***",
                    "inner": {"token": "***"},
                },
            ),
            (ValueError(f"no {JWT}"), {"type": "ValueError", "message": "***JWT***"}),
            (KeyError("k"), {"type": "KeyError", "message": "'k'"}),
            (object(), "<object>"),
            (SimpleNamespace(password="x"), "<SimpleNamespace>"),
            (print, "<builtin_function_or_method>"),
            (int, "<type>"),
            (1j, "<complex>"),
            (float("nan"), "NaN"),
            (float("inf"), "Infinity"),
            (float("-inf"), "-Infinity"),
            (MAX_INTEGER, MAX_INTEGER),
            (-MAX_INTEGER, -MAX_INTEGER),
            (MAX_INTEGER + 1, str(MAX_INTEGER + 1)),
            (-(2**64), str(-(2**64))),
            (1 << 5000, "<int of 5001 bits>"),
            (1e22, 1e22),
            ("a\0b", "a\ufffdb"),
            ("a\ud800b", "a\ufffdb"),
            ("\\u0000", "\\u0000"),
            ("é\U0001f600", "é\U0001f600"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_is_spelled(self, value, shown):
        """
        Each kind of value has one spelling, in details and log events, at any depth.
        """

        assert shown == shown_for(value)
        assert [{"w": shown}] == shown_for([{"w": value}])

    @pytest.mark.parametrize(
        ("detail", "shown"),
        [
            (None, {}),
            ({}, {}),
            ([], {"value": []}),
            ("text", {"value": "text"}),
            (JWT, {"value": "***JWT***"}),
            (0, {"value": 0}),
            (False, {"value": False}),
            (Colour.RED, {"value": "red"}),
            (Login("u", "p"), {"user": "u", "pin": "***"}),
            (OrderedDict(a=1), {"a": 1}),
            (ValueError("x"), {"type": "ValueError", "message": "x"}),
        ],
    )
    def test_is_an_object(self, detail, shown):
        """
        A detail that is no object is wrapped.
        """

        assert shown == encoded(detail)

    @pytest.mark.parametrize(
        ("key", "shown"),
        [
            (1, "1"),
            (1.0, "1"),
            (None, "null"),
            (True, "true"),
            (Word.YES, "yes"),
            (Colour.RED, "red"),
            (b"k", "k"),
            (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
            (date(2026, 4, 22), "2026-04-22"),
            ((1, 2), "<tuple>"),
            (float("nan"), "***UNREADABLE***"),
            (Text("k"), "k"),
            ("a\0\ud800", "a\ufffd\ufffd"),
            (int(CARD), "***CC***"),
        ],
    )
    def test_keys_become_text(self, key, shown):
        """
        Keys are strings in the end.
        """

        assert {shown: 1} == encoded({key: 1}) == Redactor().clean({key: 1})

    def test_colliding_keys(self):
        """
        Keys that become equal are numbered, and none is lost.
        """
        detail = {1: "a", "1": "b", "1_2": "c", Text("1\0"): "d", "1\ufffd": "e"}

        assert encoded(detail) == {
            "1": "a",
            "1_2": "b",
            "1_2_3": "c",
            "1\ufffd": "d",
            "1\ufffd_5": "e",
        }

    def test_iterators_are_left_alone(self):
        """
        A generator or an open file is named, never read.
        """
        generator = (n for n in range(3))

        assert {"g": "<generator>"} == encoded({"g": generator})
        assert [0, 1, 2] == list(generator)

    def test_input_is_left_alone(self):
        """
        Neither call changes what it was given.
        """
        fields = {"b": {"token": "t", "x": [1]}, "a": JWT, "token": "t"}
        copy = json.loads(json.dumps(fields))
        redactor = Redactor()
        cleaned = redactor.clean(fields)
        redactor.encode(fields)

        assert copy == fields
        assert ["b", "a", "token"] == list(cleaned)
        assert cleaned["b"]["x"] is not fields["b"]["x"]


class Hostile:
    """
    An object whose every door is mined.
    """

    def __getattr__(self, name):
        raise RuntimeError(name)

    def _explode(self, *_):
        raise RuntimeError

    __repr__ = __str__ = __iter__ = __len__ = __bool__ = __eq__ = _explode

    def __hash__(self):
        return 1


class LyingClass:
    @property
    def __class__(self):
        raise RuntimeError


class BadMapping(dict):
    def items(self):
        raise RuntimeError

    __iter__ = keys = __getitem__ = items


class BadSequence(UserList):
    def __iter__(self):
        yield 1
        raise RuntimeError


@attrs.define
class BadFields:
    ok: int = 1
    gone: int = 2

    def __attrs_post_init__(self):
        del self.gone


class BadError(Exception):
    def __str__(self):
        raise RuntimeError


class BadEnum(Enum):
    A = 1

    @property
    def value(self):
        raise RuntimeError


class BadModel:
    def model_dump(self):
        raise RuntimeError


class TestHostile:
    """
    Values that raise, never end, or change while they are read.
    """

    @pytest.mark.parametrize(
        ("make", "shown"),
        [
            (Hostile, "<Hostile>"),
            (LyingClass, "***UNREADABLE***"),
            (lambda: BadMapping(a=1), {"a": 1}),
            (BadSequence, "***UNREADABLE***"),
            (BadFields, {"ok": 1, "gone": "***UNREADABLE***"}),
            (BadError, {"type": "BadError", "message": "***UNREADABLE***"}),
            (lambda: BadEnum.A, "***UNREADABLE***"),
            (BadModel, "***UNREADABLE***"),
            (type("x" * 100, (), {}), f"<{'x' * 64}>"),
        ],
    )
    def test_raises(self, make, shown):
        """
        What raises is replaced by a mark; its neighbours stay.
        """
        redactor = Redactor()
        detail = {"v": make(), "w": 1}

        assert {"v": shown, "w": 1} == encoded(detail) == redactor.clean(detail)

    @pytest.mark.parametrize(
        "make", [Hostile, LyingClass, BadSequence, BadModel, lambda: BadEnum.A]
    )
    def test_raises_as_a_whole(self, make):
        """
        A hostile detail, fields or anchor never raises either.
        """
        redactor = Redactor()

        assert type(encoded(make())) is dict
        assert type(redactor.clean(make())) is dict
        assert "***UNREADABLE***" == redactor.anchor(make())

    def test_hostile_keys(self):
        """
        Keys with code of their own are marked.
        """

        assert {"<Hostile>": 1} == encoded({Hostile(): 1})

    def test_cycles(self):
        """
        A value that holds itself is marked where it comes round.
        """
        loop: dict[str, Any] = {"a": 1}
        loop["self"] = loop
        row: list[Any] = []
        row.append(row)

        assert {"a": 1, "self": "***CYCLE***"} == encoded(loop)
        assert {"row": ["***CYCLE***"]} == encoded({"row": row})

    def test_shared_values_are_no_cycle(self):
        """
        The same object twice is shown twice.
        """
        shared = {"a": 1}

        assert {"x": shared, "y": [shared]} == encoded({"x": shared, "y": [shared]})

    @pytest.mark.parametrize(
        "wrap", [lambda v: [v], lambda v: {"k": v}, lambda v: (v,)]
    )
    def test_depth(self, wrap):
        """
        Ten thousand levels become as many as are allowed, and a mark.
        """
        value: Any = "leaf"
        for _ in range(10_000):
            value = wrap(value)
        text = Redactor().encode({"v": value})

        assert MAX_DEPTH == text.count("[") + text.count("{")
        assert "***TOO_DEEP***" in text

    def test_deepest(self):
        """
        What is just not too deep is shown.
        """
        value: Any = "leaf"
        for _ in range(MAX_DEPTH - 1):
            value = [value]

        assert "leaf" in Redactor().encode({"v": value})

    def test_no_stack_left(self):
        """
        Near the recursion limit there is a text all the same.
        """
        redactor = Redactor()
        texts = []

        def dive():
            texts.append(redactor.encode({"a": [[[[object()]]]], "token": "hunter2"}))
            dive()

        with pytest.raises(RecursionError):
            dive()

        assert all(type(json.loads(text)) is dict for text in texts)
        assert not any("hunter2" in text for text in texts)

    def test_billion_laughs(self):
        """
        Sharing does not multiply the work without end.
        """
        value: list[Any] = ["ha"]
        for _ in range(60):
            value = [value] * 10

        assert encoded({"v": value})["_truncated"] is True

    def test_endless(self):
        """
        Only as much is read of a sequence or mapping as could ever fit.
        """
        read = 0

        class Endless(UserList):
            def __iter__(self):
                nonlocal read
                while True:
                    read += 1
                    yield "x"

        shown = encoded({"v": Endless()}, max_bytes=1024)

        assert shown["_truncated"] is True
        assert read < 2000

    @pytest.mark.parametrize(
        "value",
        [
            "x" * 100_000_000,
            "eyJ" * 100_000,
            "eyJa" * 100_000,
            "://a:" * 100_000,
            "1 " * 100_000,
            "\0" * 100_000,
            b"\xff" * 100_000_000,
            ["x"] * 1_000_000,
            [f"{AWS}{'x' * 60_000}"] * 1_000,
            7**500_000,
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_time_is_bounded(self, value):
        """
        Huge values, and those that make patterns slow, cost a bounded time.
        """
        redactor = Redactor()
        started = time.process_time()
        text = redactor.encode({"v": value, "u": "me"})
        redactor.clean({"v": value})
        redactor.anchor(value)

        assert time.process_time() - started < 2
        assert "me" == json.loads(text)["u"]

    def test_changes_while_it_is_read(self):
        """
        Another thread changing the detail costs at most a mark, never an error.
        """
        detail: dict[str, Any] = {"list": [1], "inner": {}, "secret": "hunter2"}
        stop = threading.Event()

        def change():
            number = 0
            while not stop.is_set():
                number += 1
                detail[f"k{number % 50}"] = detail["inner"][number % 70] = number
                detail["list"].append(number)
                if not number % 60:
                    detail["inner"].clear()
                    detail["list"].clear()
                    for key in [k for k in detail if k.startswith("k")]:
                        del detail[key]

        thread = threading.Thread(target=change)
        thread.start()
        redactor = Redactor()
        try:
            texts = [redactor.encode(detail) for _ in range(2000)]
            copies = [redactor.clean(detail) for _ in range(500)]
        finally:
            stop.set()
            thread.join(10)

        assert all(text == canonical_json(json.loads(text)) for text in texts)
        assert all("***" == copy["secret"] for copy in copies)
        assert not any("hunter2" in text for text in texts)


class TestSize:
    """
    No text is larger than it may be.
    """

    @pytest.mark.parametrize("max_bytes", [256, 1000, 65536])
    def test_fits_exactly(self, max_bytes):
        """
        What just fits is whole; a byte more, and it is cut and marked.
        """
        room = max_bytes - len('{"v":""}')
        redactor = Redactor(max_bytes=max_bytes)

        assert f'{{"v":"{"x" * room}"}}' == redactor.encode({"v": "x" * room})
        assert {"_truncated", "v"} == set(
            encoded({"v": "x" * (room + 1)}, max_bytes=max_bytes)
        )

    def test_short_values_first(self):
        """
        One huge value does not push out the others, wherever it stands.
        """
        shown = encoded({"blob": "x" * 10_000, "n": 1, "s": "short"}, max_bytes=512)

        assert shown["blob"].endswith("x***CUT***")
        assert {"n": 1, "s": "short", "_truncated": True} == {
            key: shown[key] for key in ("n", "s", "_truncated")
        }
        assert 400 < len(shown["blob"]) < 512

    def test_lists_and_objects_are_cut(self):
        """
        Of a long list and a wide object the first entries stay.
        """
        wide = {f"k{n:03}": n for n in range(1000)}
        shown = encoded({"list": list(range(1000)), "wide": wide}, max_bytes=600)
        other = encoded({"wide": wide}, max_bytes=600)

        assert [0, 1, 2] == shown["list"][:3]
        assert ["k000", "k001"] == list(other["wide"])[:2]
        assert len(other["wide"]) > 40

    def test_clean_is_bounded(self):
        """
        Log events have the same bound.
        """
        shown = Redactor(max_bytes=512).clean({"blob": "x" * 10_000, "n": 1})

        assert shown["_truncated"] is True
        assert 1 == shown["n"]
        assert len(canonical_json(shown)) <= 512

    @pytest.mark.parametrize("secret", [*SECRETS[:-1], JWT + "x" * 9000])
    @pytest.mark.parametrize("at", range(225, 256, 3))
    def test_no_half_secret(self, secret, at):
        """
        A cut through a secret leaves none of it.
        """
        text = f"{'x ' * (at // 2)}{secret}{' y' * 9000}"
        shown = Redactor(max_bytes=256).encode({"v": text})

        assert secret[:12] not in shown

    @pytest.mark.parametrize("at", range(4060, 4100, 3))
    def test_no_half_secret_in_anchors(self, at):
        """
        Nor does the cut of an anchor.
        """
        for secret in (JWT + "x" * 9000, AWS, f"postgres://user:{'hunter2' * 900}@db"):
            shown = Redactor().anchor(f"{'x ' * (at // 2)}{secret}{' y' * 9000}")

            assert len(shown) <= MAX_ANCHOR
            assert not any(part in shown for part in ("eyJhb", "AKIAI", "hunter"))


PLAIN_TEXTS: Final = st.text(max_size=30) | st.sampled_from(
    [*SECRETS, "a://b:c@d.example", "a@b.example", "4111 1111", "sk-", "eyJ", "\ufb33"]
)
KEYS: Final = st.text(max_size=8) | st.sampled_from(
    ["a", "b", "token", "max_tokens", "apiKey", "\U0001f600", "\ufb33", "a%sb", '"']
)
PLAIN: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | PLAIN_TEXTS
    | st.just(int(CARD)),
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(KEYS, inner, max_size=8)
    ),
    max_leaves=10,
)
ODD_TEXTS: Final = st.text(st.characters(exclude_categories=()), max_size=40)
ODD: Final = st.recursive(
    PLAIN
    | ODD_TEXTS
    | st.binary(max_size=40)
    | st.datetimes(timezones=st.none() | st.just(TOKYO))
    | st.timedeltas()
    | st.decimals()
    | st.uuids()
    | st.sampled_from([*Colour, Hostile, Point(1, "x")])
    | st.builds(BadFields)
    | st.builds(Whole, st.integers()),
    lambda inner: (
        st.lists(inner, max_size=40)
        | st.dictionaries(ODD_TEXTS | st.integers() | st.none(), inner, max_size=40)
    ),
    max_leaves=20,
)


class TestBothWays:
    """
    The quick way and the careful way are one.
    """

    @given(st.dictionaries(KEYS, PLAIN, max_size=8))
    @example({"\U0001f600": 1, "\ufb33": 2})
    @example({"a": "ftp://u:p@h"})
    @example({"a": Decimal("1.5"), "b": [UUID(int=5), Colour.PAIR]})
    @example({"a": -0.0, "b": 1e-7, "c": 1e16, "d": 12.0, "e": 0.00015})
    def test_same_bytes(self, detail):
        """
        They give the same bytes, which are those of RFC 8785.
        """
        redactor = Redactor()
        careful = redactor._copy(detail)

        assert canonical_json(careful) == redactor.encode(detail)
        assert list(careful.items()) == list(redactor.clean(detail).items())
        assert careful == encoded(detail)

    @given(
        st.lists(
            st.fixed_dictionaries(
                {"a": PLAIN, "b": PLAIN, "total_tokens": PLAIN, "password": PLAIN}
            ),
            max_size=6,
        )
    )
    @example([{"a": "x", "b": 1}, {"a": None, "b": "y"}, {"a": {"c": 1}, "b": CARD}])
    @example([{"a": {"b": {"c": {"d": SECRETS[0]}}}}] * 2)
    @example([{"a": float(CARD)}, {"a": int(CARD)}, {"a": float("nan")}])
    def test_what_was_learned_changes_nothing(self, events):
        """
        A field may be text in one event and a number or an object in the next.
        """
        redactor = Redactor()
        cleaned = [redactor.clean(event) for event in events * 2]

        assert [Redactor()._copy(event) for event in events * 2] == cleaned

    @given(ODD, st.integers(256, 2000))
    def test_anything(self, value, max_bytes):
        """
        Any value is encoded, canonical, within its bound, and without a secret.
        """
        redactor = Redactor(max_bytes=max_bytes)
        encoded(value, max_bytes=max_bytes)
        cleaned = redactor.clean({"v": value})

        assert canonical_json(cleaned) == redactor.encode({"v": value})
        assert not any(s in canonical_json(cleaned) for s in (*SECRETS[:5], CARD))

    @given(st.dictionaries(KEYS, PLAIN, max_size=8))
    def test_is_stable(self, detail):
        """
        What was redacted once stays as it is.
        """
        redactor = Redactor()
        once = redactor.encode(detail)
        # A counter that is stored as text, being too large, would go.
        assume("max_tokens" not in once)

        assert once == redactor.encode(json.loads(once, parse_int=_exactly))


class TestTidy:
    def test_what_is_plain_is_changed_in_place(self):
        """
        A log event is redacted without a copy; objects within it are copied.
        """
        inner = {"password": "x", "city": "Bonn"}
        given = {"event": "x", "token": "y", "inner": inner, "none": None}
        tidied = Redactor().tidy(given)

        assert tidied is given
        assert "x" == inner["password"]
        assert {
            "event": "x",
            "token": "***",
            "inner": {"password": "***", "city": "Bonn"},
            "none": None,
        } == tidied

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("AKIAIOSFODNN7EXAMPLE", "***AWS_KEY***"),
            (float("nan"), "NaN"),
            ({1, 2}, [1, 2]),
            (4111111111111111, "***CC***"),
            ("CONFIG_UPDATED", "CONFIG_UPDATED"),
        ],
    )
    def test_what_is_not_is_as_cleaned(self, value, expected):
        """
        Whatever the way, the outcome is that of `clean`, also for a form that is known.
        """
        redactor = Redactor()
        redactor.tidy({"event": "x", "value": "known as a text"})
        redactor.tidy({"event": "x", "value": 7})

        assert {"event": "x", "value": expected} == redactor.tidy(
            {"event": "x", "value": value}
        )


class TestAnchor:
    """
    Texts of the columns.
    """

    @given(ODD_TEXTS)
    def test_any_text(self, text):
        """
        Any text can be stored, and a harmless one is unchanged.
        """
        shown = Redactor().anchor(text)

        shown.encode()
        assert "\0" not in shown
        assert shown == text or not text.isprintable()

    @pytest.mark.parametrize("text", ["u-42", "", "a\nb", "é", "x" * MAX_ANCHOR])
    def test_stays(self, text):
        """
        Names stay, up to the limit.
        """

        assert text == Redactor().anchor(text)

    def test_is_cut(self):
        """
        A longer one is cut to the limit, and marked.
        """
        shown = Redactor().anchor("x" * (MAX_ANCHOR + 1))

        assert MAX_ANCHOR == len(shown)
        assert shown.endswith("x***CUT***")

    @pytest.mark.parametrize("text", ["a\0b\ud800", "\0" * 20, "é\udc80" * 10])
    def test_is_repaired(self, text):
        """
        NUL and lone surrogates become U+FFFD.
        """
        expected = "".join("\ufffd" if c in "\0\ud800\udc80" else c for c in text)

        assert expected == Redactor().anchor(text)

    def test_is_plain(self):
        """
        A subclass of str becomes a str.
        """

        assert type(Redactor().anchor(Text("abc"))) is str
