# SPDX-License-Identifier: Apache-2.0
"""
Rows as values: time, ids, canonical JSON, queries and cursors.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from datetime import UTC, datetime, timedelta, timezone
from enum import IntEnum, StrEnum

import pytest
import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st
from ulid import ULID

from fasten.codes import Severity
from fasten.errors import InvalidQuery
from fasten.rows import (
    ALL_TENANTS,
    API_COLUMNS,
    AUDIT_COLUMNS,
    FILTERS,
    SYS_COLUMNS,
    ApiRow,
    AuditRow,
    Pending,
    Query,
    SysRow,
    UlidMinter,
    canonical_json,
    canonical_number,
    decode_cursor,
    encode_cursor,
    format_timestamp,
    parse_timestamp,
    quote,
    ulid_ms,
    ulid_stamp,
)

NOON_US = 1_776_859_200_000_000
"""2026-04-22T12:00:00Z."""


class TestTime:
    """
    Microseconds inside, one spelling on the wire.
    """

    @pytest.mark.parametrize(
        ("us", "text"),
        [
            (0, "1970-01-01T00:00:00.000000Z"),
            (-1, "1969-12-31T23:59:59.999999Z"),
            (NOON_US + 1, "2026-04-22T12:00:00.000001Z"),
            (-62_135_596_800_000_000, "0001-01-01T00:00:00.000000Z"),
            (253_402_300_799_999_999, "9999-12-31T23:59:59.999999Z"),
        ],
    )
    def test_spells(self, us, text):
        """
        Times are spelled in UTC with six digits, whatever their value.
        """

        assert text == format_timestamp(us)
        assert us == parse_timestamp(text)

    def test_past_the_calendar(self):
        """
        A clock beyond the calendar's ends is held at them.
        """

        assert format_timestamp(10**18).startswith("9999-12-31T23:59:59.")
        assert format_timestamp(-(10**18)).startswith("0001-01-01T00:00:00.")

    @given(
        st.datetimes(timezones=st.timezones() | st.just(UTC)),
    )
    def test_reads_any_zone(self, moment):
        """
        Any aware time is read as the same instant.
        """
        expected = moment.astimezone(UTC).replace(tzinfo=None)

        assert f"{expected.isoformat(timespec='microseconds')}Z" == format_timestamp(
            parse_timestamp(moment.isoformat())
        )

    @given(st.datetimes(), st.datetimes())
    def test_sorts_as_text(self, one, other):
        """
        Texts of times sort like the times.
        """
        a, b = (parse_timestamp(t.isoformat()) for t in (one, other))

        assert (a < b) == (format_timestamp(a) < format_timestamp(b))

    @pytest.mark.parametrize(
        ("text", "us"),
        [
            ("2026-04-22", NOON_US - 43_200_000_000),
            ("2026-04-22T12:00:00", NOON_US),
            ("2026-04-22 14:00+02:00", NOON_US),
            ("20260422T120000Z", NOON_US),
        ],
    )
    def test_reads_iso(self, text, us):
        """
        Other ISO 8601 spellings are read; a naive one is UTC.
        """

        assert us == parse_timestamp(text)

    @pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "\ud800", "12"])
    def test_refuses(self, text):
        """
        What is no time is a ValueError.
        """
        with pytest.raises(ValueError):
            parse_timestamp(text)


class TestUlid:
    """
    Ids, as https://github.com/ulid/spec wants them.
    """

    @given(st.integers(0, 2**48 - 1), st.binary(min_size=8, max_size=8))
    @example(2**48 - 1, b"\xff" * 8)
    @example(0, bytes(8))
    def test_is_a_ulid(self, ms, entropy):
        """
        Another implementation reads the time and the random bits back.
        """
        minted = UlidMinter(lambda n: entropy[:n])(ms * 1_000_000 + 999_999)
        read = ULID.from_str(minted.removeprefix("evt-"))

        assert ms == int.from_bytes(read.bytes[:6], "big") == ulid_ms(minted)
        drawn = int.from_bytes(entropy, "big") >> 5
        assert drawn << 20 == int.from_bytes(read.bytes[6:], "big")
        assert str(read)[:10] == ulid_stamp(ms)

    @given(st.lists(st.integers(0, 2**62), min_size=2, max_size=50))
    def test_only_grows(self, times):
        """
        Ids grow whatever the clock does.
        """
        mint = UlidMinter()
        ids = [mint(time_ns) for time_ns in times]

        assert sorted(set(ids)) == ids

    def test_carries(self):
        """
        When the counted bits are used up, the drawn ones go on by one.
        """
        mint = UlidMinter(bytes)
        ids = [mint(0)[-16:] for _ in range(2**20 + 2)]

        assert ids[-4:] == [
            "000000000000ZZZY",
            "000000000000ZZZZ",
            "0000000000010000",
            "0000000000010001",
        ]
        assert len(ids) == len(set(ids))

    def test_a_child_does_not_count_on(self):
        """
        After a reseed the random part starts anew.
        """
        seeds = iter([bytes(8), b"\x80" + bytes(7)])
        mint = UlidMinter(lambda n: next(seeds))
        parent = mint(0)
        mint.reseed()

        assert parent[-16:] == "0" * 16
        assert mint(0)[-16:] == "8" + "0" * 15

    def test_refuses_other_ids(self):
        """
        An id with a letter that no ULID has is a ValueError.
        """
        with pytest.raises(ValueError):
            ulid_ms("evt-not_a_ulid")


SAFE = 2**53 - 1
TEXTS = st.text() | st.sampled_from(
    ["\u20ac", "\U0001f600", "\ufb33", "\x7f", "\u2028"]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-SAFE, SAFE)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=20,
)


class TestCanonicalJson:
    """
    RFC 8785, against another implementation.
    """

    @given(VALUES)
    @example({"\U0001f600": 1, "\ufb33": 2, "a": 3})
    def test_is_rfc_8785(self, value):
        """
        The bytes are those of the `rfc8785` package.
        """

        assert rfc8785.dumps(value) == canonical_json(value).encode()

    @given(VALUES)
    def test_reads_back(self, value):
        """
        Read with doubles, the text is the same value; it is its own canonical form.
        """
        text = canonical_json(value)

        assert value == json.loads(text, parse_int=float)
        assert text == canonical_json(json.loads(text))

    @given(st.floats(allow_nan=False, allow_infinity=False))
    @example(2.0**68)
    @example(1.2345678901234567e20)
    @example(1e21)
    @example(1e-6)
    @example(1.5e-7)
    @example(-0.0)
    @example(5e-324)
    @example(-1.7976931348623157e308)
    @example(333333333.33333329)
    def test_numbers(self, value):
        """
        Floats are spelled as ECMAScript does.
        """

        assert rfc8785.dumps(value).decode() == canonical_number(value)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_refuses_what_is_not_finite(self, value):
        """
        Numbers without a JSON form are a ValueError.
        """
        with pytest.raises(ValueError, match="no JSON form"):
            canonical_json({"x": [value]})

    @pytest.mark.parametrize("value", [object(), {1, 2}, b"x", {1: 2}, {"a": 1, 2: 3}])
    def test_refuses_other_types(self, value):
        """
        Values and keys without a JSON form are a TypeError.
        """
        with pytest.raises(TypeError):
            canonical_json(value)

    def test_subclasses(self):
        """
        Children of the JSON types are spelled like their parents.
        """

        class Number(IntEnum):
            ONE = 1

        class Word(StrEnum):
            YES = "yes"

        class Ratio(float):
            pass

        value = OrderedDict(b=Number.ONE, a=(Word.YES, Ratio(2)), c=Pending._fields[:1])

        assert '{"a":["yes",2],"b":1,"c":["id"]}' == canonical_json(value)

    def test_integers_keep_their_digits(self):
        """
        Integers past 2**53 are written out.
        """

        assert str(2**80) == canonical_json(2**80)

    @given(TEXTS)
    def test_quote(self, text):
        """
        Strings have the escapes of RFC 8785 and no others.
        """

        assert rfc8785.dumps(text) == quote(text).encode()


AUDIT = AuditRow(
    id="evt-1",
    origin_id="evt-1",
    timestamp="2026-04-22T12:00:00.000000Z",
    code="USER_CREATED",
    action="created",
    severity="info",
    outcome="success",
    actor="admin",
    actor_kind="user",
    service_id="api",
    source_node_id="n1",
    tenant_id="t1",
    target="u-42",
    category="user",
    domain="user",
    method="http",
    request_id="r1",
    detail={"a": 1},
    retention_class="medium",
)


class TestRows:
    """
    The wire form of the three rows.
    """

    def test_audit_keys(self):
        """
        An audit row has every wire key, in order.
        """

        assert AUDIT_COLUMNS == tuple(AUDIT.to_dict())

    def test_sys_keys(self):
        """
        A sys row has its fixed keys, then its free fields.
        """
        row = SysRow(
            level="info",
            event="e",
            request_id="r",
            service_id="s",
            source_node_id="n",
            timestamp="t",
            fields={"x": 1},
        )

        assert ("shape", *SYS_COLUMNS, "x") == tuple(row.to_dict())

    def test_api_keys(self):
        """
        An api row has its fixed keys, then what the transport added.
        """
        row = ApiRow(
            method="GET",
            path="/",
            status=200,
            duration_ms=1.5,
            request_id="r",
            service_id="s",
            source_node_id="n",
            timestamp="t",
            fields={"x": 1},
        )

        assert ("shape", *API_COLUMNS, "x") == tuple(row.to_dict())


def parse(stream="audit", /, **given):
    """
    Parse *given* at noon.
    """
    return Query.parse(stream, given, now_us=NOON_US)


class TestQuery:
    """
    Parameters become a query, or an error that names the parameter.
    """

    def test_defaults(self):
        """
        Without parameters: the newest hundred of everything.
        """

        assert Query() == parse(actor=None)

    def test_filters(self):
        """
        Wire keys, their short forms and numbers become filters.
        """
        query = parse(tenant="t1", node="n1", service="s", seq="7", severity="info")

        assert query.filters == {
            "tenant_id": "t1",
            "source_node_id": "n1",
            "service_id": "s",
            "monotonic_seq": 7,
            "severity": "info",
        }

    @pytest.mark.parametrize("stream", ["audit", "sys", "api"])
    def test_every_filter_is_taken(self, stream):
        """
        Each filter of each stream can be given by its own name.
        """
        values = {
            "severity": Severity.INFO,
            "outcome": "success",
            "actor_kind": "user",
            "retention_class": "long",
            "monotonic_seq": 1,
            "status": 200,
            "method": "http",
            **dict.fromkeys(("timestamp", "stored_at", "shipped_at"), "2026-04-22"),
        }
        given = {name: values.get(name, "x") for name in FILTERS[stream]}

        assert list(given) == list(parse(stream, **given).filters)

    def test_alias(self):
        """
        The input alias `schedule` means `scheduler` here, too.
        """

        assert {"actor_kind": "scheduler"} == parse(actor_kind="schedule").filters

    @pytest.mark.parametrize("name", ["timestamp", "stored_at"])
    def test_times_are_normalised(self, name):
        """
        A filter on a time matches however the time is spelled.
        """
        query = parse(**{name: "2026-04-22T14:00:00+02:00"})

        assert {name: "2026-04-22T12:00:00.000000Z"} == query.filters

    @pytest.mark.parametrize(
        ("since", "us"),
        [
            ("2h", NOON_US - 7_200_000_000),
            ("PT30M", NOON_US - 1_800_000_000),
            ("2026-04-22T11:00:00Z", NOON_US - 3_600_000_000),
            (timedelta(hours=2), NOON_US - 7_200_000_000),
            (datetime(2026, 4, 22, 13, tzinfo=timezone(timedelta(hours=1))), NOON_US),
        ],
    )
    def test_window(self, since, us):
        """
        Bounds are times, or durations back from now.
        """

        assert us == parse(since=since).since_us == parse(until=since).until_us

    def test_page(self):
        """
        Limit, offset, order, count and cursor are read from text.
        """
        cursor = encode_cursor("audit", "evt-1")
        given = {"limit": "1000", "offset": "5", "order": "asc", "cursor": cursor}
        expected = Query(limit=1000, offset=5, order="asc", cursor=cursor, count=True)

        assert expected == parse(**given, count="TRUE")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("limit", "0"),
            ("limit", "1001"),
            ("limit", "1_0"),
            ("limit", " 5"),
            ("limit", "+5"),
            ("limit", "\u0663"),
            ("limit", "9" * 5000),
            ("limit", True),
            ("offset", "-1"),
            ("offset", str(2**31)),
            ("seq", "x"),
            ("order", "up"),
            ("count", "1"),
            ("cursor", "evt-1"),
            ("since", "soon"),
            ("since", "2000y"),
            ("until", "\ud800"),
            ("timestamp", "2h"),
            ("severity", "loud"),
            ("actor_kind", "robot"),
            ("actor", "a\0b"),
            ("actor", "a\udc80"),
            ("actor", "x" * 4097),
            ("detail", "x"),
            ("hash", "x"),
            ("q", "x"),
            ("actr", "x"),
        ],
    )
    def test_refuses(self, name, value):
        """
        An unusable value or an unknown name is refused, and named.
        """
        with pytest.raises(InvalidQuery) as caught:
            parse(**{name: value})

        assert name == caught.value.parameter or caught.value.parameter in str(caught)
        assert len(str(caught.value)) < 700

    def test_refuses_twice(self):
        """
        A key given under two names is refused.
        """
        with pytest.raises(InvalidQuery, match="given twice"):
            parse(tenant="a", tenant_id="b")

    def test_suggests(self):
        """
        The nearest known name is in the message.
        """
        with pytest.raises(InvalidQuery, match="did you mean 'actor'"):
            parse(actr="x")

    def test_unknown_stream(self):
        """
        There are three streams.
        """
        with pytest.raises(InvalidQuery, match="unknown stream 'logs'"):
            Query.parse("logs", {}, now_us=0)

    def test_search_is_for_sys(self):
        """
        Free text is searched in the sys stream.
        """
        query = parse("sys", q="BOOM")

        assert query.matches({"event": "kaboom", "timestamp": "2026-04-22"})
        assert not query.matches({"event": "calm", "timestamp": "2026-04-22"})

    @pytest.mark.parametrize(
        ("scope", "tenants"),
        [
            (ALL_TENANTS, ["t1", None, ""]),
            ("t1", ["t1"]),
            (None, [None]),
            ("", [""]),
        ],
    )
    def test_scope(self, scope, tenants):
        """
        A reader sees its tenant's rows; None sees those without a tenant.
        """
        query = Query(scope=scope)

        assert tenants == [
            t for t in ("t1", None, "") if query.matches({"tenant_id": t})
        ]

    def test_matches(self):
        """
        Filters and the half-open window decide on a row.
        """
        row = AUDIT.to_dict()
        at = parse_timestamp(row["timestamp"])

        assert Query(filters={"actor": "admin"}, since_us=at).matches(row)
        assert not Query(filters={"actor": "admin"}, until_us=at).matches(row)
        assert not Query(filters={"actor": "bob"}).matches(row)


class TestCursor:
    """
    Cursors are opaque, and those of one stream are none of another's.
    """

    @given(
        st.integers(1, 2**63 - 1) | st.from_regex(r"evt-[0-9A-Z]{26}", fullmatch=True)
    )
    def test_round_trip(self, key):
        """
        What was encoded is decoded, of URL-safe characters.
        """
        cursor = encode_cursor("audit", key)

        assert str(key) == decode_cursor("audit", cursor)
        assert cursor.replace("-", "").replace("_", "").isalnum()

    @given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
    @example(encode_cursor("audit", "\0"))
    @example(encode_cursor("sys", 5))
    @example("YQ")
    def test_any_text(self, cursor):
        """
        Any text is refused, or stands for a key that is safe in a query.
        """
        try:
            key = decode_cursor("audit", cursor)
        except InvalidQuery:
            return

        assert key.isascii()
        assert key.isprintable()

    def test_refuses(self):
        """
        Another stream's cursor is refused by name.
        """
        with pytest.raises(InvalidQuery, match="not from a page of audit") as caught:
            decode_cursor("audit", encode_cursor("sys", 5))

        assert "cursor" == caught.value.parameter
