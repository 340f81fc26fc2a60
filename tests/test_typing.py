# SPDX-License-Identifier: Apache-2.0
"""
`tests/typing/api.py` uses every public name, and type checkers find nothing in it.
"""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest

import fasten
from tests.outside import ROOT

API = ROOT / "tests" / "typing" / "api.py"


def used():
    """
    Return the dotted names of what is imported or looked up there.
    """
    tree = ast.parse(API.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    found = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    found |= {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    return found


def test_every_public_name_is_used():
    """
    A new public name is put to use there, so that its types are looked at.
    """
    wanted = {f"fasten.{name}" for name in fasten.__all__}

    assert set() == wanted - used()


def test_every_public_name_of_the_shims_is_used():
    """
    So is each name of each shim.
    """
    # `from fasten import shim`, `from fasten.shim.django import orm`
    given = {name.replace("fasten.shim.django.orm", "orm") for name in used()}
    given |= {f"fasten.{name}" for name in given if name.startswith("shim.")}
    given |= {f"fasten.shim.django.{name}" for name in given if name.startswith("orm.")}
    names = [
        found.name
        for found in pkgutil.walk_packages(fasten.shim.__path__, "fasten.shim.")
    ]
    wanted = {f"{name}.{each}" for name in names for each in public_names_of(name)}

    assert set() == wanted - given


def public_names_of(shim):
    """
    Return the public names of a shim, by how users spell it.
    """
    return import_module(shim.replace("fasten.shim", "fasten_shims")).__all__


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
