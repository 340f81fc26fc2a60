# SPDX-License-Identifier: Apache-2.0
"""
Retention: how long each class of audit rows stays, and from when a change holds.

Values only: what is deleted, held or recorded is the engine's and repository's part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

from fasten.codes import Entry, Meta, RetentionClass
from fasten.settings import Settings

__all__ = ["CLASSES", "RetentionPolicy"]

CLASSES: Final = tuple(member.value for member in RetentionClass)
"""The names of the classes, shortest first: `short`, `medium`, `long`."""

_MICROSECONDS: Final = 1_000_000


@attrs.frozen(kw_only=True)
class RetentionPolicy:
    """
    The period of each class, in seconds, and the grace before a shorter one holds.
    """

    short: int
    medium: int
    long: int
    grace_s: float = 86_400.0

    @classmethod
    def from_settings(cls, settings: Settings) -> RetentionPolicy:
        """
        Return what the settings ask for; the override wins over a class's variable.
        """
        periods = {
            "short": settings.audit_retention_class_short,
            "medium": settings.audit_retention_class_medium,
            "long": settings.audit_retention_class_long,
            **settings.audit_retention_override,
        }
        return cls(**periods, grace_s=settings.retention_grace)

    @classmethod
    def from_dict(
        cls, stored: Mapping[str, int], grace_s: float = 86_400.0
    ) -> RetentionPolicy:
        """
        Read what `to_dict` made.

        Raises:
            ValueError: a class is missing, or its period is not positive seconds.
        """
        periods = {name: stored.get(name) for name in CLASSES}
        for name, period in periods.items():
            if type(period) is not int or period < 1:
                raise ValueError(
                    f"the stored retention of class {name} is {period!r}, not a "
                    "positive number of seconds; remove it: the next start writes it"
                )
        return cls(**periods, grace_s=grace_s)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, int]:
        """
        Return the periods by class, as `<table>_meta` keeps them.
        """
        return {name: self.period(name) for name in CLASSES}

    def period(self, name: str) -> int:
        """
        Return the period of class *name*, in seconds.

        Raises:
            ValueError: there is no such class.
        """
        return int(getattr(self, RetentionClass(name).value))

    def class_for(self, meta: Meta | Entry) -> str:
        """
        Return the class of a code's rows: `short` for PII, whatever the code says.
        """
        return "short" if meta.pii_in_detail else str(meta.retention_class)

    def cutoffs(self, now_us: int) -> dict[str, int]:
        """
        Return, by class, the microsecond since 1970 before which rows have expired.
        """
        return {n: now_us - self.period(n) * _MICROSECONDS for n in CLASSES}

    def longer_than(self, stored: Mapping[str, int]) -> tuple[str, ...]:
        """
        Name the classes whose rows stay longer than *stored* says.
        """
        return tuple(
            n for n in CLASSES if self.period(n) > stored.get(n, self.period(n))
        )

    def shorter_than(self, stored: Mapping[str, int]) -> tuple[str, ...]:
        """
        Name the classes whose rows stay for less long than *stored* says.
        """
        return tuple(
            n for n in CLASSES if self.period(n) < stored.get(n, self.period(n))
        )

    def effective(
        self,
        stored: Mapping[str, int],
        *,
        now_us: int,
        since_us: int | None,
        is_forced: bool = False,
    ) -> RetentionPolicy:
        """
        Return what holds at *now_us* where *stored* has held so far.

        A longer period holds at once. A shorter one holds once it has been on record
        for the grace, since *since_us* (None: not on record yet), or at once if
        *is_forced*.
        """
        waited_us = -1 if since_us is None else now_us - since_us
        if is_forced or waited_us >= self.grace_s * _MICROSECONDS:
            return self
        kept = {name: stored[name] for name in self.shorter_than(stored)}
        return attrs.evolve(self, **kept)
