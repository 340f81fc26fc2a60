# SPDX-License-Identifier: Apache-2.0
"""
The examples in the commands' help, typed as they are printed, on each store.

A reader answers where it could stand in for the store. What each command does is
told by its own tests.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import Result

import fasten
from fasten.reader import router
from tests.cli_runs import emit_sample, fasten_on, mounted, run, served, write
from tests.test_cli import commands

TOKEN = "s3cret-token"
SHOP = """
import fasten
from starlette.applications import Starlette
from fasten.shim.http import APILogger, RequestIDMiddleware

fasten.init(service_id="api-server", stdout="")
app = Starlette()
app.add_middleware(RequestIDMiddleware)
app.add_middleware(APILogger)
"""
CODES = "domain: fleet\ncodes: {TRUCK_LOADED: {}}\n"
EXAMPLES = {
    words: command.epilog.partition("Example: ")[2]
    for words, command in commands().items()
    if not isinstance(command, click.Group)
}
READERS = ("tail", "trace", "stats")
FIRST = ("keygen", "checkpoint", "hold add")
"""What others need; all else goes in the order of its name, writers last."""


def typed(example: str) -> Iterator[list[str]]:
    """
    Yield the words of each `fasten` in an example, as a shell would hand them over.
    """
    example = re.sub(r" +#.*", "", example.replace('eval "$(', "").replace(')"', ""))
    for line in re.split(r"&&|, or(?: for fish)?:", example):
        words = shlex.split(line)
        ends = [words.index(sign) for sign in ("|", ">") if sign in words]
        yield words[: min(ends, default=len(words))]


@pytest.fixture
def desk(
    store_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """
    Give an operator's directory: a service's environment, its code, and what it needs.
    """
    (tmp_path / "shop").mkdir()
    # A folder without it would stand behind any shop.py that another test has left.
    write(tmp_path / "shop" / "__init__.py", "")
    write(tmp_path / "shop" / "web.py", SHOP)
    write(tmp_path / "released.codes.yaml", CODES)
    write(tmp_path / "fleet.codes.yaml", CODES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    _forget_shop()
    monkeypatch.setenv("FASTEN_SERVICE_ID", "api-server")
    monkeypatch.setenv("FASTEN_NODE_ID", "host-01")
    monkeypatch.setenv("FASTEN_AUDIT_DSN", store_dsn)
    with fasten_on(store_dsn):
        emit_sample()
    yield tmp_path
    _forget_shop()


def _forget_shop() -> None:
    # Each directory has its own, and other tests have theirs.
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


def asked(desk: Path, words: list[str]) -> Result:
    """
    Run one command, with this directory for what the example calls /etc and /mnt.
    """
    places = ("/etc/shop/", "/mnt/worm/")
    for place in places:
        words = [word.replace(place, f"{desk}/") for word in words]
    if words[1:3] == ["hold", "remove"]:
        (held, *_) = json.loads(run("hold", "list", "-o", "json").stdout)
        words[3] = held["id"]
    done = run(*words[1:])
    if words[1] == "keygen":
        write(desk / "shop.vkey", done.stdout)
    return done


def test_each_example_runs(desk, monkeypatch):
    """
    What the help shows works as it stands there, and none ends in a traceback.
    """
    order = sorted(EXAMPLES, key=lambda words: _place(" ".join(words)))
    done = {}
    for words in order:
        if words == ("trace",):
            continue  # asks a reader: below
        for given in typed(EXAMPLES[words]):
            done[shlex.join(given)] = asked(desk, given)
        if words == ("keygen",):
            monkeypatch.setenv("FASTEN_SIGNING_KEY", str(desk / "fasten.pem"))
    codes = {given: each.exit_code for given, each in done.items()}

    assert dict.fromkeys(codes, 0) == codes, {
        given: (each.stdout, each.stderr, each.exception)
        for given, each in done.items()
        if each.exit_code
    }
    assert len(EXAMPLES) - 1 <= len(done)


def _place(name: str) -> tuple[int, str]:
    return (FIRST.index(name) if name in FIRST else len(FIRST)), name


def test_a_reader_answers_the_same(desk, store_dsn):
    """
    Where --url can stand for the store, the example's other words mean the same.
    """
    with fasten_on(store_dsn, reader_token=TOKEN):
        fasten.log.info("hello")
        with served(mounted(router().wsgi)) as address:
            for name in READERS:
                (given,) = typed(EXAMPLES[(name,)])
                if "--url" in given:
                    given = given[: given.index("--url")]
                local = run(*given[1:])
                remote = run(*given[1:], "--url", address, "--token", TOKEN)

                assert (0, 0) == (local.exit_code, remote.exit_code), remote.stderr
                assert all(line in remote.stdout for line in _audit(local.stdout))


def _audit(text: str) -> list[str]:
    """
    Return the lines that name a code: reads of the audit rows leave one more.
    """
    return [line for line in text.splitlines() if "USER_CREATED" in line]
