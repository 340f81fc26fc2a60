# SPDX-License-Identifier: Apache-2.0
"""
`tests/typing/api.py` uses every public name, and type checkers find nothing in it.
"""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import fasten
from tests.outside import ROOT

API = ROOT / "tests" / "typing" / "api.py"


def test_every_public_name_is_used():
    """
    A new public name is put to use there, so that its types are looked at.
    """
    tree = ast.parse(API.read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "fasten"
    }
    used |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "fasten"
        for alias in node.names
    }

    assert set() == set(fasten.__all__) - used


@pytest.mark.slow
@pytest.mark.parametrize(
    "checker", [["mypy", "tests/typing"], ["pyright"]], ids=["mypy", "pyright"]
)
def test_type_checkers_find_nothing(checker):
    """
    Mypy and pyright, both strict, agree with the way the page writes it.
    """
    pytest.importorskip(checker[0])
    done = subprocess.run(
        [sys.executable, "-m", *checker],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )

    assert 0 == done.returncode, done.stdout + done.stderr
