# SPDX-License-Identifier: Apache-2.0
"""
`fasten init-db`, `--outbox` and `--stream`: its SQL is shown, and is enough.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from click.testing import CliRunner, Result

import fasten
from fasten.cli import main
from tests.transactions import path_of


def run(*words: str, **environ: str) -> Result:
    """
    Run the command as an operator does.
    """
    return CliRunner().invoke(main, ["init-db", *words], env=environ)


class TestPrinted:
    def test_postgres(self) -> None:
        """
        The table is shown with the rights of both roles.
        """
        done = run(
            *("--outbox", "--print-sql", "--mover-role", "fasten_app"),
            *("--writer-role", "Shop", "--dsn", "postgres://o@db/app?table=a.trail"),
        )

        assert 0 == done.exit_code
        assert "CREATE TABLE IF NOT EXISTS a.trail_outbox" in done.stdout
        lines = done.stdout.splitlines()
        assert [
            "GRANT SELECT, INSERT, DELETE ON a.trail_outbox TO fasten_app;",
            'GRANT INSERT ON a.trail_outbox TO "Shop";',
            'GRANT USAGE ON SCHEMA a TO fasten_app, "Shop";',
        ] == lines[-3:]

    def test_which_database(self) -> None:
        """
        It is that of FASTEN_OUTBOX_DSN, else that of FASTEN_AUDIT_DSN.
        """
        both = {
            "FASTEN_AUDIT_DSN": "sqlite:///audit.db?table=one",
            "FASTEN_OUTBOX_DSN": "sqlite:///business.db?table=two",
        }

        assert "two_outbox" in run("--outbox", "--print-sql", **both).stdout
        del both["FASTEN_OUTBOX_DSN"]
        assert "one_outbox" in run("--outbox", "--print-sql", **both).stdout
        assert not Path("business.db").exists()

    def test_no_database(self) -> None:
        """
        Without any, the variable to set is named.
        """
        done = run("--outbox", "--print-sql")

        assert 2 == done.exit_code
        assert "FASTEN_OUTBOX_DSN" in done.stderr

    def test_roles_of_the_outbox(self) -> None:
        """
        The roles of the outbox say nothing about the other tables.
        """
        done = run("--dsn", "sqlite:///a.db", "--mover-role", "shop")

        assert 2 == done.exit_code
        assert "--outbox" in done.stderr
        assert not Path("a.db").exists()


class TestStreams:
    def test_its_own_database(self) -> None:
        """
        The table of a stream is shown as its variable says; another's is not.
        """
        env = {
            "FASTEN_AUDIT_DSN": "postgres://o@db/app",
            "FASTEN_SYS_DSN": "postgres://o@logs/app?table=lines",
        }
        done = run("--stream", "sys", "--print-sql", **env)

        assert 0 == done.exit_code
        assert "CREATE TABLE IF NOT EXISTS lines (" in done.stdout
        assert "GRANT SELECT, INSERT, DELETE ON lines TO fasten_app;" in done.stdout
        assert "audit_log" not in done.stdout
        assert 2 == run("--stream", "api", "--print-sql", **env).exit_code
        assert 2 == run("--stream", "sys", "--outbox", **env).exit_code

    def test_made(self, sqlite_dsn: str) -> None:
        """
        It makes the table, and is content to find it.
        """
        words = ("--stream", "api", "--dsn", sqlite_dsn)

        assert [0, 0] == [run(*words).exit_code, run(*words).exit_code]
        with closing(sqlite3.connect(path_of(sqlite_dsn))) as connection:
            found = connection.execute("SELECT name FROM sqlite_schema").fetchall()
        assert ("api_log",) in found


class TestRun:
    def test_twice_on_sqlite(self, sqlite_dsn: str) -> None:
        """
        It makes the table, and is content to find it.
        """
        sqlite3.connect(path_of(sqlite_dsn)).close()
        with closing(sqlite3.connect(path_of(sqlite_dsn))) as made:
            made.execute("CREATE TABLE orders (id)")

        assert [0, 0] == [run("--outbox", "--dsn", sqlite_dsn).exit_code] * 2
        with closing(sqlite3.connect(path_of(sqlite_dsn))) as connection:
            found = connection.execute("SELECT name FROM sqlite_schema").fetchall()
        assert ("audit_log_outbox",) in found

    def test_its_grants_are_enough(
        self, postgres_dsn: str, sqlite_dsn: str, tmp_path: Path
    ) -> None:
        """
        A role with what it grants takes rows in and moves them on, and owns nothing.
        """
        role = f"business_{urlsplit(postgres_dsn).path[1:]}"
        parts = urlsplit(postgres_dsn)
        mine = parts._replace(netloc=f"{role}@{parts.hostname}:{parts.port}").geturl()
        with psycopg.connect(postgres_dsn, autocommit=True) as owner:
            owner.execute(f"CREATE ROLE {role} LOGIN")
            owner.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        done = run("--outbox", "--dsn", postgres_dsn, "--mover-role", role)
        fasten.init(
            service_id="svc",
            node_id="n",
            stdout="",
            audit_dsn=sqlite_dsn,
            outbox_dsn=mine,
        )
        with closing(psycopg.connect(mine)) as connection:
            fasten.emit("ORDER_PLACED", 1, connection=connection)
            connection.commit()
        stored = fasten.flush(20) and fasten.query().rows
        fasten.close()
        with psycopg.connect(postgres_dsn, autocommit=True) as owner:
            owner.execute(f"DROP OWNED BY {role}")
            owner.execute(f"DROP ROLE {role}")

        assert 0 == done.exit_code
        assert ["1"] == [row.target for row in stored]

    @pytest.mark.parametrize("dsn", ["postgres://nobody:hunter2@127.0.0.1:1/x"])
    def test_a_database_that_is_not_there(self, dsn: str) -> Any:
        """
        It is said, with exit code 3 and no password.
        """
        done = run("--outbox", "--dsn", dsn)

        assert 3 == done.exit_code
        assert "hunter2" not in done.output
