# SPDX-License-Identifier: Apache-2.0
"""
Reads of the audit stream, as audit rows: who asked for what, once in five minutes.
"""

from __future__ import annotations

import json
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from typing import Any, Final

from fasten import context
from fasten.engine import Engine
from fasten.reader.auth import Principal
from fasten.reader.parameters import PAGING
from fasten.rows import ALL_TENANTS

__all__ = ["ReadLog"]

logger = logging.getLogger("fasten")

WINDOW_US: Final = 300_000_000
REMEMBERED: Final = 4096


class ReadLog:
    """
    Writes an AUDIT_READ row for each read that was not written down just now.

    What it remembers is bounded: of the oldest read the hash is forgotten, and the
    same read after that is written once more.
    """

    def __init__(self) -> None:
        # Guards the two below; nothing is called while it is held.
        self._lock = threading.Lock()
        self._noted: OrderedDict[bytes, int] = OrderedDict()
        self._engine: weakref.ref[Engine] | None = None

    def note(
        self,
        engine: Engine,
        principal: Principal,
        route: str,
        given: Mapping[str, str],
        headers: Mapping[str, str],
    ) -> None:
        """
        Record that *principal* read the audit rows that *given* asks for.

        Never raises: a full disk must not hide from an operator what is on it.
        """
        meant = {name: given[name] for name in given if name not in PAGING}
        if not self._is_new(engine, principal, route, meant):
            return
        try:
            with _scope(headers):
                engine.emit_own(
                    "AUDIT_READ",
                    "audit",
                    {"route": route, "filters": meant},
                    **_anchors(principal),
                )
        except Exception as error:  # whatever keeps a row from being taken
            logger.warning(
                "fasten reader: a read by %r was not recorded (%s)",
                principal.name[:80],
                type(error).__name__,
            )

    def _is_new(
        self, engine: Engine, principal: Principal, route: str, meant: Mapping[str, str]
    ) -> bool:
        # Paging through an answer is one read of it.
        key = _key(principal, route, meant)
        now = engine.now_us()
        with self._lock:
            if self._engine is None or self._engine() is not engine:
                self._engine = weakref.ref(engine)
                self._noted.clear()
            noted = self._noted.get(key)
            # A clock that stepped back must not silence the record.
            if noted is not None and 0 <= now - noted < WINDOW_US:
                return False
            self._noted[key] = now
            self._noted.move_to_end(key)
            if len(self._noted) > REMEMBERED:
                self._noted.popitem(last=False)
        return True


def _key(principal: Principal, route: str, meant: Mapping[str, str]) -> bytes:
    tenant = None if principal.sees_everything else [principal.tenant]
    said = [principal.name, tenant, route, sorted(meant.items())]
    return sha256(json.dumps(said).encode()).digest()


def _anchors(principal: Principal) -> dict[str, Any]:
    cell = context.current()
    return {
        "actor": principal.name,
        "actor_kind": "user",
        # A tenant may see that it was read by its own. What somebody asked who sees
        # everything may name other tenants' values: that is nothing for a tenant.
        "tenant_id": None if principal.tenant is ALL_TENANTS else principal.tenant,
        "method": "http",
        "client": None if cell is None else cell.client,
    }


def _scope(headers: Mapping[str, str]) -> AbstractContextManager[Any]:
    """
    Give the row a request id where no middleware of ours did.
    """
    if context.current() is not None:
        return nullcontext()
    rid = headers.get("x-request-id") if context.trusts_request_ids() else None
    return context.scope(rid, kind="http", method="http")
