# SPDX-License-Identifier: Apache-2.0
"""
The soak: a random fault every few seconds, over minutes, and the oracle at the end.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import attrs

from tests.backups import Backup
from tests.checker import rows_of
from tests.faults.grounds import Grounds
from tests.faults.heir import inherit
from tests.faults.oracle import CANARY, Ack, Outcome, judge
from tests.faults.proxy import Proxy
from tests.faults.server import TERMINATE, ask
from tests.faults.victim import Plan, Victim

__all__ = ["EXPERIMENTS", "soak"]

VICTIMS: Final = 3
PAUSE_S: Final = 0.05


@attrs.define
class Scene:
    """
    Several victims of one store, which are replaced as they die.
    """

    grounds: Grounds
    dsn: str
    proxy: Proxy
    dice: random.Random
    running: list[Victim] = attrs.field(factory=list)
    acks: list[Ack] = attrs.field(factory=list)
    told: list[str] = attrs.field(factory=list)
    born: int = 0

    def bear(self) -> None:
        """
        Start victims until there are enough.
        """
        while len(self.running) < VICTIMS:
            plan = Plan(
                dsn=self.proxy.dsn,
                spool=str(self.grounds.spool),
                name=f"v{self.born}",
                threads=2,
                pause_s=PAUSE_S,
            )
            self.born += 1
            self.running.append(Victim(plan, self.grounds.folder))

    def bury(self, victim: Victim) -> None:
        """
        Take note of a dead victim, and start another.
        """
        victim.kill()
        self.acks += victim.acks()
        self.told += [victim.plan.name] * (CANARY in victim.texts())
        self.running.remove(victim)
        self.bear()

    def any(self) -> Victim:
        """
        Return one of the victims.
        """
        return self.dice.choice(self.running)


def _kill(scene: Scene) -> None:
    scene.bury(scene.any())


def _end(scene: Scene) -> None:
    victim = scene.any()
    with suppress(Exception):
        victim.stop(60)
    scene.bury(victim)


def _freeze(scene: Scene) -> None:
    victim = scene.any()
    victim.signal(signal.SIGSTOP)
    threading.Event().wait(scene.dice.random() * 2)
    victim.signal(signal.SIGCONT)


def _refuse(scene: Scene) -> None:
    scene.proxy.mode = "refuse"
    threading.Event().wait(scene.dice.random() * 3)
    scene.proxy.mode = "pass"


def _stall(scene: Scene) -> None:
    scene.proxy.mode = "stall"
    threading.Event().wait(scene.dice.random() * 3)
    scene.proxy.mode = "pass"


def _lose(scene: Scene) -> None:
    scene.proxy.lose("reply", 5)
    scene.proxy.mode = "pass"


def _terminate(scene: Scene) -> None:
    ask(scene.dsn, TERMINATE)


def _restore(scene: Scene) -> None:
    backup = Backup(scene.dsn)
    scene.any().reaches(10)
    backup.restore()


FAULTS: Final[tuple[Callable[[Scene], None], ...]] = (
    *(_kill, _kill, _end, _freeze, _refuse, _stall, _lose, _terminate),
    _restore,
)
"""What may happen, the more often the likelier."""


def soak(
    grounds: Grounds,
    *,
    trials: int = 1,
    seconds: float = 1800.0,
    rest_s: tuple[float, float] = (3.0, 15.0),
) -> Outcome:
    """
    Have services live through a random fault every *rest_s* seconds, *trials* times.
    """
    dsn, start = grounds.dsn("postgres"), time.monotonic()
    dice, faults = random.Random(grounds.seed), 0
    with Proxy(dsn) as proxy:
        scene = Scene(grounds, dsn, proxy, dice)
        scene.bear()
        for victim in scene.running:
            victim.reaches(10)
        try:
            while time.monotonic() - start < seconds * trials:
                threading.Event().wait(dice.uniform(*rest_s))
                dice.choice(FAULTS)(scene)
                faults += 1
        finally:
            proxy.mode = "pass"
            for victim in tuple(scene.running):
                with suppress(Exception):
                    victim.stop(60)
                victim.kill()
                scene.acks += victim.acks()
                scene.told += [victim.plan.name] * (CANARY in victim.texts())
        # What a restore took from the dead is stored again once a process looks for it.
        own = sum(row["domain"] == "fasten" for row in rows_of(dsn))
        inherit(dsn, grounds.spool, rows=len(scene.acks) + own)
    wrong = [f"a secret stands in what {name} said" for name in scene.told]
    found = judge("soak", dsn, scene.acks, trials=faults, wrong=wrong)
    return found.lasting(time.monotonic() - start)


EXPERIMENTS: Final = {"soak": soak}
"""The experiments of this module."""
