# SPDX-License-Identifier: Apache-2.0
"""
`verify`, `checkpoint`, `keygen` and `export`: proof on the command line.
"""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from pathlib import Path

import pytest

from fasten.chain import ed25519_signer
from fasten.rows import AUDIT_COLUMNS
from tests.cli_runs import emit_sample, fasten_on, in_terminal, run
from tests.ledger import SEED

VKEY = ed25519_signer("api-server", SEED).vkey
KEY = {"FASTEN_SIGNING_KEY": SEED, "FASTEN_SERVICE_ID": "api-server"}


@pytest.fixture
def dsn(store_dsn: str) -> str:
    """
    Give a store with the rows of the page.
    """
    with fasten_on(store_dsn):
        emit_sample()
    return store_dsn


@pytest.fixture
def path(sqlite_dsn: str) -> Path:
    """
    Give the path of a SQLite store with the rows of the page.
    """
    with fasten_on(sqlite_dsn):
        emit_sample()
    return Path(sqlite_dsn.removeprefix("sqlite:///"))


def spoil(path: Path, sql: str) -> None:
    """
    Do what nobody should to a store.
    """
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(sql)
    connection.close()


class TestVerify:
    def test_untouched_is_ok(self, dsn):
        """
        The verdict, then a line for each chain, with what no checkpoint holds.
        """
        done = run("verify", "--dsn", dsn)
        verdict, *chains = done.stdout.splitlines()

        assert 0 == done.exit_code
        assert verdict.startswith("ok, unanchored: shows accidents")
        assert "(3 rows, 1 chain)" in verdict
        assert ["rows after the last checkpoint: 3"] == [
            line.rpartition(", ")[2] for line in chains
        ]

    def test_the_first_bad_row_is_named(self, path):
        """
        By its number and id; the exit code is 1.
        """
        spoil(path, "UPDATE audit_log SET actor = 'mallory' WHERE monotonic_seq = 2")
        done = run("verify", "--dsn", f"sqlite:///{path}")

        assert 1 == done.exit_code
        assert "tampered: api-server/host-01/long at 2 (evt-" in done.stdout

    def test_json(self, path):
        """
        The same as an object.
        """
        spoil(path, "DELETE FROM audit_log WHERE monotonic_seq = 3")
        done = run("verify", "--dsn", f"sqlite:///{path}", "-o", "json")
        told = json.loads(done.stdout)

        assert (1, "truncated") == (done.exit_code, told["status"])
        assert (3, 3) == (
            told["findings"][0]["from_seq"],
            told["findings"][0]["to_seq"],
        )

    def test_no_store(self, tmp_path):
        """
        Nothing can be said of it, and none is made.
        """
        done = run("verify", "--dsn", f"sqlite:///{tmp_path}/none.db")

        assert 3 == done.exit_code
        assert [] == list(tmp_path.glob("none.db*"))

    def test_no_dsn(self):
        """
        The variable to set is named.
        """
        done = run("verify")

        assert 2 == done.exit_code
        assert "FASTEN_AUDIT_DSN" in done.stderr

    @pytest.mark.parametrize(
        "words",
        [
            ("--checkpoint", "none.note"),
            ("--checkpoint", "empty"),
            ("--key", "shop+0+x"),
            ("--key", "empty"),
        ],
    )
    def test_what_is_no_checkpoint_or_key_is_refused(self, path, words):
        """
        An empty file must not pass for a checkpoint that fits.
        """
        Path("empty").touch()
        done = run("verify", "--dsn", f"sqlite:///{path}", *words)

        assert 2 == done.exit_code
        assert words[0] in done.stderr

    def test_a_terminal_sees_how_far_it_is(self, path):
        """
        On stderr; data stays on stdout.
        """
        code, seen = in_terminal("verify", "--dsn", f"sqlite:///{path}")

        assert 0 == code
        assert "ok, unanchored" in seen

    def test_stdin(self, path):
        """
        `-` is an export that comes through a pipe.
        """
        lines = run("export", "--dsn", f"sqlite:///{path}").stdout
        from click.testing import CliRunner

        from fasten.cli import main

        done = CliRunner().invoke(main, ["verify", "-"], input=lines)

        assert 0 == done.exit_code


class TestCheckpoint:
    def test_a_cut_tail_is_found(self, path):
        """
        With what was carried off, also where the heads were edited to fit.
        """
        env = {"FASTEN_AUDIT_DSN": f"sqlite:///{path}", **KEY}
        backup = path.read_bytes()
        with fasten_on(f"sqlite:///{path}"):
            emit_sample()
        written = run("checkpoint", "-o", "c.note", **env)
        for each in path.parent.glob("audit.db-*"):
            each.unlink()
        path.write_bytes(backup)
        done = run("verify", "--checkpoint", "c.note", "--key", VKEY, **env)

        assert (0, 1) == (written.exit_code, done.exit_code)
        assert "truncated" in done.stdout
        assert 0 == run("verify", **env).exit_code

    def test_stdout_and_file_hold_the_same(self, dsn):
        """
        Notes stand one after the other.
        """
        env = {"FASTEN_AUDIT_DSN": dsn, **KEY}
        printed = run("checkpoint", **env).stdout
        run("checkpoint", "-o", "c.note", **env)

        assert printed == Path("c.note").read_text()
        assert printed.startswith("api-server/host-01/long\n3\n")
        done = run("verify", "--checkpoint", "c.note", "--require-anchor", **env)
        assert 0 == done.exit_code

    def test_an_anchor_is_required(self, dsn):
        """
        A log that nobody ever signed is unverifiable then.
        """
        assert 3 == run("verify", "--dsn", dsn, "--require-anchor").exit_code

    def test_without_a_key(self, dsn):
        """
        It is told how to make one.
        """
        done = run("checkpoint", FASTEN_AUDIT_DSN=dsn, FASTEN_SERVICE_ID="api-server")

        assert 1 == done.exit_code
        assert "fasten keygen" in done.stderr

    def test_without_a_service(self, dsn):
        """
        Chains are a service's.
        """
        done = run("checkpoint", "--dsn", dsn, FASTEN_SIGNING_KEY=SEED)

        assert 2 == done.exit_code
        assert "FASTEN_SERVICE_ID" in done.stderr


class TestKeygen:
    def test_both_halves(self, dsn):
        """
        What is printed can be appended to an .env, and signs.
        """
        done = run("keygen", FASTEN_SERVICE_ID="api-server")
        secret, public = done.stdout.splitlines()
        name, _, key = secret.partition("=")
        env = {"FASTEN_AUDIT_DSN": dsn, "FASTEN_SERVICE_ID": "api-server", name: key}
        run("checkpoint", "-o", "c.note", **env)
        vkey = public.removeprefix("# vkey: ")
        done = run("verify", "--dsn", dsn, "--checkpoint", "c.note", "--key", vkey)

        assert "FASTEN_SIGNING_KEY" == name
        assert 0 == done.exit_code

    def test_a_file(self, dsn):
        """
        The secret half goes into a file that only its owner reads.
        """
        done = run("keygen", "-o", "key.pem", FASTEN_SERVICE_ID="api-server")
        Path("key.vkey").write_text(done.stdout)
        env = {
            "FASTEN_AUDIT_DSN": dsn,
            "FASTEN_SERVICE_ID": "api-server",
            "FASTEN_SIGNING_KEY": "./key.pem",
        }
        run("checkpoint", "-o", "c.note", **env)
        words = ("--checkpoint", "c.note", "--key", "key.vkey")

        assert 0o600 == Path("key.pem").stat().st_mode & 0o777
        assert 0 == run("verify", "--dsn", dsn, *words).exit_code
        assert 1 == run("keygen", "-o", "key.pem", **KEY).exit_code

    def test_a_variable_that_names_the_file_already(self):
        """
        The key is made even if the environment is ready for it.
        """
        env = {"FASTEN_SERVICE_ID": "api-server", "FASTEN_SIGNING_KEY": "./key.pem"}
        done = run("keygen", "-o", "key.pem", **env)

        assert 0 == done.exit_code, done.stderr

    def test_who_may_not_read_the_key(self, dsn):
        """
        Rows are shown, and checked against a public key, without the secret one.
        """
        run("checkpoint", FASTEN_AUDIT_DSN=dsn, **KEY)
        env = {"FASTEN_AUDIT_DSN": dsn, "FASTEN_SIGNING_KEY": "./not-mine.pem"}

        assert 0 == run("tail", **env).exit_code
        assert 0 == run("verify", "--key", VKEY, **env).exit_code
        assert 2 == run("verify", **env).exit_code

    def test_a_key_of_somebody_else(self, dsn):
        """
        It is unverifiable, not ok.
        """
        run("checkpoint", FASTEN_AUDIT_DSN=dsn, **KEY)
        foreign = ed25519_signer("api-server", "A" * 43 + "=").vkey

        assert 3 == run("verify", "--dsn", dsn, "--key", foreign).exit_code


class TestExport:
    def test_every_key_as_it_is_stored(self, dsn):
        """
        Salt and commitment included; `shape` first.
        """
        lines = run("export", "--dsn", dsn).stdout.splitlines()
        rows = [json.loads(line) for line in lines]

        assert 3 == len(rows)
        assert ["shape", *AUDIT_COLUMNS] == list(rows[0])
        assert {"plan": "pro"} == rows[0]["detail"]
        assert 32 == len(rows[0]["salt"])

    def test_a_bundle_proves_itself(self, dsn):
        """
        With the public key alone; an edit of it is found.
        """
        run("export", "--to", "e.ndjson", FASTEN_AUDIT_DSN=dsn, **KEY)
        text = Path("e.ndjson").read_text()
        Path("forged.ndjson").write_text(text.replace('"admin"', '"mallory"', 1))
        Path("cut.ndjson").write_text("".join(text.splitlines(keepends=True)[1:]))
        lines = text.splitlines(keepends=True)
        Path("short.ndjson").write_text("".join([*lines[:2], *lines[3:]]))
        codes = {
            name: run("verify", f"{name}.ndjson", "--key", VKEY).exit_code
            for name in ("e", "forged", "cut", "short")
        }

        assert {"e": 0, "forged": 1, "cut": 1, "short": 1} == codes

    def test_the_key_in_a_bundle_is_not_trusted(self, dsn):
        """
        Whoever forged the file could have put it there: it is shown, to be compared.
        """
        run("export", "--to", "e.ndjson", FASTEN_AUDIT_DSN=dsn, **KEY)
        done = run("verify", "e.ndjson")

        assert 3 == done.exit_code
        assert VKEY in done.stderr

    def test_filters(self, dsn):
        """
        Those of the reader; a selection carries no checkpoint.
        """
        done = run("export", "--target", "ord-9001", FASTEN_AUDIT_DSN=dsn, **KEY)
        rows = [json.loads(line) for line in done.stdout.splitlines()]

        assert ["ORDER_PLACED", "PAYMENT_PROCESSED"] == [row["code"] for row in rows]

    def test_a_cursor_goes_on(self, dsn):
        """
        The next export has what came since; both together verify.
        """
        first = run("export", "--dsn", dsn)
        cursor = first.stderr.split("--cursor ")[1].strip()
        with fasten_on(dsn):
            emit_sample()
        second = run("export", "--dsn", dsn, "--cursor", cursor)
        Path("both.ndjson").write_text(first.stdout + second.stdout)

        assert 3 == len(second.stdout.splitlines())
        assert 0 == run("verify", "both.ndjson").exit_code
        assert 2 == run("export", "--dsn", dsn, "--cursor", "x").exit_code

    def test_csv_runs_no_formula(self, sqlite_dsn):
        """
        Whatever a spreadsheet would run gets a quote in front.
        """
        with fasten_on(sqlite_dsn):
            import fasten

            fasten.emit("USER_CREATED", "=cmd|' /C calc'!A0", detail={"a": [1]})
        done = run("export", "--dsn", sqlite_dsn, "-o", "csv")
        head, row = csv.reader(io.StringIO(done.stdout))
        values = dict(zip(head, row, strict=True))

        assert list(AUDIT_COLUMNS) == head
        assert "'=cmd|' /C calc'!A0" == values["target"]
        assert '{"a":[1]}' == values["detail"]

    def test_an_erased_row_verifies_in_a_bundle(self, dsn):
        """
        Its salt tells what it has to.
        """
        env = {"FASTEN_AUDIT_DSN": dsn, "FASTEN_NODE_ID": "host-01", **KEY}
        erased = run("erase", "--actor", "admin", "--reason", "r", "--yes", **env)
        run("export", "--to", "e.ndjson", **env)

        assert 0 == erased.exit_code
        assert 0 == run("verify", "e.ndjson", "--key", VKEY).exit_code
