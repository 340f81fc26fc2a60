# SPDX-License-Identifier: Apache-2.0
"""
Files of variables read as a shell reads them, proven against a shell.
"""

from __future__ import annotations

import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasten.cli.envfile import EnvFileError, parse_env

FILES = [
    "A=1\n",
    "export A=1\nB=2",
    "# comment\n\n  \nA=1   # comment\n",
    "A='x $HOME \\ \"y\"'\n",
    'A="x \\"y\\" \\$z \\\\ \\n"\n',
    "A=one\nB=${A}two\nC=$A-$B\n",
    'A=1\nB="<$A>"\n',
    "A=a\\ b\\#c\n",
    "A=x#y\n",
    "A=\nB=''\n",
    "A='two\nlines'\nB=2\n",
    'A="joined \\\nline"\n',
    "A=half'quoted $x'\"and $A_IS_NOT\"\n",
    "A=$\nB=x$\n",
    "A=postgres://u:p@db:5432/app?table=audit_log\n",
]


def by_shell(text: str, path) -> dict[str, str]:
    """
    Return what `set -a; . FILE; set +a` leaves in the environment.
    """
    path.write_text(text, encoding="utf-8", newline="")
    script = f"set -a; . {shlex.quote(str(path))}; set +a; env -0"
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": "/usr/bin:/bin", "HOME": "/home/me", "A_IS_NOT": "an a"},
        capture_output=True,
        check=True,
    )
    pairs = done.stdout.decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if pair[:2] in ("A=", "B=", "C="))


@pytest.mark.parametrize("text", FILES)
def test_as_a_shell_reads_it(text, tmp_path):
    """
    --env-file gives what `set -a; . ./.env; set +a` gives.
    """
    known = {"HOME": "/home/me", "A_IS_NOT": "an a"}

    assert by_shell(text, tmp_path / "env") == parse_env(text, known)


def test_windows_line_ends():
    """
    A file from another system's editor is the same file.
    """

    assert {"A": "1", "B": "x"} == parse_env("A=1\r\nB='x'\r\n", {})


@given(st.dictionaries(st.from_regex(r"\A[A-Z_][A-Z0-9_]{0,8}\Z"), st.text()))
def test_whatever_is_quoted_is_kept(values):
    """
    A value in single quotes arrives as it is.
    """
    kept = {name: value.replace("'", "") for name, value in values.items()}
    text = "".join(f"{name}='{value}'\n" for name, value in kept.items())

    assert kept == parse_env(text, {})


@given(st.text())
def test_any_text_is_read_or_refused(text):
    """
    No text hangs the parser or raises something else.
    """
    try:
        parse_env(text, {})
    except EnvFileError as error:
        said = str(error)
    else:
        said = "line "

    assert said.startswith("line ")
