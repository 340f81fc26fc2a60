# SPDX-License-Identifier: Apache-2.0
"""
Short forms of the experiments in `inputs`.
"""

from __future__ import annotations

from tests.faults import inputs
from tests.faults.grounds import Grounds


def test_hostile_details(grounds: Grounds) -> None:
    """
    Whatever a detail holds, its row is stored, bounded, and without a caller's secrets.
    """
    outcome = inputs.details(grounds, store="sqlite", trials=1)

    assert outcome.holds, outcome.line()


def test_hostile_ids(grounds: Grounds) -> None:
    """
    Hostile text becomes neither an id nor a row that is lost, doubled or unsealed.
    """
    outcome = inputs.ids(grounds, store="postgres", trials=1)

    assert outcome.holds, outcome.line()


def test_hostile_codes(grounds: Grounds) -> None:
    """
    Files of codes are refused with a reason, soon, and are not run.
    """
    outcome = inputs.files(grounds)

    assert outcome.holds, outcome.line()


def test_secrets(grounds: Grounds) -> None:
    """
    No secret gets out of a service whose server refuses its password.
    """
    outcome = inputs.secrets(grounds, trials=1, names=["wrong password"])

    assert outcome.holds, outcome.line()


def test_secrets_in_mistakes(grounds: Grounds) -> None:
    """
    Settings that are wrong and hold a secret are refused without showing it.
    """
    outcome = inputs.mistakes(grounds)

    assert outcome.holds, outcome.line()
