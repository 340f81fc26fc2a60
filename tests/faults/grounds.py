# SPDX-License-Identifier: Apache-2.0
"""
Where an experiment takes place: a folder, and stores of its own; and what there is.

A module of this package takes part by a dict EXPERIMENTS: names, and functions that
take the grounds and the number of trials, and return an Outcome. *trials* has the
default of the long form; the tests ask for fewer.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Final, Protocol

import attrs

import tests.faults
from tests.faults.oracle import Outcome
from tests.postgres import PostgresServer

__all__ = ["STORES", "Experiment", "Grounds", "both", "experiments"]

STORES: Final = ("sqlite", "postgres")
"""The stores that there are."""


@attrs.frozen(kw_only=True)
class Grounds:
    """
    One experiment's place: *folder* is empty, *seed* decides what is left to chance.

    *new_database* returns the DSN of an empty Postgres database, *new_server* starts a
    Postgres that the experiment may stop and kill.
    """

    folder: Path
    new_database: Callable[[], str]
    new_server: Callable[[], PostgresServer]
    seed: int = 0

    def dsn(self, store: str) -> str:
        """
        Return the DSN of an empty store.
        """
        if store == "postgres":
            return self.new_database()
        return f"sqlite:///{self.folder / 'audit.db'}"

    @property
    def spool(self) -> Path:
        """
        Return where the journals of the experiment's service are.
        """
        return self.folder / "spool"


class Experiment(Protocol):
    """
    One way to break a promise.
    """

    def __call__(self, grounds: Grounds, *, trials: int = ...) -> Outcome:
        """
        Try *trials* times.
        """


def both(name: str, experiment: Callable[..., Outcome]) -> dict[str, Experiment]:
    """
    Return an experiment that takes *store*, over each store, by its names.
    """
    return {f"{name}-{store}": partial(experiment, store=store) for store in STORES}


def experiments() -> Mapping[str, Experiment]:
    """
    Return every experiment that the modules of this package have.
    """
    found: dict[str, Experiment] = {}
    for module in pkgutil.iter_modules(tests.faults.__path__):
        if not module.name.startswith(("test_", "__", "conftest")):
            known = import_module(f"tests.faults.{module.name}")
            found |= getattr(known, "EXPERIMENTS", {})
    return found
