# SPDX-License-Identifier: Apache-2.0
"""
`make faults`: the long forms of the experiments, or of those that are named.

    make faults ARGS="kill soak"          # all whose names begin so
    make faults ARGS="kill --trials 50"   # shorter, or longer
    make faults ARGS="--list"

Each prints one JSON line; a table follows. Exits with 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import psycopg

from tests import postgres
from tests.faults.grounds import Experiment, Grounds, experiments
from tests.faults.oracle import Outcome

__all__ = ["main", "table"]

_COLUMNS: Final = (
    *("name", "trials", "emitted", "acked", "stored", "lost", "dup", "invented"),
    *("hangs", "p99_us", "max_us", "verify", "seconds", "holds"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run what was asked for; return the exit code.
    """
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("names", nargs="*", help="what their names begin with")
    parser.add_argument("--trials", type=int, help="how many, of each")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--list", action="store_true", help="name them only")
    asked = parser.parse_args(arguments)
    known = experiments()
    chosen = {name: run for name, run in known.items() if _is_asked(name, asked.names)}
    if asked.list or not chosen:
        print("\n".join(sorted(chosen or known)))
        return 0 if chosen else 2
    for name in [name for name in os.environ if name.startswith("FASTEN_")]:
        del os.environ[name]
    print(f"seed {asked.seed}", file=sys.stderr)
    outcomes = list(_run(chosen, asked.trials, asked.seed))
    print(table(outcomes))
    return 0 if all(outcome.holds for outcome in outcomes) else 1


def _is_asked(name: str, asked: Sequence[str]) -> bool:
    return not asked or any(name.startswith(start) for start in asked)


def _run(
    chosen: dict[str, Experiment], trials: int | None, seed: int
) -> Iterator[Outcome]:
    given = {} if trials is None else {"trials": trials}
    with _shared() as new_database:
        for experiment in chosen.values():
            with _grounds(new_database, seed) as grounds:
                start = time.monotonic()
                outcome = experiment(grounds, **given)
            if outcome.seconds is None:
                outcome = outcome.lasting(time.monotonic() - start)
            print(outcome.line(), flush=True)
            yield outcome


@contextmanager
def _grounds(new_database: Callable[[], str], seed: int) -> Iterator[Grounds]:
    folder = Path(tempfile.mkdtemp(prefix="fasten-faults-"))
    try:
        with ExitStack() as stack:
            yield Grounds(
                folder=folder,
                new_database=new_database,
                new_server=lambda: stack.enter_context(postgres.private_server()),
                seed=seed,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _shared() -> Iterator[Callable[[], str]]:
    """
    Yield what makes an empty database; the server is started with the first.
    """
    with ExitStack() as stack:
        numbers, servers = count(1), list[postgres.PostgresServer]()

        def new_database() -> str:
            if not servers:
                servers.append(stack.enter_context(postgres.private_server()))
            name = f"faults_{next(numbers)}"
            with psycopg.connect(servers[0].dsn(), autocommit=True) as admin:
                admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
            return urlsplit(servers[0].dsn())._replace(path=f"/{name}").geturl()

        yield new_database


def table(outcomes: Sequence[Outcome]) -> str:
    """
    Return the outcomes as a table in Markdown.
    """
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for outcome in outcomes:
        values = (_spelled(getattr(outcome, name)) for name in _COLUMNS)
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def _spelled(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
