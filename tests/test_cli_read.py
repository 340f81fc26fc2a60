# SPDX-License-Identifier: Apache-2.0
"""
Reading a store back: `tail`, `trace` and `stats`, on SQLite and on Postgres.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pwd
import re
import shlex
import shutil
import sqlite3
import subprocess
import tempfile
from pathlib import Path

import pytest

import fasten
from fasten.rows import AUDIT_COLUMNS, FILTERS, SHORT_FORMS
from tests.cli_runs import (
    emit_sample,
    fasten_on,
    in_terminal,
    program,
    run,
    run_program,
)
from tests.outside import ROOT, run_python, unavailable

SERVICE = {"FASTEN_SERVICE_ID": "svc", "FASTEN_NODE_ID": "host-01"}


def targets(text: str) -> list[str]:
    """
    Return the targets of the page's lines.
    """
    return [line.partition("target=")[2] for line in text.splitlines()]


def ndjson(text: str) -> list[dict]:
    """
    Return the rows of `-o ndjson`.
    """
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def nobody_s_place():
    """
    Return a directory of nobody's, where nobody can get to.
    """
    if os.geteuid() != 0:
        unavailable("only root can leave files that are root's")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        place = Path(folder) / "service"
        place.mkdir()
        shutil.chown(place, "nobody")
        yield place


class TestTail:
    def test_the_page_s_command(self, store_dsn):
        """
        `fasten tail --stream audit --request-id a1b2c3d4` prints the page's lines.
        """
        with fasten_on(store_dsn):
            fasten.emit("AUTH_LOGIN", "u-1")
            emit_sample()
        done = run(
            *("tail", "--stream", "audit", "--request-id", "a1b2c3d4"),
            FASTEN_AUDIT_DSN=store_dsn,
        )

        assert (0, "") == (done.exit_code, done.stderr)
        assert [
            "Z  USER_CREATED       admin   target=u-42",
            "Z  ORDER_PLACED       u-42    target=ord-9001",
            "Z  PAYMENT_PROCESSED  system  target=ord-9001",
        ] == [line[19:] for line in done.stdout.splitlines()]
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ  USER", done.stdout)

    def test_the_newest_rows_oldest_first(self, store_dsn):
        """
        `-n` takes from the end; what is printed reads from top to bottom.
        """
        with fasten_on(store_dsn):
            for number in range(12):
                fasten.emit("JOB_COMPLETED", f"j-{number}")
        done = run("tail", "-n", "3", "--dsn", store_dsn)

        assert ["j-9", "j-10", "j-11"] == targets(done.stdout)

    def test_more_rows_than_a_page(self, store_dsn):
        """
        Pages of the store are joined, whether for a number of rows or for all.
        """
        with fasten_on(store_dsn):
            for number in range(2_345):
                fasten.emit("JOB_COMPLETED", f"j-{number}")
        every = [f"j-{number}" for number in range(2_345)]

        assert every == targets(run("tail", "-n", "all", "--dsn", store_dsn).stdout)
        assert every[-1_500:] == targets(
            run("tail", "-n", "1500", "--dsn", store_dsn).stdout
        )
        assert every[-100:] == targets(run("tail", "--dsn", store_dsn).stdout)
        assert "-n all" in run("tail", "--dsn", store_dsn).stderr

    def test_order_cursor_and_offset_page_through(self, store_dsn):
        """
        With --order a page begins at that end, and its cursor goes on from there.
        """
        with fasten_on(store_dsn):
            for number in range(10):
                fasten.emit("JOB_COMPLETED", f"j-{number}")
        first = run("tail", "-n", "4", "--order", "asc", "--dsn", store_dsn)
        cursor = first.stderr.split()[-1]
        second = run(
            *("tail", "-n", "4", "--order", "asc", "--cursor", cursor),
            *("--dsn", store_dsn),
        )
        third = run("tail", "-n", "2", "--offset", "3", "--dsn", store_dsn)
        fourth = run("tail", "-n", "2", "--order", "desc", "--dsn", store_dsn)

        assert ["j-0", "j-1", "j-2", "j-3"] == targets(first.stdout)
        assert ["j-4", "j-5", "j-6", "j-7"] == targets(second.stdout)
        assert ["j-5", "j-6"] == targets(third.stdout)
        assert ["j-9", "j-8"] == targets(fourth.stdout)

    def test_count_prints_a_number_only(self, store_dsn):
        """
        `--count` is for scripts: one number, whatever the limit.
        """
        with fasten_on(store_dsn):
            emit_sample()
        done = run("tail", "--count", "--dsn", store_dsn, "--target", "ord-9001")

        assert "2\n" == done.stdout

    def test_each_filter_of_the_reader_is_an_option(self, sqlite_dsn):
        """
        A row is found by each of its wire keys, by long and by short name.
        """
        with fasten_on(sqlite_dsn, tenant_id="t-1"):
            with fasten.bind("a1b2c3d4", trace_id="ab" * 16, span_id="cd" * 8):
                fasten.emit(
                    *("USER_CREATED", "u-42"),
                    actor="admin",
                    client="10.0.0.1",
                    on_behalf_of="boss",
                    reason="asked to",
                )
            fasten.emit("AUTH_FAILED", "u-1", outcome="denied")
        (row,) = ndjson(
            run(
                "tail", "-o", "ndjson", "--id", _first(sqlite_dsn), "--dsn", sqlite_dsn
            ).stdout
        )
        for name in FILTERS["audit"]:
            if name == "shipped_at":
                continue  # no row has been shipped
            option = f"--{name.replace('_', '-')}"
            found = run(
                *("tail", "-o", "ndjson", option, str(row[name])),
                *("--dsn", sqlite_dsn),
            )

            assert row in ndjson(found.stdout), (name, found.stderr)
        for short, long in SHORT_FORMS.items():
            found = run("tail", f"--{short}", str(row[long]), "--dsn", sqlite_dsn)

            assert "target=u-42" in found.stdout, short

    def test_a_window_of_time(self, store_dsn):
        """
        --since takes a duration back from now, --until a time.
        """
        with fasten_on(store_dsn):
            emit_sample()

        assert 3 == len(
            targets(run("tail", "--since", "2h", "--dsn", store_dsn).stdout)
        )
        assert "" == run("tail", "--until", "2020-01-01", "--dsn", store_dsn).stdout
        assert 3 == len(
            targets(
                run("tail", "--since", "2020-01-01", "--dsn", store_dsn).stdout,
            )
        )

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--path", "/x"], "unknown parameter 'path'"),
            (["--severity", "loud"], "severity 'loud' is none of"),
            (["--since", "yesterday"], "since 'yesterday' is not a time"),
            (["--cursor", "nope"], "cursor 'nope' is not"),
            (["-n", "0"], "'0' is not a number from 1"),
            (["--token", "x"], "--token goes with --url"),
            (["--url", "http://h", "--dsn", "sqlite:////x"], "exclude each other"),
            (["-f", "--count"], "--count: not together with --follow"),
            (["-f", "--until", "1h", "--order", "asc"], "--until, --order: not tog"),
            (["-f", "-o", "json"], "use -o ndjson"),
        ],
    )
    def test_wrong_words_are_told(self, sqlite_dsn, words, said):
        """
        What cannot be meant is exit 2, with the value and the cure.
        """
        done = run("tail", *words, FASTEN_AUDIT_DSN=sqlite_dsn)

        assert 2 == done.exit_code
        assert said in done.stderr
        assert "" == done.stdout

    @pytest.mark.parametrize("output", ["json", "ndjson"])
    def test_json_holds_every_wire_key(self, store_dsn, output):
        """
        JSON is the wire form: shape, then every key, in order.
        """
        with fasten_on(store_dsn):
            emit_sample()
        text = run("tail", "-o", output, "--dsn", store_dsn).stdout
        rows = json.loads(text) if output == "json" else ndjson(text)

        assert 3 == len(rows)
        assert ["shape", *AUDIT_COLUMNS] == list(rows[0])
        assert {"plan": "pro"} == rows[0]["detail"]

    def test_csv_of_a_store(self, store_dsn):
        """
        CSV has a line of names and a line a row.
        """
        with fasten_on(store_dsn):
            emit_sample()
        text = run("tail", "-o", "csv", "--dsn", store_dsn).stdout
        rows = list(csv.DictReader(io.StringIO(text)))

        assert ["u-42", "ord-9001", "ord-9001"] == [row["target"] for row in rows]

    def test_durable_log_and_api_rows(self, store_dsn):
        """
        Sys and api rows are read from their stores, with their own filters.
        """
        with fasten_on(
            store_dsn,
            sys_dsn=_table(store_dsn, "sys"),
            api_dsn=_table(store_dsn, "api"),
        ):
            with fasten.bind("a1b2c3d4"):
                fasten.log.info("user_created", user_id="u-42")
                fasten.log.warning("slow")
                fasten.record_api(method="POST", path="/users", status=201)
        environ = {
            "FASTEN_SYS_DSN": _table(store_dsn, "sys"),
            "FASTEN_API_DSN": _table(store_dsn, "api"),
        }
        logged = run("tail", "--stream", "sys", "--level", "info", **environ)
        asked = run("tail", "--stream", "api", "--status", "201", **environ)
        found = run("tail", "--stream", "sys", "--q", "SLO", **environ)

        assert "user_created  user_id=u-42" in logged.stdout
        assert 1 == len(logged.stdout.splitlines())
        assert "201  POST    /users" in asked.stdout
        assert "slow" in found.stdout

    def test_text_is_looked_for_in_every_line(self, store_dsn, monkeypatch):
        """
        A page of a search looks at so many lines; the command goes on behind them.
        """
        monkeypatch.setattr("fasten.repository.stream.SEARCHED", 10)
        dsn = f"{store_dsn}?table=sys_log"
        with fasten_on(None, sys_dsn=dsn):
            for number in range(35):
                fasten.log.info("needle" if number == 3 else "hay", n=number)
        done = run("tail", "--stream", "sys", "--dsn", dsn, "--q", "needle")

        assert (0, "") == (done.exit_code, done.stderr)
        assert ["needle  n=3"] == [line[-11:] for line in done.stdout.splitlines()]

    def test_memory_is_not_a_store(self, store_dsn):
        """
        Without FASTEN_SYS_DSN there is nothing to read from here, and how to get at it.
        """
        done = run("tail", "--stream", "sys", FASTEN_AUDIT_DSN=store_dsn)

        assert 2 == done.exit_code
        assert "ask its reader with --url" in done.stderr

    def test_a_terminal_gets_colours_unless_it_says_no(self, sqlite_dsn):
        """
        Colours are for terminals; NO_COLOR and pipes get the plain line.
        """
        with fasten_on(sqlite_dsn):
            emit_sample()
        _, coloured = in_terminal("tail", "--dsn", sqlite_dsn)
        _, plain = in_terminal("tail", "--dsn", sqlite_dsn, NO_COLOR="1")
        piped = run_program("tail", "--dsn", sqlite_dsn).stdout

        assert "\x1b[31mPAYMENT_PROCESSED" in coloured
        assert piped == plain
        assert piped == re.sub(r"\x1b\[\d+m", "", coloured)

    def test_an_odd_locale_still_prints(self, sqlite_dsn):
        """
        Text that stdout cannot encode is escaped, not a traceback.
        """
        with fasten_on(sqlite_dsn):
            fasten.emit("USER_CREATED", "Zoë 北京")
        done = run_program(
            "tail",
            "--dsn",
            sqlite_dsn,
            encoding="latin-1",
            env={"PYTHONIOENCODING": "latin-1"},
        )

        assert (0, "") == (done.returncode, done.stderr)
        assert "target=Zo\xeb \\u5317\\u4eac" in done.stdout

    def test_root_leaves_the_service_its_files(self, tmp_path, nobody_s_place):
        """
        `sudo fasten tail`, or doctor, beside a service's SQLite file locks out nobody.
        """
        owner = pwd.getpwnam("nobody")
        dsn = f"sqlite:///{nobody_s_place}/audit.db"
        # The interpreter may be out of nobody's reach: first load, then change.
        code = f"""
            import os, sys
            import fasten
            for dsn in ("sqlite:///{tmp_path}/other.db", {dsn!r}):
                fasten.init(service_id="svc", stdout="", audit_dsn=dsn)
                fasten.emit("USER_CREATED", sys.argv[1])
                assert fasten.flush(20), fasten.health()
                fasten.close()
                if os.geteuid() == 0:
                    os.setgroups([])
                    os.setgid({owner.pw_gid})
                    os.setuid({owner.pw_uid})
        """

        def emit(target: str) -> None:
            done = run_python(code, target, cwd="/")

            assert "" == done.stderr

        emit("first")
        looked = run_program("doctor", env=SERVICE | {"FASTEN_AUDIT_DSN": dsn})
        assert 0 == looked.returncode, looked.stdout
        assert "target=first" in run_program("tail", "--dsn", dsn).stdout
        emit("second")
        seen = targets(run_program("tail", "--dsn", dsn).stdout)

        assert ["first", "doctor", "second"] == seen
        assert {owner.pw_uid} == {p.stat().st_uid for p in nobody_s_place.rglob("*")}

    def test_reading_changes_nothing(self, tmp_path, sqlite_dsn):
        """
        Reading writes to no table, and makes no store where there is none.
        """
        with fasten_on(sqlite_dsn):
            emit_sample()
        path = tmp_path / "audit.db"
        before = _dump(path)
        for words in (["tail"], ["trace", "a1b2c3d4"], ["stats"], ["tail", "--count"]):
            assert 0 == run(*words, FASTEN_AUDIT_DSN=sqlite_dsn).exit_code

        assert before == _dump(path)


def _dump(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    try:
        return list(connection.iterdump())
    finally:
        connection.close()


def _first(dsn: str) -> str:
    done = run("tail", "-o", "ndjson", "--code", "USER_CREATED", "--dsn", dsn)
    found: str = ndjson(done.stdout)[0]["id"]
    return found


def _table(dsn: str, stream: str) -> str:
    return f"{dsn}?table={stream}_log"


class TestTrace:
    def record(self, dsn: str) -> None:
        """
        Record one request in all three streams.
        """
        with (
            fasten_on(dsn, sys_dsn=_table(dsn, "sys"), api_dsn=_table(dsn, "api")),
            fasten.bind("a1b2c3d4"),
        ):
            fasten.emit("USER_CREATED", "u-42", actor="admin", detail={"plan": "pro"})
            fasten.log.info("user_created", user_id="u-42", note="x" * 200)
            fasten.record_api(
                method="POST", path="/users", status=201, duration_ms=12.5
            )

    def environ(self, dsn: str) -> dict[str, str]:
        """
        Return the environment of that service.
        """
        return {
            "FASTEN_AUDIT_DSN": dsn,
            "FASTEN_SYS_DSN": _table(dsn, "sys"),
            "FASTEN_API_DSN": _table(dsn, "api"),
        }

    def test_three_streams_on_one_timeline(self, store_dsn):
        """
        `trace` shows what happened in order, within 80 columns.
        """
        self.record(store_dsn)
        done = run("trace", "a1b2c3d4", **self.environ(store_dsn))
        lines = done.stdout.splitlines()

        assert (0, "") == (done.exit_code, done.stderr)
        assert "request a1b2c3d4" == lines[0]
        assert "3 rows in " in lines[1]
        assert lines[2].endswith("-- api-server on host-01")
        assert "    +0.000s  audit  USER_CREATED  admin -> u-42  {" in lines[3]
        assert ["audit", "sys", "api"] == re.findall(
            r"^ +\+[\d.]+s  (\w+)", done.stdout, re.MULTILINE
        )
        assert "201 POST /users duration_ms=12.5" in done.stdout
        assert 80 >= max(map(len, lines))

    def test_on_a_terminal_it_uses_the_width(self, sqlite_dsn):
        """
        A wide terminal gets long lines, a narrow one short ones, both colours.
        """
        self.record(sqlite_dsn)
        plain = re.compile(r"\x1b\[\d+m")
        for columns in (60, 200):
            _, seen = in_terminal(
                *("trace", "a1b2c3d4"),
                columns=columns,
                **self.environ(sqlite_dsn),
            )
            widths = [len(plain.sub("", line)) for line in seen.splitlines()]

            assert "\x1b[" in seen
            assert columns - 20 < max(widths) <= columns

    def test_the_same_in_json(self, store_dsn):
        """
        Programs get the rows with their shape, in order.
        """
        self.record(store_dsn)
        done = run("trace", "a1b2c3d4", "-o", "json", **self.environ(store_dsn))

        assert ["audit", "sys", "api"] == [
            row["shape"] for row in json.loads(done.stdout)
        ]

    def test_streams_without_a_store_are_named(self, sqlite_dsn):
        """
        What cannot be shown is said on stderr, what can is shown.
        """
        with fasten_on(sqlite_dsn):
            emit_sample()
        done = run("trace", "a1b2c3d4", FASTEN_AUDIT_DSN=sqlite_dsn)

        assert 0 == done.exit_code
        assert "FASTEN_SYS_DSN" in done.stderr
        assert "outcome=failure" in done.stdout

    def test_an_unknown_id_is_an_empty_answer(self, sqlite_dsn):
        """
        Nothing under an id is no failure; it is said on stderr.
        """
        with fasten_on(sqlite_dsn):
            emit_sample()
        done = run("trace", "no\x1bsuch", FASTEN_AUDIT_DSN=sqlite_dsn)

        assert (0, "") == (done.exit_code, done.stdout)
        assert "nothing is recorded under request id no\\x1bsuch" in done.stderr

    def test_erased_rows_say_so(self, sqlite_dsn, tmp_path):
        """
        A subject that was erased stays erased on the timeline.
        """
        with fasten_on(sqlite_dsn):
            emit_sample()
        connection = sqlite3.connect(tmp_path / "audit.db")
        connection.execute("UPDATE audit_log SET actor = NULL, detail = NULL")
        connection.commit()
        connection.close()
        done = run("trace", "a1b2c3d4", FASTEN_AUDIT_DSN=sqlite_dsn)

        assert "USER_CREATED  (erased) -> u-42" in done.stdout


class TestStats:
    def test_rows_by_code(self, store_dsn):
        """
        `stats` counts each stream, and audit rows by code.
        """
        with fasten_on(store_dsn):
            emit_sample()
            fasten.emit("ORDER_PLACED", "ord-2")
        done = run("stats", FASTEN_AUDIT_DSN=store_dsn)

        assert 0 == done.exit_code
        assert re.search(r"^audit +4 rows  20\d\d-.*Z \.\. 20", done.stdout)
        assert re.search(r"^ +2  ORDER_PLACED$", done.stdout, re.MULTILINE)

    def test_in_json_by_outcome_and_window(self, store_dsn):
        """
        Programs get numbers; a window bounds them.
        """
        with fasten_on(store_dsn):
            emit_sample()
        words = ("stats", "--by", "outcome", "-o", "json")
        told = json.loads(run(*words, FASTEN_AUDIT_DSN=store_dsn).stdout)
        none = json.loads(
            run(*words, "--until", "2020-01-01", FASTEN_AUDIT_DSN=store_dsn).stdout
        )

        assert 3 == told["audit"]["rows"]
        assert {"outcome": {"success": 2, "failure": 1}} == told["by"]
        assert {"rows": 0, "oldest": None, "newest": None} == none["audit"]

    def test_codes_that_nothing_registers_here_are_counted_too(self, sqlite_dsn):
        """
        Rows of another service's codes are (other), so that the sum is right.
        """
        with fasten_on(sqlite_dsn, strict=False):
            emit_sample()
            fasten.emit("NOBODY_KNOWS", "x")
        done = run("stats", FASTEN_AUDIT_DSN=sqlite_dsn)

        assert re.search(r"^ +1  \(other\)$", done.stdout, re.MULTILINE)


class TestCompletion:
    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_each_shell_has_a_script(self, shell):
        """
        `completion` prints what the shell evaluates.
        """
        done = run_program("completion", shell)

        assert (0, "") == (done.returncode, done.stderr)
        assert "_FASTEN_COMPLETE" in done.stdout

    def test_bash_completes_codes(self, tmp_path):
        """
        In a real bash, a code's beginning is completed from the registry.
        """
        (tmp_path / "shop.codes.yaml").write_text(
            "domain: shop\ncodes: {CART_FILLED: }"
        )
        script = tmp_path / "fasten"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(program())} "$@"\n')
        script.chmod(0o755)
        commands = (
            'eval "$(fasten completion bash)"; '
            "COMP_WORDS=(fasten tail --code CART); COMP_CWORD=3; "
            "_fasten_completion fasten CART --code; echo ${COMPREPLY[@]}"
        )
        done = subprocess.run(
            ["bash", "--norc", "-c", commands],
            env={
                **os.environ,
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
            check=False,
        )

        assert "CART_FILLED\n" == done.stdout, done.stderr
