# SPDX-License-Identifier: Apache-2.0
"""
The three streams in time order: what was recorded under one request id, page by page.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Mapping
from heapq import merge
from itertools import islice
from typing import Any, Final

import attrs

from fasten.engine import Engine
from fasten.errors import InvalidQuery
from fasten.reader.answers import Listing
from fasten.reader.auth import STREAMS, Principal
from fasten.rows import MAX_LIMIT, Page, Query

__all__ = ["Correlation"]

_MAX_CURSOR: Final = 1024


@attrs.frozen
class _Place:
    """
    How far one stream has been read: behind *cursor*, and *skip* rows more.

    Rows do not tell their own cursor, only a page does; *skip* is below a page's size.
    Should a ring let go of rows between two pages, as many are passed over.
    """

    cursor: str | None = None
    skip: int = 0


Places = Mapping[str, _Place]
"""The streams that are not at their end, and how far each has been read."""


@attrs.frozen(kw_only=True)
class Correlation:
    """
    A question for everything under one request id, for one principal.

    A stream outside the principal's scopes is left out.
    """

    request_id: str
    principal: Principal
    limit: int
    places: Places
    within_s: float

    @classmethod
    def parse(
        cls, given: Mapping[str, str], principal: Principal, *, within_s: float
    ) -> Correlation:
        """
        Read the parameters.

        Raises:
            InvalidQuery: one is missing or unusable; it says which.
        """
        if "request_id" not in given:
            raise InvalidQuery("request_id is required", "request_id")
        asked = {
            "request_id": given["request_id"],
            "limit": given.get("limit", MAX_LIMIT),
        }
        query = Query.parse("audit", asked, now_us=0)
        places: Places = {stream: _Place() for stream in STREAMS}
        if "cursor" in given:
            places = _decode(given["cursor"])
        return cls(
            request_id=str(query.filters["request_id"]),
            principal=principal,
            limit=query.limit,
            within_s=within_s,
            places={k: v for k, v in places.items() if k in principal.scopes},
        )

    def listing(
        self, engine: Engine, source: str
    ) -> tuple[Listing, Correlation | None]:
        """
        Return a page, oldest row first, and the question for the one after it.

        Raises:
            AuditStoreError: a store cannot be read now.
            InvalidQuery: the cursor is from elsewhere.
        """
        pages = {
            stream: engine.answer(self._query(stream, place))
            for stream, place in self.places.items()
        }
        # A row that came late stands behind younger ones in its own stream: merged
        # by stream, to know how far each was read, and put in order after that.
        shown = list(islice(_merged(pages), self.limit))
        following = self._behind(pages, shown)
        shown.sort(key=lambda entry: (entry[1].timestamp, STREAMS.index(entry[0])))
        listing = Listing(
            rows=[{"shape": stream, **row.to_dict()} for stream, row in shown],
            limit=self.limit,
            next=None if following is None else _encode(following.places),
            completeness=_completeness(pages.values()),
            source=source if _has_ring(pages.values()) else None,
        )
        return listing, following

    def _query(self, stream: str, place: _Place) -> Query:
        asked = {
            "request_id": self.request_id,
            "order": "asc",
            "limit": self.limit,
            "offset": place.skip,
            "cursor": place.cursor,
        }
        query = Query.parse(stream, asked, now_us=0, scope=self.principal.tenant)
        return attrs.evolve(query, within_s=self.within_s)

    def _behind(
        self, pages: Mapping[str, Page], shown: Iterable[tuple[str, Any]]
    ) -> Correlation | None:
        taken = dict.fromkeys(pages, 0)
        for stream, _ in shown:
            taken[stream] += 1
        places = {}
        for stream, page in pages.items():
            place = self.places[stream]
            if taken[stream] < len(page.rows):
                places[stream] = _Place(place.cursor, place.skip + taken[stream])
            elif page.next is not None:
                places[stream] = _Place(page.next)
        return attrs.evolve(self, places=places) if places else None


def _merged(pages: Mapping[str, Page]) -> Iterable[tuple[str, Any]]:
    entries = [[(stream, row) for row in page.rows] for stream, page in pages.items()]
    return merge(*entries, key=lambda entry: entry[1].timestamp)


def _completeness(pages: Iterable[Page]) -> str:
    found = {page.completeness for page in pages}
    return next((c for c in ("store-degraded", "ring") if c in found), "store")


def _has_ring(pages: Iterable[Page]) -> bool:
    return any(page.completeness == "ring" for page in pages)


def _encode(places: Places) -> str:
    said = {stream: [place.cursor, place.skip] for stream, place in places.items()}
    text = json.dumps(said, separators=(",", ":"))
    return urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _decode(cursor: str) -> Places:
    try:
        raw = cursor[:_MAX_CURSOR].encode("ascii")
        said = json.loads(urlsafe_b64decode(raw + b"=" * (-len(raw) % 4)))
        places = {s: _Place(said[s][0], said[s][1]) for s in STREAMS if s in said}
        if not places or not all(map(_is_sound, places.values())):
            raise ValueError("no place")
    except (ValueError, LookupError, TypeError, RecursionError):
        raise InvalidQuery(
            f"cursor {cursor[:80]!r} is not from a page of correlate; "
            "use the `next` of the page before",
            "cursor",
        ) from None
    return places


def _is_sound(place: _Place) -> bool:
    is_number = isinstance(place.skip, int) and not isinstance(place.skip, bool)
    return (
        is_number
        and 0 <= place.skip <= MAX_LIMIT
        and (place.cursor is None or isinstance(place.cursor, str))
    )
