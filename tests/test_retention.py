# SPDX-License-Identifier: Apache-2.0
"""
Retention: periods by class, cutoffs, and from when a change of them holds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasten.codes import Meta, entry_for
from fasten.retention import CLASSES, RetentionPolicy
from fasten.settings import Settings

DAY_S = 86_400
HOUR_US = 3_600 * 1_000_000
PERIODS = st.integers(1, 4_000 * DAY_S)
POLICIES = st.builds(RetentionPolicy, short=PERIODS, medium=PERIODS, long=PERIODS)


def policy(short=30, medium=180, long=1095, grace_s=86_400.0):
    return RetentionPolicy(
        short=short * DAY_S, medium=medium * DAY_S, long=long * DAY_S, grace_s=grace_s
    )


def from_environment(**environ):
    settings = Settings.from_env(
        {"FASTEN_SERVICE_ID": "s", **environ}, hostname="h", cwd=Path("/")
    )
    return RetentionPolicy.from_settings(settings)


class TestPeriods:
    def test_defaults(self):
        """The defaults are 30 days, 180 days and three years."""
        assert policy() == from_environment()

    def test_override_wins(self):
        """The page's two lines: the override wins over a class's own variable."""
        made = from_environment(
            FASTEN_AUDIT_RETENTION_CLASS_LONG="2555",
            FASTEN_AUDIT_RETENTION_CLASS_SHORT="7",
            FASTEN_AUDIT_RETENTION_OVERRIDE="long=7y,medium=1y",
        )

        assert policy(short=7, medium=365, long=7 * 365) == made

    def test_grace_comes_along(self):
        """The grace is the settings' grace."""
        made = from_environment(FASTEN_RETENTION_GRACE="1h")

        assert 3_600 == made.grace_s

    def test_unknown_class(self):
        """There is no period for a class that does not exist."""
        with pytest.raises(ValueError, match="eternal"):
            policy().period("eternal")

    @given(POLICIES)
    def test_round_trip(self, made):
        """What goes into the store's meta table comes back."""
        assert made == RetentionPolicy.from_dict(made.to_dict())

    @pytest.mark.parametrize(
        "stored",
        [
            {},
            {"short": 1, "medium": 2},
            {"short": 0, "medium": 2, "long": 3},
            {"short": "1", "medium": 2, "long": 3},
            {"short": True, "medium": 2, "long": 3},
        ],
    )
    def test_broken_record(self, stored):
        """A broken record in the store is refused with a cure, not guessed at."""
        with pytest.raises(ValueError, match="remove it"):
            RetentionPolicy.from_dict(stored)


class TestClassFor:
    def test_as_declared(self):
        """A code's rows have the class it declares."""
        assert "long" == policy().class_for(Meta(retention_class="long"))

    def test_pii_is_short(self):
        """PII in detail means short, whatever else is declared."""
        meta = Meta(retention_class="long", pii_in_detail=True)

        assert "short" == policy().class_for(meta)

    def test_takes_entries(self):
        """It also takes what the hot path has, and answers with a plain string."""
        found = policy().class_for(entry_for("X"))

        assert ("medium", str) == (found, type(found))


class TestCutoffs:
    def test_by_class(self):
        """Rows born before now minus the period have expired."""
        now_us = 2_000 * DAY_S * 1_000_000
        expected = {
            "short": 1_970 * DAY_S * 1_000_000,
            "medium": 1_820 * DAY_S * 1_000_000,
            "long": 905 * DAY_S * 1_000_000,
        }

        assert expected == policy().cutoffs(now_us)


class TestChanges:
    def test_names_what_changed(self):
        """Longer and shorter classes are told apart; equal ones are neither."""
        made = policy(short=60, medium=90)
        stored = policy().to_dict()

        assert ("short",) == made.longer_than(stored)
        assert ("medium",) == made.shorter_than(stored)

    def test_first_start(self):
        """Against an empty store nothing is longer or shorter."""
        assert ((), ()) == (policy().longer_than({}), policy().shorter_than({}))

    def test_longer_holds_at_once(self):
        """Rows are never deleted by a period that has just been lengthened."""
        made = policy(long=2_555)
        found = made.effective(policy().to_dict(), now_us=0, since_us=None)

        assert made == found

    @pytest.mark.parametrize(
        ("since_us", "expected"),
        [
            (None, 180),
            (24 * HOUR_US, 180),
            (1 * HOUR_US + 1, 180),
            (1 * HOUR_US, 90),
            (26 * HOUR_US, 180),
        ],
    )
    def test_shorter_waits(self, since_us, expected):
        """A shorter period holds after a full grace on record, and not before it."""
        found = policy(medium=90).effective(
            policy().to_dict(), now_us=25 * HOUR_US, since_us=since_us
        )

        assert expected * DAY_S == found.medium

    def test_force(self):
        """`fasten sweep --now` does not wait."""
        made = policy(medium=90)
        found = made.effective(
            policy().to_dict(), now_us=0, since_us=None, is_forced=True
        )

        assert made == found

    @given(POLICIES, POLICIES, st.none() | st.integers(0, 2**50), st.integers(0, 2**50))
    def test_never_shorter_than_both(self, made, stored, since_us, now_us):
        """Whatever the clock says: the longer of the two before the grace is over."""
        found = made.effective(stored.to_dict(), now_us=now_us, since_us=since_us)
        is_early = since_us is None or now_us - since_us < 24 * HOUR_US
        expected = {
            name: max(made.period(name), stored.period(name))
            if is_early
            else made.period(name)
            for name in CLASSES
        }

        assert expected == found.to_dict()
