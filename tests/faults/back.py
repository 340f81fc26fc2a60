# SPDX-License-Identifier: Apache-2.0
"""
Stores that go back under load: a backup restored, with the service up or down.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from tests.backups import Backup
from tests.checker import rows_of
from tests.faults.grounds import Grounds, both
from tests.faults.heir import inherit
from tests.faults.oracle import Outcome, judge
from tests.faults.proxy import Proxy
from tests.faults.trial import endure, is_well
from tests.faults.victim import Plan, Victim
from tests.outside import wait_until
from tests.postgres import PostgresFailed, PostgresServer

__all__ = ["EXPERIMENTS", "dumped", "promoted", "restored", "restored_while_down"]


def restored(grounds: Grounds, *, store: str, trials: int = 20) -> Outcome:
    """
    Restore a backup of moments ago under a service that goes on emitting.
    """
    dsn, dice = grounds.dsn(store), random.Random(grounds.seed)

    def restore(victim: Victim) -> None:
        backup = Backup(dsn)
        victim.reaches(dice.randrange(20, 400))
        backup.restore()
        victim.reaches(50)

    return endure(
        f"restored under load ({store})", grounds, dsn, restore, trials=trials
    )


def restored_while_down(grounds: Grounds, *, store: str, trials: int = 10) -> Outcome:
    """
    Kill a service, restore a backup of before, and start it: the journals fill it.
    """
    dsn, acks, start = grounds.dsn(store), [], time.monotonic()
    for trial in range(trials):
        plan = Plan(dsn=dsn, spool=str(grounds.spool), name=f"v{trial}", pause_s=0.003)
        with Victim(plan, grounds.folder) as victim:
            victim.reaches(100)
            backup = Backup(dsn)
            victim.reaches(200)
            if trial % 2:
                victim.stop()
            victim.kill()
            acks += victim.acks()
        backup.restore() if store == "postgres" else backup.replace()
    inherit(dsn, grounds.spool, rows=len(acks))
    found = judge(f"restored while down ({store})", dsn, acks, trials=trials)
    return found.lasting(time.monotonic() - start)


def dumped(grounds: Grounds, *, trials: int = 10) -> Outcome:
    """
    Restore what `pg_dump` wrote moments ago, by `pg_restore`, under load.
    """
    server, dice = grounds.new_server(), random.Random(grounds.seed)
    place = ("-d", server.dsn())
    how = ("--clean", "--if-exists", "--single-transaction")

    def restore(victim: Victim) -> None:
        dump = server.datadir.parent / f"{dice.random()}.dump"
        server.run("pg_dump", "-Fc", "-f", dump, *place)
        victim.reaches(dice.randrange(20, 400))
        wait_until(lambda: _is_restored(server, *how, *place, dump), 60)
        victim.reaches(50)

    return endure(
        "pg_restore under load", grounds, server.dsn(), restore, trials=trials
    )


def _is_restored(server: PostgresServer, *words: str | Path) -> bool:
    with suppress(PostgresFailed):  # a deadlock with who appends: operators try again
        server.run("pg_restore", *words)
        return True
    return False


def promoted(grounds: Grounds, *, trials: int = 5) -> Outcome:
    """
    Kill a primary whose asynchronous standby lags, and promote that: what was lost is
    stored again, and on record.
    """
    primary = grounds.new_server()
    with ExitStack() as stack:
        way = stack.enter_context(Proxy(primary.dsn()))
        servers = [primary]

        def fail_over(victim: Victim) -> Iterator[str]:
            old = servers[-1]
            link = stack.enter_context(Proxy(old.dsn()))
            copy = stack.enter_context(old.standby(f"copy{len(servers)}", link.dsn))
            victim.reaches(50)
            link.mode = "refuse"
            stored = len(rows_of(old.dsn()))
            wait_until(lambda: len(rows_of(old.dsn())) > stored + 50, 30)
            old.stop("kill")
            copy.promote()
            way.lead_to(copy.dsn())
            servers.append(copy)
            yield from is_well(victim, time.monotonic())
            victim.reaches(50)
            on_record = len(_lost(copy.dsn()))
            if on_record != len(servers) - 1:
                yield f"{on_record} losses on record, {len(servers) - 1} failovers"

        return endure(
            "async standby promoted", grounds, way.dsn, fail_over, trials=trials
        )


def _lost(dsn: str) -> set[int]:
    """
    Return where each stretch begins that is on record as lost; some are said again.
    """
    records = [row for row in rows_of(dsn) if row["code"] == "CHAIN_RESTORED"]
    return {json.loads(row["detail"])["from_seq"] for row in records}


EXPERIMENTS: Final = {
    "restored-by-pg_restore": dumped,
    "standby-promoted": promoted,
    **both("restored", restored),
    **both("restored-down", restored_while_down),
}
"""The experiments of this module."""
