# SPDX-License-Identifier: Apache-2.0
"""
Short forms of the experiments in `forks`, `crew`, `times`, `back` and `soak`.
"""

from __future__ import annotations

import os

import pytest

from tests.faults import back, crew, forks, soak, times
from tests.faults.grounds import STORES, Grounds


def test_forks(grounds: Grounds) -> None:
    """
    Children forked while threads emit store their own rows, and none hangs.
    """
    outcome = forks.fork(grounds, store="postgres", trials=2)

    assert outcome.holds, outcome.line()


@pytest.mark.slow
def test_workers(grounds: Grounds) -> None:
    """
    Workers share nothing and keep little: a connection each while busy, none idle.
    """
    outcome = crew.workers(grounds, trials=100, crew=8, idle_s=0.5)

    assert outcome.holds, outcome.line()


def test_wrong_clocks(grounds: Grounds) -> None:
    """
    Whatever a clock does, rows are in order and numbered without a gap.
    """
    outcome = times.wrong_clocks(
        grounds, store="sqlite", trials=1, names=("back", "jumpy")
    )

    assert outcome.holds, outcome.line()


def test_many_ids(grounds: Grounds) -> None:
    """
    Ids of many threads and forks never meet.
    """
    outcome = times.many_ids(grounds, trials=51_200)

    assert outcome.holds, outcome.line()


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_restored_under_load(store: str, grounds: Grounds) -> None:
    """
    A backup that is restored under a running service costs no row.
    """
    outcome = back.restored(grounds, store=store, trials=2)

    assert outcome.holds, outcome.line()


@pytest.mark.slow
def test_restored_while_down(grounds: Grounds) -> None:
    """
    A service that starts over a restored backup fills it from its journals.
    """
    outcome = back.restored_while_down(grounds, store="sqlite", trials=2)

    assert outcome.holds, outcome.line()


@pytest.mark.slow
def test_restored_by_pg_restore(grounds: Grounds) -> None:
    """
    What `pg_restore` puts back under a running service costs no row.
    """
    outcome = back.dumped(grounds, trials=1)

    assert outcome.holds, outcome.line()


@pytest.mark.slow
def test_a_promoted_standby(grounds: Grounds) -> None:
    """
    Commits that an asynchronous standby had not seen are stored again, on record.
    """
    outcome = back.promoted(grounds, trials=1)

    assert outcome.holds, outcome.line()


@pytest.mark.slow
def test_soak(grounds: Grounds) -> None:
    """
    Services live through a random fault every few seconds; SOAK_S says how long.
    """
    seconds = float(os.environ.get("SOAK_S", "25"))
    outcome = soak.soak(grounds, seconds=seconds, rest_s=(0.5, 4.0))

    assert outcome.holds, outcome.line()
