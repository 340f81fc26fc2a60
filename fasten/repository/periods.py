# SPDX-License-Identifier: Apache-2.0
"""
From when a store's periods hold, and what time it is, as far as that can be trusted.

Both are kept in `<table>_meta`, by service. What periods are is told by
`fasten.retention`; what is deleted for it, by `pruning`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fasten.repository.audit import AuditRepository
from fasten.repository.database import SchemaProblem
from fasten.repository.meta import clock
from fasten.repository.reading import microseconds
from fasten.retention import RetentionPolicy
from fasten.rows import format_timestamp

__all__ = ["Periods"]

Record = tuple[str, str, Mapping[str, Any]]
"""A row of fasten's own: its code, target and detail."""

_SECOND: Final = 1_000_000
STEP_US: Final = 3600 * _SECOND
"""A clock that went back further than this was set."""


class Periods:
    """
    How long the rows of *service* stay; all in its caller's transaction.
    """

    def __init__(self, repository: AuditRepository, service: str) -> None:
        self._repository = repository
        self._service = service

    def settle(
        self,
        connection: Connection,
        wanted: RetentionPolicy,
        now_us: int,
        *,
        is_forced: bool = False,
    ) -> tuple[RetentionPolicy, list[Record]]:
        """
        Return what holds now, and what has to be recorded of it.

        The first start writes what it wants; a longer period holds at once, a shorter
        one after the grace, or at once if *is_forced*.

        Raises:
            SchemaProblem: what the store says of periods makes no sense.
        """
        meta, key = self._repository.meta, f"retention:{self._service}"
        said = meta.get(connection, key, is_locked=True)
        if said is None:
            meta.put(connection, key, wanted.to_dict())
            return wanted, []
        stored = self._read(said, wanted)
        records, since_us = self._announce(
            connection, wanted, stored, now_us, is_forced=is_forced
        )
        holds = wanted.effective(
            stored, now_us=now_us, since_us=since_us, is_forced=is_forced
        )
        if holds.to_dict() != stored:
            meta.put(connection, key, holds.to_dict())
        return holds, records

    def peek(
        self,
        connection: Connection,
        wanted: RetentionPolicy,
        now_us: int,
        *,
        is_forced: bool = False,
    ) -> RetentionPolicy:
        """
        Return what `settle` would, and change nothing.

        Raises:
            SchemaProblem: what the store says of periods makes no sense.
        """
        meta = self._repository.meta
        said = meta.get(connection, f"retention:{self._service}")
        stored = wanted.to_dict() if said is None else self._read(said, wanted)
        known = meta.get(connection, f"retention_wanted:{self._service}")
        return wanted.effective(
            stored,
            now_us=now_us,
            since_us=_since(known, wanted),
            is_forced=is_forced,
        )

    @staticmethod
    def _read(said: Any, wanted: RetentionPolicy) -> dict[str, int]:
        try:
            return RetentionPolicy.from_dict(said, wanted.grace_s).to_dict()
        except (ValueError, AttributeError) as error:
            raise SchemaProblem(str(error)) from None

    def _announce(
        self,
        connection: Connection,
        wanted: RetentionPolicy,
        stored: dict[str, int],
        now_us: int,
        *,
        is_forced: bool,
    ) -> tuple[list[Record], int | None]:
        """
        Put shorter periods on record; return since when they have been there.
        """
        meta, key = self._repository.meta, f"retention_wanted:{self._service}"
        known = meta.get(connection, key)
        if not wanted.shorter_than(stored):
            if known is not None:
                meta.put(connection, key, None)  # taken back: the grace begins anew
            return [], None
        periods = wanted.to_dict()
        since_us = _since(known, wanted)
        if since_us is not None:
            return [], since_us
        meta.put(connection, key, {"periods": periods, "since_us": now_us})
        wait_us = 0 if is_forced else round(wanted.grace_s * _SECOND)
        detail = {
            "from": stored,
            "to": periods,
            "effective_at": format_timestamp(now_us + wait_us),
        }
        return [("RETENTION_POLICY_CHANGED", self._service, detail)], now_us

    # -- time --

    def store_us(self, connection: Connection) -> int:
        """
        Return the store's own time.
        """
        now = clock(connection.dialect.name)
        return microseconds(connection.execute(sa.select(now)).scalar_one())

    def trusted_us(
        self, connection: Connection, now_us: int, *, grace_s: float, gap_s: float
    ) -> int:
        """
        Note that *now_us* was seen; return the time that may be gone by.

        It is the earlier one of this clock and the store's. Where it is more than
        *gap_s* after it was last seen, a clock may have jumped: until it has stood
        there for the grace, what it was before is gone by.
        """
        now_us = min(now_us, self.store_us(connection))
        meta, key = self._repository.meta, f"clock:{self._service}"
        said = _Seen.read(meta.get(connection, key, is_locked=True))
        if said is None:
            said = self._first(connection, now_us)
        told = said.at(now_us, round(grace_s * _SECOND), round(gap_s * _SECOND))
        meta.put(connection, key, told.to_dict())
        return told.trusted_us

    def _first(self, connection: Connection, now_us: int) -> _Seen:
        """
        Judge by the newest row of a store that was never swept.
        """
        node = self._repository.tables.node.c
        newest: Any = connection.execute(sa.select(sa.func.max(node.updated_at)))
        at = newest.scalar()
        at_us = now_us if at is None else min(now_us, microseconds(at))
        return _Seen(at_us, 0, at_us)


def _since(known: Any, wanted: RetentionPolicy) -> int | None:
    """
    Return since when exactly these shorter periods have been on record.
    """
    if isinstance(known, dict) and known.get("periods") == wanted.to_dict():
        since_us = known.get("since_us")
        return since_us if type(since_us) is int else None
    return None


class _Seen:
    """
    When a clock was seen last, since when it did not jump, and what is trusted of it.
    """

    def __init__(self, seen_us: int, since_us: int, trusted_us: int) -> None:
        self.seen_us, self.since_us = seen_us, since_us
        self.trusted_us = trusted_us

    @classmethod
    def read(cls, said: Any) -> _Seen | None:
        """
        Read what `to_dict` made; None if it is something else.
        """
        if not isinstance(said, dict):
            return None
        numbers = [said.get(name) for name in ("seen_us", "since_us", "trusted_us")]
        if not all(type(number) is int for number in numbers):
            return None
        return cls(*numbers)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, int]:
        """
        Return it as the store keeps it.
        """
        return vars(self)

    def at(self, now_us: int, grace_us: int, gap_us: int) -> _Seen:
        """
        Return what is known once the clock says *now_us*.
        """
        is_settled = now_us - self.since_us >= grace_us
        if now_us < self.seen_us - STEP_US:
            return _Seen(now_us, now_us, min(self.trusted_us, now_us))
        if now_us - self.seen_us > gap_us:
            known_us = self.seen_us if is_settled else self.trusted_us
            return _Seen(now_us, now_us, known_us)
        return _Seen(now_us, self.since_us, now_us if is_settled else self.trusted_us)
