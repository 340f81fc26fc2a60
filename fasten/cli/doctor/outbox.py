# SPDX-License-Identifier: Apache-2.0
"""
The outbox of `emit(connection=)`: there, open to fasten's role, and moved on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fasten.cli.doctor.finding import Finding, Host, fail, ok, warn
from fasten.rows import ulid_ms
from fasten.settings import Settings

if TYPE_CHECKING:
    from fasten.repository import OutboxRepository

__all__ = ["check_outbox"]

_LATE_MS: Final = 60_000
_SET_UP: Final = "as its owner, run what `fasten init-db --outbox --print-sql` prints"


def check_outbox(settings: Settings, host: Host) -> list[Finding]:
    """
    Look at the outbox as the process that moves its rows would.
    """
    dsn, audit_dsn = settings.outbox_dsn, settings.audit_dsn
    if audit_dsn is None:
        return [] if dsn is None else [_NOWHERE]
    if dsn is not None and dsn.path is not None and not Path(dsn.path).exists():
        message = f"outbox database not reachable ({dsn.display}): there is no file"
        return [fail("outbox", message, "see FASTEN_OUTBOX_DSN: the business's file")]
    from fasten.repository import AuditRepository, Database, OutboxRepository

    database = Database(dsn or audit_dsn, is_guest=True)
    audit = AuditRepository(audit_dsn, database if dsn is None else Database(audit_dsn))
    try:
        return list(_looked_at(OutboxRepository(database.dsn, database, audit), host))
    except Exception as error:  # the driver's: told without its DSN
        problem = database.problem(error).message
        message = f"outbox not usable ({database.dsn.display}): {problem}"
        return [fail("outbox", message, _SET_UP)]
    finally:
        database.release()
        audit.database.release()


_NOWHERE: Final = warn(
    "outbox",
    "FASTEN_OUTBOX_DSN is set and no audit store: rows of transactions have nowhere "
    "to go",
    "set FASTEN_AUDIT_DSN",
)


def _looked_at(outbox: OutboxRepository, host: Host) -> Iterator[Finding]:
    if not outbox.is_shared:
        yield _place(outbox)
    number, first = outbox.waiting()
    late_ms = host.clock_ns() // 1_000_000 - ulid_ms(first) if first else 0
    if late_ms > _LATE_MS:
        yield warn(
            "outbox",
            f"{number} rows of transactions wait in the outbox, the oldest for "
            f"{late_ms // 60_000} min",
            "see that a service with this FASTEN_OUTBOX_DSN runs: it moves them",
        )


def _place(outbox: OutboxRepository) -> Finding:
    place = outbox.locate()
    reached = f"outbox reachable ({outbox.dsn.given_display})"
    if place.may_insert:
        outbox.attempt()
        return ok("outbox", reached)
    table = outbox.table.fullname
    return warn(
        "outbox",
        f"{reached}; {place.login} may not INSERT there: emit(connection=) is refused "
        "where the application logs in as the same role",
        f"as its owner: GRANT INSERT ON {table} TO the role of the application",
    )
