# SPDX-License-Identifier: Apache-2.0
"""
Stores that go back under load: a backup restored, with the service up or down.
"""

from __future__ import annotations

import random
import time
from typing import Final

from tests.backups import Backup
from tests.faults.grounds import Grounds, both
from tests.faults.heir import inherit
from tests.faults.oracle import Outcome, judge
from tests.faults.trial import endure
from tests.faults.victim import Plan, Victim

__all__ = ["EXPERIMENTS", "restored", "restored_while_down"]


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


EXPERIMENTS: Final = {
    **both("restored", restored),
    **both("restored-down", restored_while_down),
}
"""The experiments of this module."""
