# SPDX-License-Identifier: Apache-2.0
"""
The wheel that users install: what is in it, and what it asks for.
"""

from __future__ import annotations

import re
import subprocess
import sys
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.outside import ROOT

CARD = {"attrs", "cattrs", "click", "psycopg", "pyyaml", "sqlalchemy", "structlog"}
"""What the design card allows in the base install."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """
    Return a wheel built from this checkout.
    """
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture
def names(wheel) -> set[str]:
    """
    Return the names of the files in the wheel.
    """
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture
def metadata(wheel) -> Message:
    """
    Return the wheel's metadata.
    """
    with ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith("/METADATA"))
        return message_from_bytes(archive.read(name))


@pytest.mark.parametrize(
    "name", ["fasten/codes.yaml", "fasten/py.typed", "fasten_shims/py.typed"]
)
def test_the_wheel_holds_what_is_not_python(names, name):
    """
    The standard catalogue and the marks of typing are installed, too.
    """

    assert name in names


def test_the_wheel_holds_each_module(names):
    """
    No module of the two packages is left out.
    """
    modules = {
        str(path.relative_to(ROOT))
        for package in ("fasten", "fasten_shims")
        for path in (ROOT / package).rglob("*.py")
    }

    assert modules == {name for name in names if name.endswith(".py")}


def test_the_base_install_is_the_cards(metadata):
    """
    Whoever installs fasten gets the seven libraries of the card and no others.
    """
    required = metadata.get_all("Requires-Dist", [])
    base = {re.split(r"[\[<>=; ]", each)[0] for each in required if "extra" not in each}

    assert base == CARD


def test_each_extra_is_part_of_all(metadata):
    """
    `fasten[all]` brings what every other extra brings.
    """
    brought: dict[str, set[str]] = {}
    for each in metadata.get_all("Requires-Dist", []):
        required, _, extra = each.partition("; extra == ")
        brought.setdefault(extra.strip("'\""), set()).add(required)
    everything = brought.pop("all")
    del brought[""]

    assert everything == set().union(*brought.values())
