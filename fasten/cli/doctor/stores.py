# SPDX-License-Identifier: Apache-2.0
"""
The stores: reached, written to, read back, and in step with the clock.

What the rows in them prove is in `evidence`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fasten import codes, context
from fasten.cli.doctor.evidence import faults_of
from fasten.cli.doctor.finding import Finding, Host, fail, ok, warn
from fasten.cli.source import Store
from fasten.rows import (
    AuditRow,
    Pending,
    Query,
    UlidMinter,
    canonical_json,
    parse_timestamp,
    ulid_ms,
)
from fasten.settings import Dsn, Settings

if TYPE_CHECKING:
    from fasten.repository import AuditRepository

__all__ = [
    "check_clock",
    "check_role",
    "check_round_trip",
    "check_store",
    "check_streams",
]


def check_store(settings: Settings, host: Host) -> tuple[Store | None, list[Finding]]:
    """
    Connect to the audit store, and see to its tables.
    """
    dsn = settings.audit_dsn
    if dsn is None:
        return None, [
            warn(
                "store",
                "no audit store: rows go to stdout only",
                "set FASTEN_AUDIT_DSN, as in sqlite:///./audit.db",
            )
        ]
    if (fault := _unborn(dsn, host)) is not None:
        return None, [fault]
    found = Store(dsn, "audit")
    problem = _attempt(found, lambda: _connect(found))
    if problem is not None:
        message = f"audit store not reachable ({dsn.display}): {problem}"
        return None, [fail("store", message)]
    message = f"audit store reachable ({dsn.given_display})"
    reached = ok("store", message)
    repository: AuditRepository = found.repository  # type: ignore[assignment]
    problem = _attempt(found, repository.schema.ensure)
    if problem is not None:
        return None, [reached, fail("schema", f"tables not usable: {problem}")]
    # The DSN stands above as it was given: here is where a relative one leads.
    place = f" in {dsn.path}" if dsn.path is not None else ""
    return found, [reached, ok("schema", f"{_table(dsn)}{place}: tables up to date")]


def _unborn(dsn: Dsn, host: Host) -> Finding | None:
    """
    Say why a SQLite file that is not there yet should not be made by this process.
    """
    path = Path(dsn.path) if dsn.path is not None else None
    if path is None or path.exists():
        return None
    message = f"audit store not reachable ({dsn.display}): "
    if not path.parent.is_dir():
        return fail(
            "store",
            f"{message}the directory {path.parent} does not exist",
            "create it, for the user that the service runs as",
        )
    if host.is_root and path.parent.stat().st_uid != 0:
        return warn(
            "store",
            f"{message}there is no file yet",
            "run this as the user that the service runs as: a file made by root would "
            "lock it out",
        )
    return None


def _connect(found: Store) -> None:
    path = found.dsn.path
    # Reading creates no store; the tables are made next, as the service would.
    if path is None or Path(path).exists():
        with found.database.reading():
            pass


def _attempt(found: Store, act: Callable[[], object]) -> str | None:
    """
    Return what is wrong, without any secret; None if nothing is.
    """
    try:
        act()
    except Exception as error:  # the driver's: told without its DSN
        problem = found.database.problem(error).message
        found.database.release()
        return problem
    return None


def _table(dsn: Dsn) -> str:
    return f"{dsn.schema}.{dsn.table}" if dsn.schema else dsn.table


def check_round_trip(
    settings: Settings, found: Store, host: Host
) -> tuple[AuditRow | None, list[Finding]]:
    """
    Store a row of our own, read it back, and recompute its seal from the columns.
    """
    from fasten.repository import Writer

    repository: AuditRepository = found.repository  # type: ignore[assignment]
    writer = Writer(os.urandom(16).hex(), settings.service_id, settings.node_id)
    sample = _sample(settings, host)
    before = found.read(repository.positions).get((writer.service, writer.node), 0)
    problem = _attempt(found, lambda: repository.append(writer, [(0, sample)], 0))
    if problem is not None:
        return None, [fail("round trip", f"emit roundtrip failed: {problem}")]
    page = found.read(lambda: repository.query(Query(filters={"id": sample.id})))
    if not page.rows:
        return None, [
            fail(
                "round trip",
                f"emit roundtrip failed: row {sample.id} was stored and is not there",
                "somebody deletes rows, or reads go to a replica that lags behind",
            )
        ]
    row: AuditRow = page.rows[0]
    faults = [*faults_of(row), *_differences(row, sample, before)]
    if faults:
        message = f"emit roundtrip came back changed (id={row.id}): {'; '.join(faults)}"
        return row, [fail("round trip", message, "see what triggers the table has")]
    return row, [ok("round trip", f"emit roundtrip OK (id={row.id})")]


def _sample(settings: Settings, host: Host) -> Pending:
    codes.registry.ensure()
    entry = codes.registry.entries["AUDIT_SELF_TEST"]
    now_ns = host.clock_ns()
    return Pending(
        id=UlidMinter()(now_ns),
        timestamp_us=now_ns // 1000,
        code=entry.code,
        action=entry.action,
        severity=entry.severity,
        category=entry.category,
        domain=entry.domain,
        retention_class="long",
        outcome="success",
        actor="fasten",
        actor_kind="service",
        on_behalf_of=None,
        tenant_id=settings.tenant_id,
        client=None,
        target="doctor",
        method="cli",
        reason=None,
        request_id=context.mint_request_id(),
        trace_id=None,
        span_id=None,
        detail=canonical_json({"host": host.hostname, "pid": os.getpid()}),
    )


def _differences(row: AuditRow, sample: Pending, before: int) -> list[str]:
    sent = {**sample._asdict(), "timestamp": row.timestamp}
    del sent["timestamp_us"]
    stored = {**row.to_dict(), "detail": canonical_json(row.detail)}
    faults = [
        f"{name} differs" for name, value in sent.items() if stored[name] != value
    ]
    if parse_timestamp(row.timestamp) != sample.timestamp_us:
        faults.append("timestamp differs")
    if (row.monotonic_seq or 0) <= before:
        faults.append(f"it is number {row.monotonic_seq}, after number {before}")
    return faults


# --- roles -------------------------------------------------------------------------

_AS_SERVICE: Final = (
    "let the service log in as a member of fasten_app; `fasten init-db --print-sql` is "
    "what the owner runs once"
)


def check_role(found: Store) -> list[Finding]:
    """
    Say whether who is logged in could rewrite the log, and what it lacks.
    """
    if found.dsn.path is not None:
        return []  # SQLite has no roles
    name, is_owner, is_super, missing = found.read(lambda: _login(found))
    table = _table(found.dsn)
    if is_owner or is_super:
        what = "is a superuser" if is_super else f"owns {table}"
        message = f"role {name} {what}: it can drop the triggers and change rows"
        return [warn("role", message, _AS_SERVICE)]
    if missing:
        message = f"role {name} lacks {'; '.join(missing)}"
        return [warn("role", message, f"as the owner: GRANT {missing[0]} TO {name}")]
    return [ok("role", f"role {name} does not own {table}, and has all that it needs")]


def _login(found: Store) -> tuple[str, bool, bool, list[str]]:
    """
    Return who is logged in, whether it owns, or is above owners, and what it lacks.
    """
    from fasten.repository.roles import missing_rights, owner_of

    with found.database.reading() as connection:
        is_owner, is_super = owner_of(connection, found.dsn)
        missing = [] if is_owner else missing_rights(connection, found.dsn)
        name = connection.exec_driver_sql("SELECT current_user").scalar_one()
    return name, is_owner, is_super, missing


# --- sys and api rows --------------------------------------------------------------


def check_streams(settings: Settings, host: Host, directory: Path) -> list[Finding]:
    """
    Connect to the stores of sys and api rows; without, count the workers.
    """
    findings = []
    in_memory = []
    for stream in ("sys", "api"):
        dsn: Dsn | None = getattr(settings, f"{stream}_dsn")
        if dsn is None:
            in_memory.append(stream)
            continue
        findings.append(_stream(dsn, stream))
    return findings + (
        _rings(in_memory, _workers(host, directory)) if in_memory else []
    )


def _stream(dsn: Dsn, stream: str) -> Finding:
    found, check, place = Store(dsn, stream), f"{stream} store", f"({dsn.display})"
    problem = _attempt(found, found.repository.schema.ensure)
    missing = [] if problem else found.read(lambda: _stream_rights(found))
    found.close()
    if problem is not None:
        return fail(check, f"{stream} store not reachable {place}: {problem}")
    if missing:
        message = f"the role of the {stream} store {place} lacks {'; '.join(missing)}"
        return fail(check, message, f"as the owner: GRANT {missing[0]} TO that role")
    return ok(check, f"{stream} store reachable {place}")


def _stream_rights(found: Store) -> list[str]:
    if found.dsn.path is not None:
        return []  # SQLite has no roles
    from fasten.repository.roles import missing_stream_rights

    with found.database.reading() as connection:
        return missing_stream_rights(connection, found.dsn, found.stream)


def _rings(in_memory: list[str], workers: int) -> list[Finding]:
    names = " and ".join(in_memory)
    if workers < 2:
        return [ok("rings", f"{names} rows are kept in the memory of the process")]
    variables = " and ".join(f"FASTEN_{name.upper()}_DSN" for name in in_memory)
    return [
        warn(
            "rings",
            f"{workers} processes keep {names} rows each in its own memory; a reader "
            "answers for one of them",
            f"set {variables}",
        )
    ]


_WORKERS: Final = re.compile(r"(?:^|\s)(?:-w|--workers)[ =]?([0-9]{1,4})")


def _workers(host: Host, directory: Path) -> int:
    """
    Return how many processes serve at once, as far as that can be seen.
    """
    told = [host.environ.get("WEB_CONCURRENCY", "")]
    told += _WORKERS.findall(host.environ.get("GUNICORN_CMD_ARGS", ""))
    numbers = [int(number) for number in told if number.isdecimal()]
    return max([*numbers, _alive(directory)])


def _alive(directory: Path) -> int:
    """
    Return how many processes hold the lock of a journal in the spool.
    """
    try:
        import fcntl
    except ImportError:  # no flock, no journals
        return 0
    alive = 0
    for path in directory.glob("*.lock") if directory.is_dir() else ():
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            alive += 1
        except OSError:
            continue
    return alive


# --- the clock ---------------------------------------------------------------------

_STEP_MS: Final = 2_000


def check_clock(found: Store, row: AuditRow | None, host: Host) -> list[Finding]:
    """
    Compare this clock with the store's, and with the rows that are there.

    *row* is the one of the round trip.
    """
    now_ms = host.clock_ns() // 1_000_000
    findings = []
    if row is not None and row.stored_at is not None:
        stored_ms = parse_timestamp(row.stored_at) // 1000
        off_ms = parse_timestamp(row.timestamp) // 1000 - stored_ms
        if abs(off_ms) > _STEP_MS:
            ahead = "ahead of" if off_ms > 0 else "behind"
            message = f"the clock is {_seconds(abs(off_ms))} {ahead} the store's"
            findings.append(warn("clock", message, "let both follow NTP"))
    newest = found.read(lambda: found.repository.query(Query(limit=100)))
    steps = [_step_ms(each, now_ms) for each in newest.rows]
    if steps and max(steps) > _STEP_MS:
        message = f"the clock was set back, by {_seconds(max(steps))} at the most"
        cure = (
            "let it follow NTP: rows of that time are in order, but not at their time"
        )
        findings.append(warn("clock", message, cure))
    return findings or [ok("clock", "clock in step with the store and its rows")]


def _step_ms(row: Any, now_ms: int) -> int:
    """
    Return by how much a row's id is ahead of its time, or of now.
    """
    try:
        minted_ms = ulid_ms(row.id)
        at_ms = parse_timestamp(row.timestamp) // 1000
    except ValueError:
        return 0
    return max(minted_ms - at_ms, at_ms - now_ms)


def _seconds(ms: int) -> str:
    return f"{ms / 1000:.1f} s" if ms < 600_000 else f"{ms / 60_000:.0f} min"
