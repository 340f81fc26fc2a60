# SPDX-License-Identifier: Apache-2.0
"""
What happens to a Postgres server, and on the way to it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

import psycopg

from tests.faults.grounds import Grounds
from tests.faults.oracle import CANARY, Outcome
from tests.faults.proxy import Proxy
from tests.faults.trial import endure, is_ill, is_well
from tests.faults.victim import Victim
from tests.outside import wait_until
from tests.postgres import PostgresServer

__all__ = ["EXPERIMENTS", "OPERATIONS", "WAYS", "guarded", "with_secret"]

REFUSED_S: Final = 3.0
HUNG_S: Final = 15.0


def with_secret(dsn: str, user: str = "postgres") -> str:
    """
    Return a DSN with a password in it, for the search for secrets.
    """
    parts = urlsplit(dsn)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{user}:{CANARY}@{host}").geturl()


def ask(dsn: str, *statements: str) -> None:
    """
    Execute statements as an operator.
    """
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


TERMINATE: Final = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE application_name = 'fasten'"
)


def count_backends(dsn: str) -> int:
    """
    Return how many connections fasten has to a server.
    """
    asked = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'fasten'"
    with psycopg.connect(dsn) as connection:
        (found,) = connection.execute(asked).fetchone() or (0,)
        return int(found)


# --- on the way -----------------------------------------------------------------------


def _up(victim: Victim, _proxy: Proxy, _dsn: str) -> None:
    victim.reaches(400)


def _refused(victim: Victim, proxy: Proxy, _dsn: str) -> Iterator[str]:
    proxy.mode = "refuse"
    yield from is_ill(victim, time.monotonic(), REFUSED_S, "not reachable")
    victim.reaches(100)
    proxy.mode = "pass"
    yield from is_well(victim, time.monotonic())


def _hung(victim: Victim, proxy: Proxy, _dsn: str) -> Iterator[str]:
    proxy.mode = "stall"
    yield from is_ill(victim, time.monotonic(), HUNG_S, "")
    victim.reaches(100)
    proxy.mode = "pass"
    yield from is_well(victim, time.monotonic())


def _slow(victim: Victim, proxy: Proxy, _dsn: str) -> None:
    proxy.mode = "drip"
    victim.reaches(400)
    proxy.mode = "pass"


def _cut(victim: Victim, proxy: Proxy, _dsn: str) -> None:
    proxy.cut()
    victim.reaches(10)


def _unanswered(victim: Victim, proxy: Proxy, _dsn: str) -> Iterator[str]:
    if not proxy.lose("reply"):
        yield "no COMMIT came"
    yield from is_well(victim, time.monotonic())


def _uncommitted(victim: Victim, proxy: Proxy, _dsn: str) -> Iterator[str]:
    if not proxy.lose("commit"):
        yield "no COMMIT came"
    yield from is_well(victim, time.monotonic())


def _terminated(victim: Victim, _proxy: Proxy, dsn: str) -> None:
    ask(dsn, TERMINATE)
    victim.reaches(10)


def _locked(victim: Victim, _proxy: Proxy, dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("LOCK TABLE audit_log IN ACCESS EXCLUSIVE MODE")
        victim.reaches(300)


def _read_only(victim: Victim, _proxy: Proxy, dsn: str) -> Iterator[str]:
    name = urlsplit(dsn).path[1:]
    ask(dsn, f"ALTER DATABASE {name} SET default_transaction_read_only = on", TERMINATE)
    yield from is_ill(victim, time.monotonic(), REFUSED_S, "25006")
    ask(
        dsn,
        "SET default_transaction_read_only = off",
        f"ALTER DATABASE {name} RESET default_transaction_read_only",
    )
    yield from is_well(victim, time.monotonic())


WAYS: Final[dict[str, tuple[Callable[..., Any], int]]] = {
    "up": (_up, 10),
    "refused": (_refused, 10),
    "hung": (_hung, 3),
    "slow": (_slow, 10),
    "cut": (_cut, 100),
    "reply-lost": (_unanswered, 200),
    "commit-lost": (_uncommitted, 200),
    "terminated": (_terminated, 100),
    "locked": (_locked, 10),
    "read-only": (_read_only, 10),
}
"""What happens on the way to a server, and how often in the long form."""


def on_the_way(
    grounds: Grounds, *, way: str, trials: int, is_bounded: bool = True
) -> Outcome:
    """
    Let a victim reach its server through a proxy that misbehaves *trials* times.
    """
    dsn = grounds.dsn("postgres")
    act, _ = WAYS[way]
    with Proxy(dsn) as proxy:
        return endure(
            f"Postgres: {way}",
            grounds,
            dsn,
            lambda victim: act(victim, proxy, dsn),
            trials=trials,
            is_bounded=is_bounded,
            dsn=with_secret(proxy.dsn),
        )


# --- a server's life ------------------------------------------------------------------


def restarts(grounds: Grounds, *, trials: int = 10) -> Outcome:
    """
    Restart a server under load, fast, immediately, and by kill -9 of the postmaster.
    """
    server = grounds.new_server()

    def restart(victim: Victim) -> Iterator[str]:
        for mode in ("fast", "immediate", "kill"):
            server.stop(mode)  # type: ignore[arg-type]
            victim.reaches(20)
            server.start()
            yield from is_well(victim, time.monotonic())
            victim.reaches(20)

    return endure(
        "Postgres: restarts",
        grounds,
        server.dsn(),
        restart,
        trials=trials,
        dsn=with_secret(server.dsn()),
    )


def paused(grounds: Grounds, *, trials: int = 1, seconds: float = 60.0) -> Outcome:
    """
    Stop a server and all its backends with SIGSTOP for a minute.
    """
    server = grounds.new_server()

    def pause(victim: Victim) -> Iterator[str]:
        start = time.monotonic()
        server.pause()
        try:
            yield from is_ill(victim, start, HUNG_S, "")
            threading.Event().wait(max(0.0, start + seconds - time.monotonic()))
        finally:
            server.resume()
        yield from is_well(victim, time.monotonic())

    return endure(
        "Postgres: SIGSTOP",
        grounds,
        server.dsn(),
        pause,
        trials=trials,
        is_bounded=True,
        dsn=with_secret(server.dsn()),
    )


# --- what operators do ----------------------------------------------------------------

Done = Iterator[str]
"""Yields what a victim's health has to say, once it is done; then undoes it."""


def _password(admin: str, _dsn: str) -> Done:
    ask(admin, "ALTER ROLE shop PASSWORD 'another'", TERMINATE)
    yield "28P01: the password was refused; correct it"
    ask(admin, f"ALTER ROLE shop PASSWORD '{CANARY}'")


def _database(admin: str, _dsn: str) -> Done:
    def renamed(old: str, new: str) -> bool:
        with suppress(psycopg.errors.ObjectInUse):
            ask(admin, TERMINATE, f"ALTER DATABASE {old} RENAME TO {new}")
            return True
        return False

    wait_until(partial(renamed, "shop", "gone"), 20)
    yield "3D000: the database does not exist"
    ask(admin, "ALTER DATABASE gone RENAME TO shop")


def _table(_admin: str, dsn: str) -> Done:
    ask(dsn, "REVOKE CREATE ON SCHEMA public FROM shop")
    ask(dsn, "ALTER TABLE audit_log RENAME TO gone")
    yield "run `fasten init-db`"
    ask(dsn, "ALTER TABLE gone RENAME TO audit_log")


def _column(_admin: str, dsn: str) -> Done:
    ask(dsn, "ALTER TABLE audit_log RENAME COLUMN reason TO why")
    yield "42703: a column is missing"
    ask(dsn, "ALTER TABLE audit_log RENAME COLUMN why TO reason")


def _grant(_admin: str, dsn: str) -> Done:
    ask(dsn, "REVOKE INSERT ON audit_log FROM shop")
    yield "42501: a right is missing; grant it"
    ask(dsn, "GRANT INSERT ON audit_log TO shop")


def _connections(admin: str, _dsn: str) -> Done:
    user = admin.replace("postgres@", f"shop:{CANARY}@")
    with ExitStack() as stack:

        def is_full() -> bool:
            ask(admin, TERMINATE)
            with suppress(psycopg.OperationalError):
                while True:
                    stack.enter_context(psycopg.connect(user))
            return not count_backends(admin)  # or it was back before us

        wait_until(is_full, 20)
        yield "Postgres"


OPERATIONS: Final[dict[str, Callable[[str, str], Done]]] = {
    "wrong password": _password,
    "missing database": _database,
    "missing table": _table,
    "missing column": _column,
    "missing right": _grant,
    "no connection left": _connections,
}
"""What an operator does to a store."""

_HBA: Final = "host all shop 127.0.0.1/32 scram-sha-256\n"


@contextmanager
def guarded(server: PostgresServer) -> Iterator[str]:
    """
    Yield a DSN of a database whose owner needs a password.
    """
    hba = server.datadir / "pg_hba.conf"
    hba.write_text(_HBA + hba.read_text())
    ask(
        server.dsn(),
        f"CREATE ROLE shop LOGIN PASSWORD '{CANARY}'",
        "CREATE DATABASE shop OWNER shop",
        "SELECT pg_reload_conf()",
    )
    yield server.dsn("shop")


def operators(grounds: Grounds, *, trials: int = 5) -> Outcome:
    """
    Do to a store, under load, what operators do; each has to be told with its cure.
    """
    with guarded(grounds.new_server()) as dsn:
        admin = urlsplit(dsn)._replace(path="/postgres").geturl()

        def operate(victim: Victim) -> Iterator[str]:
            for operation in OPERATIONS.values():
                done = operation(admin, dsn)
                cure = next(done)
                yield from is_ill(victim, time.monotonic(), REFUSED_S, cure)
                next(done, None)
                yield from is_well(victim, time.monotonic())

        return endure(
            "Postgres: operators",
            grounds,
            dsn,
            operate,
            trials=trials,
            dsn=with_secret(dsn, "shop"),
        )


def _long(way: str) -> Callable[..., Outcome]:
    return partial(on_the_way, way=way, trials=WAYS[way][1])


EXPERIMENTS: Final = {
    **{f"postgres-{way}": _long(way) for way in WAYS},
    "postgres-restarts": restarts,
    "postgres-paused": paused,
    "postgres-operators": operators,
}
"""The experiments of this module."""
