# SPDX-License-Identifier: Apache-2.0
"""
The ledger of erasures: who is to be forgotten, told by digests only.

It is read with the heads in every append, so that rows which were on their way when
somebody was erased are stored already erased.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, Final

import attrs

from fasten.chain import COMMITTED_FIELDS
from fasten.rows import AUDIT_COLUMNS, Pending, parse_timestamp

__all__ = ["SUBJECTS", "Erasure", "Erasures", "digest_of"]

SUBJECTS: Final = ("actor", "target", "id")
"""What an erasure can be about."""


def digest_of(salt: str, value: str) -> str:
    """
    Return what stands in the ledger for *value*.
    """
    return sha256(f"{salt}{value}".encode()).hexdigest()


@attrs.frozen(kw_only=True)
class Erasure:
    """
    One entry: *fields* of rows born before *at_us* whose *field* has this digest.
    """

    field: str
    salt: str
    digest: str
    at_us: int
    fields: tuple[str, ...]
    reason: str

    @classmethod
    def read(cls, row: Sequence[Any], at_us: int) -> Erasure:
        """
        Read the columns field, salt, digest, fields and reason.
        """
        field, salt, digest, fields, reason = row
        return cls(
            field=field,
            salt=salt,
            digest=digest,
            at_us=at_us,
            fields=_fields(fields, field),
            reason=reason or "",
        )

    def to_dict(self) -> dict[str, Any]:
        """
        Return the entry as a ledger file keeps it.
        """
        return {**attrs.asdict(self), "fields": list(self.fields)}

    @classmethod
    def from_dict(cls, said: Any) -> Erasure:
        """
        Read what `to_dict` made.

        Raises:
            ValueError: it is something else.
        """
        try:
            entry = cls(**{**said, "fields": tuple(said["fields"])})
            texts = (entry.salt, entry.digest, entry.reason, *entry.fields)
            if (
                entry.field in SUBJECTS
                and type(entry.at_us) is int
                and all(type(text) is str for text in texts)
                and set(entry.fields) <= set(COMMITTED_FIELDS)
            ):
                return entry
        except (TypeError, KeyError):
            pass
        raise ValueError("no entry of a ledger of erasures")


def _fields(text: str | None, field: str) -> tuple[str, ...]:
    """
    Read the fields; what was edited there is taken as everything.
    """
    try:
        found = tuple(json.loads(text)) if text else (field, "detail")
    except (ValueError, TypeError):
        return COMMITTED_FIELDS
    known = set(COMMITTED_FIELDS)
    return found if found and set(found) <= known else COMMITTED_FIELDS


class Erasures:
    """
    The entries of a ledger, and which rows they are about.
    """

    def __init__(self, entries: Iterable[Erasure] = ()) -> None:
        self.entries = tuple(entries)
        self.newest_us = max((entry.at_us for entry in self.entries), default=0)
        self._keys = sorted({(entry.field, entry.salt) for entry in self.entries})
        self._known: dict[tuple[str, str, str], list[Erasure]] = {}
        for entry in self.entries:
            name = (entry.field, entry.salt, entry.digest)
            self._known.setdefault(name, []).append(entry)

    def __bool__(self) -> bool:
        return bool(self.entries)

    def about(self, values: Mapping[str, Any], at_us: int) -> list[Erasure]:
        """
        Return the entries about a row born at *at_us*.
        """
        if at_us >= self.newest_us:
            return []
        found: list[Erasure] = []
        for field, salt in self._keys:
            value = values[field]
            if value is not None:
                digest = digest_of(salt, value)
                found += self._known.get((field, salt, digest), ())
        return [entry for entry in found if at_us < entry.at_us]

    def among(self, rows: Sequence[Sequence[Any]]) -> dict[str, list[Erasure]]:
        """
        Return the entries about rows in `Pending` order, by their ids.
        """
        if not self.entries:
            return {}
        found = {}
        for row in rows:
            if row[_TIME] < self.newest_us:
                values = dict(zip(Pending._fields, row, strict=True))
                entries = self.about(values, row[_TIME])
                if entries:
                    found[row[0]] = entries
        return found

    def mentions(self, row: Mapping[str, Any]) -> bool:
        """
        Tell whether any text in a row of any shape is somebody who is to be forgotten.
        """
        known = {(salt, digest) for _, salt, digest in self._known}
        salts = {salt for salt, _ in known}
        return any(
            (salt, digest_of(salt, text)) in known
            for text in _texts(row)
            for salt in salts
        )

    def about_stored(self, row: Sequence[Any]) -> list[Erasure]:
        """
        Return the entries about a stored row, in the order of AUDIT_COLUMNS.
        """
        values = dict(zip(AUDIT_COLUMNS, row, strict=True))
        try:
            at_us = parse_timestamp(str(values["timestamp"]))
        except ValueError:
            return []
        return self.about(values, at_us)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


_TIME: Final = Pending._fields.index("timestamp_us")
