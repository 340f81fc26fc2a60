# SPDX-License-Identifier: Apache-2.0
"""
What the adapters of ORMs share: how the changes of one model become audit rows.

How an ORM tells of its changes lives in `sqlalchemy` and `django.orm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import attrs

import fasten

__all__ = ["Change", "Kind", "Record", "found_for", "rows_of"]

Kind = Literal["created", "updated", "deleted"]
"""What happened to an object."""

_DEFAULT: Final = "..."


class Change(NamedTuple):
    """
    One object: its name as a target, and its columns before and after.
    """

    target: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None


def _as_names(given: Iterable[str]) -> tuple[str, ...]:
    return tuple(given)  # `tuple` itself is one of anything, to a type checker


@attrs.frozen
class Record:
    """
    How changes of one model are recorded.

    *prefix* `"USER"` stands for the codes USER_CREATED, USER_UPDATED and USER_DELETED;
    *created*, *updated* and *deleted* name others, and None leaves a kind out.
    *fields* are the columns that are looked at, all but those of *exclude* if it is
    None. *target* makes the row's target of a mapping of columns; by default it is the
    primary key. A statement that changes up to *each* objects gives each a row of its
    own; of more it gives one row with their number and a *sample*. Without
    *is_transactional*, rows are emitted once the transaction has committed: for
    databases that have no outbox.
    """

    prefix: str
    created: str | None = attrs.field(default=_DEFAULT, kw_only=True)
    updated: str | None = attrs.field(default=_DEFAULT, kw_only=True)
    deleted: str | None = attrs.field(default=_DEFAULT, kw_only=True)
    fields: tuple[str, ...] | None = attrs.field(
        default=None, kw_only=True, converter=attrs.converters.optional(_as_names)
    )
    exclude: tuple[str, ...] = attrs.field(
        default=(), kw_only=True, converter=_as_names
    )
    target: Callable[[Mapping[str, Any]], object] | None = attrs.field(
        default=None, kw_only=True
    )
    each: int = attrs.field(
        default=1000, kw_only=True, validator=attrs.validators.ge(0)
    )
    sample: int = attrs.field(
        default=20, kw_only=True, validator=attrs.validators.ge(0)
    )
    is_transactional: bool = attrs.field(default=True, kw_only=True)

    def code(self, kind: Kind) -> str | None:
        """
        Return the code of a kind of change, None where it is not recorded.
        """
        given: str | None = getattr(self, kind)
        return f"{self.prefix}_{kind.upper()}" if given == _DEFAULT else given

    def check(self) -> None:
        """
        See that the codes are there: inside a flush it would be too late.

        Raises:
            UnknownCode: one is not registered.
        """
        for kind in _KINDS:
            if (code := self.code(kind)) is not None:
                fasten.codes.meta(code)

    def name(self, columns: Mapping[str, Any], key: Sequence[Any]) -> str:
        """
        Return what an object with *columns* and the primary *key* is called.
        """
        if self.target is not None:
            return str(self.target(columns))
        return ",".join("?" if part is None else str(part) for part in key)

    def is_chosen(self, column: str) -> bool:
        """
        Tell whether a column is looked at.
        """
        if column in self.exclude:
            return False
        return self.fields is None or column in self.fields


_KINDS: Final[tuple[Kind, ...]] = ("created", "updated", "deleted")


def found_for(models: Mapping[type, Record], cls: type) -> Record | None:
    """
    Return how *cls* is recorded, or the nearest class that it comes from.
    """
    return next((models[base] for base in cls.__mro__ if base in models), None)


def rows_of(
    record: Record, kind: Kind, made: Sequence[Change], count: int | None, model: str
) -> list[dict[str, Any]]:
    """
    Return the arguments of `emit` for what one flush or statement did.

    *count* is how many objects there were, *made* may be only some of them.
    """
    code = record.code(kind)
    if code is None or count == 0:
        return []
    if count is None or count > max(record.each, 1) or not made:
        sample = [
            {"target": change.target, **_detail(record, change)}
            for change in made[: record.sample]
        ]
        detail = {"count": count, "sample": sample}
        return [{"code": code, "target": model, "detail": detail}]
    told = [(change, _detail(record, change)) for change in made]
    return [
        {"code": code, "target": change.target, "detail": detail}
        for change, detail in told
        # An update that left all chosen columns as they were is none.
        if kind != "updated" or detail["changes"]
    ]


def _detail(record: Record, change: Change) -> dict[str, Any]:
    chosen = record.fields
    return fasten.changes(
        change.before, change.after, fields=chosen, exclude=record.exclude
    )
