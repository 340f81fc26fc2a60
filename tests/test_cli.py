# SPDX-License-Identifier: Apache-2.0
"""
The `fasten` command as a whole: what there is, help, exit codes, --env-file.
"""

from __future__ import annotations

import os
import re
import subprocess

import click
import pytest

import fasten
from fasten.cli import COMMANDS, main
from tests.cli_runs import emit_sample, fasten_on, program, run, write
from tests.outside import ROOT, run_python


def commands() -> dict[tuple[str, ...], click.Command]:
    """
    Return every command by its words, those of groups included.
    """
    found: dict[tuple[str, ...], click.Command] = {}
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        found[(name,)] = command
        if isinstance(command, click.Group):
            for inner, nested in command.commands.items():
                found[(name, inner)] = nested
    return found


EACH = pytest.mark.parametrize("words", commands(), ids=" ".join)


class TestCommands:
    def test_the_three_of_the_page_are_there(self):
        """
        The page promises dump, tail and doctor.
        """

        assert {"dump", "tail", "doctor"} <= set(COMMANDS)

    @EACH
    def test_each_has_help_with_an_example(self, words):
        """
        The help of a command shows how it is typed.
        """
        done = run(*words, "--help")

        assert 0 == done.exit_code
        if not isinstance(commands()[words], click.Group):
            example = re.sub(r"\s+", " ", done.stdout).partition("Example: ")[2]
            assert f"fasten {' '.join(words)}" in example

    @EACH
    def test_each_takes_an_env_file(self, words):
        """
        Settings can come from a file, whatever the command.
        """

        assert "--env-file" in run(*words, "--help").stdout

    @EACH
    def test_each_option_has_help(self, words):
        """
        No option is listed without a word on what it does.
        """
        silent = [
            param.name
            for param in commands()[words].params
            if isinstance(param, click.Option) and not param.help
        ]

        assert [] == silent

    def test_version(self):
        """
        `--version` names the program and its version.
        """
        done = run("--version")

        assert 0 == done.exit_code
        assert done.stdout.startswith("fasten, version ")

    def test_a_misspelt_command_is_told_the_nearest(self):
        """
        A typing mistake costs one look at the message.
        """
        done = run("tali")

        assert 2 == done.exit_code
        assert "did you mean 'tail'" in done.stderr

    def test_dump_loads_no_database(self):
        """
        Commands load what they need: `dump` needs no SQLAlchemy.
        """
        done = run_python(
            """
            import sys
            from fasten.cli import main
            try:
                main(["dump"], prog_name="fasten")
            except SystemExit as done:
                assert done.code == 0, done
            assert "sqlalchemy" not in sys.modules
            assert "fasten.cli.read" not in sys.modules
            """
        )

        assert (0, "") == (done.returncode, done.stderr)


class TestEnvFile:
    def test_the_page_s_file_works(self, tmp_path):
        """
        The .env of the page is enough for tail.
        """
        with fasten_on(f"sqlite:///{tmp_path}/audit.db"):
            emit_sample()
        write(
            tmp_path / ".env",
            "# .env\nFASTEN_SERVICE_ID=my-service\nFASTEN_NODE_ID=host-01\n"
            "FASTEN_AUDIT_DSN=sqlite:///./audit.db\n",
        )
        done = run("tail", "--env-file", ".env")

        assert 0 == done.exit_code
        assert 3 == len(done.stdout.splitlines())

    @pytest.mark.parametrize("place", ["before", "after"])
    def test_it_stands_before_or_after_the_command(self, tmp_path, place):
        """
        `fasten --env-file F tail` and `fasten tail --env-file F` are the same.
        """
        write(tmp_path / "e", f"FASTEN_AUDIT_DSN=sqlite:///{tmp_path}/none.db\n")
        option = ["--env-file", "e"]
        done = run(*option, "tail") if place == "before" else run("tail", *option)

        assert 3 == done.exit_code
        assert "none.db" in done.stderr

    def test_it_wins_over_the_environment_and_leaves_it_alone(
        self, tmp_path, monkeypatch
    ):
        """
        A file named on the command line counts, for the time of the command.
        """
        monkeypatch.setenv("FASTEN_AUDIT_DSN", "sqlite:////outer.db")
        write(tmp_path / "e", "FASTEN_AUDIT_DSN=sqlite:////inner.db\nNEW_NAME=1\n")
        done = run("tail", "--env-file", "e")

        assert "/inner.db" in done.stderr
        assert "sqlite:////outer.db" == os.environ["FASTEN_AUDIT_DSN"]
        assert "NEW_NAME" not in os.environ

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (
                "FASTEN_AUDIT_DSN=postgres://user:pw\n  @db:5432/app\n",
                "line 2: not NAME",
            ),
            ("A=1\nB='x\n", "line 2: B: a quote is not closed"),
            ("A=b c\n", "line 1: A: put a value with blanks"),
            ("A=pa$ssword\n", "line 1: A: a $ refers to a variable"),
        ],
    )
    def test_a_broken_file_is_told_without_its_values(self, tmp_path, text, said):
        """
        The message names file and line; a value may be a password.
        """
        write(tmp_path / "e", text)
        done = run("tail", "--env-file", "e")

        assert 2 == done.exit_code
        assert f"e, {said}" in done.stderr
        assert "pw" not in done.stderr
        assert "ssword" not in done.stderr


class TestExitCodes:
    def test_a_missing_store_cannot_say(self, tmp_path):
        """
        No store is exit 3, and the message names the absolute path.
        """
        done = run("tail", FASTEN_AUDIT_DSN="sqlite:///./none.db")

        assert 3 == done.exit_code
        assert "" == done.stdout
        assert f"sqlite:///./none.db ({tmp_path}/none.db)" in done.stderr
        assert not (tmp_path / "none.db").exists()

    def test_nothing_to_read_is_wrong_usage(self):
        """
        Without any DSN or URL there is nothing to ask.
        """
        done = run("tail")

        assert 2 == done.exit_code
        assert "FASTEN_AUDIT_DSN is not set" in done.stderr

    def test_a_bad_setting_is_wrong_usage(self):
        """
        A DSN that is none is told as `init` would.
        """
        done = run("tail", FASTEN_AUDIT_DSN="mysql://u:hunter2@h/db")

        assert 2 == done.exit_code
        assert "FASTEN_AUDIT_DSN" in done.stderr
        assert "hunter2" not in done.stderr

    def test_a_refusing_server_cannot_say(self):
        """
        A Postgres that is not there is exit 3, without the password.
        """
        done = run("tail", FASTEN_AUDIT_DSN="postgres://u:hunter2@127.0.0.1:1/db")

        assert 3 == done.exit_code
        assert "not reachable" in done.stderr
        assert "hunter2" not in done.stderr

    def test_a_closed_pipe_is_no_traceback(self, sqlite_dsn):
        """
        `fasten tail | head` ends quietly.
        """
        with fasten_on(sqlite_dsn):
            for number in range(2_000):
                fasten.emit("JOB_COMPLETED", f"job-{number}")
        process = subprocess.Popen(
            program("tail", "-n", "all", "--dsn", sqlite_dsn),
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        process.stdout.readline()
        process.stdout.close()
        with process.stderr:
            said = process.stderr.read()
        process.wait(30)

        assert b"" == said

    def test_messages_are_safe_for_a_terminal(self):
        """
        What is quoted in an error cannot move the cursor.
        """
        done = run("tail", "--since", "\x1b[2Jnow")

        assert 2 == done.exit_code
        assert "\x1b" not in done.stderr
