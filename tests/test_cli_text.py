# SPDX-License-Identifier: Apache-2.0
"""
How rows are printed: the page's line, JSON, CSV, and nothing that hurts a reader.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasten.cli.text import json_text, render, terminal_safe, text_line
from fasten.rows import API_COLUMNS, AUDIT_COLUMNS, SYS_COLUMNS


def audit(**values):
    """
    Return an audit row in wire form.
    """
    fixed = dict.fromkeys(AUDIT_COLUMNS)
    fixed |= {
        "timestamp": "2026-04-22T12:34:56.123456Z",
        "code": "USER_CREATED",
        "actor": "admin",
        "target": "u-42",
        "severity": "info",
        "outcome": "success",
        "detail": {},
        "monotonic_seq": 7,
    }
    return {"shape": "audit", **fixed, **values}


def sys_row(**values):
    """
    Return a sys row in wire form.
    """
    fixed = dict.fromkeys(SYS_COLUMNS)
    fixed |= {"timestamp": "2026-04-22T12:34:56.123456Z", "level": "info"}
    return {"shape": "sys", **fixed, "event": "user_created", **values}


def api_row(**values):
    """
    Return an api row in wire form.
    """
    fixed = dict.fromkeys(API_COLUMNS)
    fixed |= {"timestamp": "2026-04-22T12:34:56.123456Z", "method": "POST"}
    fixed |= {"path": "/users", "status": 201, "duration_ms": 12.34, "actor": "admin"}
    return {"shape": "api", **fixed, **values}


class TestLines:
    @pytest.mark.parametrize(
        ("values", "line"),
        [
            (
                {},
                "2026-04-22T12:34:56Z  USER_CREATED       admin   target=u-42",
            ),
            (
                {"code": "ORDER_PLACED", "actor": "u-42", "target": "ord-9001"},
                "2026-04-22T12:34:56Z  ORDER_PLACED       u-42    target=ord-9001",
            ),
            (
                {
                    "timestamp": "2026-04-22T12:34:57.000000Z",
                    "code": "PAYMENT_PROCESSED",
                    "actor": "system",
                    "target": "ord-9001",
                },
                "2026-04-22T12:34:57Z  PAYMENT_PROCESSED  system  target=ord-9001",
            ),
            (
                {"code": "DEVICE_SETPOINT_UPDATED", "actor": "device-42"},
                "2026-04-22T12:34:56Z  DEVICE_SETPOINT_UPDATED  device-42  target=u-42",
            ),
            (
                {"actor": None, "target": None},
                "2026-04-22T12:34:56Z  USER_CREATED       (erased)  target=(erased)",
            ),
        ],
    )
    def test_the_page_s_format(self, values, line):
        """
        Time in seconds, code, actor and target stand in the page's columns.
        """

        assert line == text_line(audit(**values))

    def test_a_log_line(self):
        """
        A sys row is level, event and its fields; what has blanks is quoted.
        """
        line = text_line(sys_row(user_id="u-42", note="two words", tries=3, ok=None))

        assert (
            "2026-04-22T12:34:56Z  info      user_created  user_id=u-42  "
            'note="two words"  tries=3  ok=-'
        ) == line

    def test_a_request(self):
        """
        An api row is status, method, path, duration and who.
        """

        assert (
            "2026-04-22T12:34:56Z  201  POST    /users  12.3ms  actor=admin"
        ) == text_line(api_row())
        assert ("2026-04-22T12:34:56Z  -    POST    /users  -  actor=-") == text_line(
            api_row(status=None, duration_ms=None, actor=None)
        )

    def test_colours_do_not_move_anything(self):
        """
        A coloured line is the plain one with colours in it.
        """
        for row in (
            audit(severity="error"),
            sys_row(level="error"),
            api_row(status=500),
        ):
            coloured = text_line(row, is_coloured=True)

            assert "\x1b[31m" in coloured
            assert text_line(row) == (
                coloured.replace("\x1b[31m", "").replace("\x1b[0m", "")
            )


HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07",
    "a\r\nFAKE  LINE",
    "nul\x00 tab\t",
    "csi\x9b31m",
    "\u202egnp.exe",
    "zero\u200bwidth\ufeff",
    "line\u2028para\u2029",
    "\udc80 lone",
    "tag\U000e0041",
)


class TestTerminal:
    @pytest.mark.parametrize("text", HOSTILE)
    def test_hostile_text_is_spelt_out(self, text):
        """
        Escape sequences, line ends, bidi and invisible characters arrive as text.
        """
        for row in (
            audit(target=text, actor=text, code=text),
            sys_row(event=text, **{text: text}),
            api_row(path=text, method=text, actor=text),
        ):
            for line in (text_line(row), json_text(row)):
                assert line.isprintable()

    @given(st.text())
    def test_nothing_unprintable_gets_through(self, text):
        """
        Whatever the text, no control, format, surrogate or separator is left.
        """
        safe = terminal_safe(text)

        assert not {unicodedata.category(c)[0] for c in safe} & {"C"}
        assert not {unicodedata.category(c) for c in safe} & {"Zl", "Zp"}

    def test_plain_text_is_left_as_it_is(self):
        """
        Names of people are no attack.
        """

        assert "Zoë 北京 Ω" == terminal_safe("Zoë 北京 Ω")

    @given(st.recursive(st.text() | st.integers() | st.none(), st.lists, max_leaves=5))
    def test_safe_json_says_the_same(self, value):
        """
        Escaping for the terminal changes no value.
        """

        assert value == json.loads(json_text(value))


class TestOutputs:
    def test_json_is_an_array(self):
        """
        `-o json` is one JSON document, also of no rows.
        """
        rows = [audit(target=f"u-{n}") for n in range(3)]

        assert rows == json.loads("\n".join(render(rows, "json", "audit")))
        assert [] == json.loads("\n".join(render([], "json", "audit")))

    def test_ndjson_is_a_row_a_line(self):
        """
        `-o ndjson` begins each line with the shape, as on stdout of a service.
        """
        lines = list(render([audit(), audit()], "ndjson", "audit"))

        assert 2 == len(lines)
        assert lines[0].startswith('{"shape":"audit","wire_version":')

    def test_lines_come_as_rows_do(self):
        """
        A row is printed before the next one is asked for.
        """
        asked = []

        def rows():
            for number in range(2):
                asked.append(number)
                yield audit(target=f"u-{number}")

        for output in ("text", "ndjson"):
            asked.clear()
            next(iter(render(rows(), output, "audit")))

            assert [0] == asked

    def test_csv_has_a_column_a_key(self):
        """
        CSV names its columns, and holds line ends inside of cells.
        """
        row = audit(detail={"a": 'x"\n'}, reason="two\nlines")
        text = "\n".join(render([row], "csv", "audit"))
        read = list(csv.DictReader(io.StringIO(text, newline="")))

        assert list(AUDIT_COLUMNS) == list(read[0])
        assert {"a": 'x"\n'} == json.loads(read[0]["detail"])
        assert "two\nlines" == read[0]["reason"]
        assert "7" == read[0]["monotonic_seq"]
        assert "" == read[0]["tenant_id"]

    def test_free_fields_have_a_column_of_their_own(self):
        """
        What a caller added to a log line is JSON in one cell, whatever its name.
        """
        row = sys_row(user_id="u-42", fields="mine")
        text = "\n".join(render([row], "csv", "sys"))
        (read,) = csv.DictReader(io.StringIO(text, newline=""))

        assert {"user_id": "u-42", "fields": "mine"} == json.loads(read["fields"])

    @pytest.mark.parametrize(
        "text",
        [
            '=HYPERLINK("http://x")',
            "+1",
            "-1",
            "@SUM(A1)",
            "\t=1",
            "\r=1",
            "  =1",
            "\uff1d1",
            "|calc",
        ],
    )
    def test_a_cell_is_never_a_formula(self, text):
        """
        A spreadsheet shows what somebody called themselves; it does not run it.
        """
        lines = "\n".join(render([audit(target=text)], "csv", "audit"))
        (read,) = csv.DictReader(io.StringIO(lines, newline=""))

        assert f"'{text}" == read["target"]

    def test_trace_puts_all_streams_on_one_sheet(self):
        """
        Rows of all three shapes share the columns of all three.
        """
        rows = [audit(), sys_row(user_id="u"), api_row()]
        text = "\n".join(render(rows, "csv", "trace"))
        read = list(csv.DictReader(io.StringIO(text, newline="")))

        assert ["audit", "sys", "api"] == [row["shape"] for row in read]
        assert "/users" == read[2]["path"]
        assert {"user_id": "u"} == json.loads(read[1]["fields"])
