# SPDX-License-Identifier: Apache-2.0
"""
Legal holds: which rows nobody deletes or erases, however old they are.

They stand in `<table>_meta` under `hold:`; one that was lifted stays, as a memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs
from sqlalchemy.engine import Connection

from fasten.repository.meta import Meta

__all__ = ["HELD_FIELDS", "Hold", "Holds", "covered"]

HELD_FIELDS: Final = ("target", "actor", "code")
"""What a hold can be about."""

_PREFIX: Final = "hold:"


@attrs.frozen(kw_only=True)
class Hold:
    """
    Rows whose *field* is *value* stay, as they are, until the hold is lifted.

    *at* and *lifted_at* are wire times.
    """

    id: str
    field: str
    value: str
    reason: str
    by: str
    at: str
    lifted_at: str | None = None

    def covers(self, row: Mapping[str, Any]) -> bool:
        """
        Tell whether a row may not be touched.
        """
        return bool(row[self.field] == self.value)

    def to_dict(self) -> dict[str, Any]:
        """
        Return it as `<table>_meta` keeps it.
        """
        return attrs.asdict(self)


class Holds:
    """
    The holds of a store.
    """

    def __init__(self, meta: Meta) -> None:
        self._meta = meta

    def all(self, connection: Connection) -> list[Hold]:
        """
        Return every hold there ever was, oldest first.

        One that somebody made unreadable still holds: it covers everything.
        """
        found = self._meta.starting(connection, _PREFIX)
        holds = [_read(id_, said) for id_, said in found.items()]
        return sorted(holds, key=lambda hold: (hold.at, hold.id))

    def active(self, connection: Connection) -> list[Hold]:
        """
        Return the holds that were not lifted.
        """
        return [hold for hold in self.all(connection) if hold.lifted_at is None]

    def put(self, connection: Connection, hold: Hold) -> None:
        """
        Store *hold* under its id.
        """
        self._meta.put(connection, f"{_PREFIX}{hold.id}", hold.to_dict())


class _Everything(Hold):
    def covers(self, row: Mapping[str, Any]) -> bool:  # noqa: ARG002  (any)
        return True


def _read(id_: str, said: Any) -> Hold:
    try:
        hold = Hold(**said)
        if hold.id == id_ and hold.field in HELD_FIELDS:
            return hold
    except TypeError:
        pass
    return _Everything(
        id=id_, field="", value="", reason="it cannot be read any more", by="", at=""
    )


def covered(holds: Iterable[Hold], row: Mapping[str, Any]) -> bool:
    """
    Tell whether any of *holds* covers a row.
    """
    return any(hold.covers(row) for hold in holds)
