# SPDX-License-Identifier: Apache-2.0
"""
The main job on one page: a small shop records a day, an operator reads it back.

`make demo` runs this. It writes to a temporary directory and nowhere else.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fasten
from fasten.engine import Engine, install
from fasten.settings import Settings

DAY_NS = 24 * 3600 * 1_000_000_000


class Day:
    """
    A clock that runs through yesterday as fast as the traffic needs it.
    """

    def __init__(self) -> None:
        midnight = time.time_ns() // DAY_NS * DAY_NS
        self.now_ns = midnight - DAY_NS

    def __call__(self) -> int:
        """
        Return nanoseconds since 1970, a little later each time.
        """
        self.now_ns += 7_000_000
        return self.now_ns

    def skip_to(self, second: float) -> None:
        """
        Let the time pass until *second* of the day.
        """
        start = self.now_ns // DAY_NS * DAY_NS
        self.now_ns = max(self.now_ns, start + round(second * 1_000_000_000))


def moments(number: int, dice: random.Random) -> Iterator[float]:
    """
    Yield seconds of the day, most of them in working hours, in order.
    """
    yield from sorted(dice.gauss(13.5, 3.5) % 24 * 3600 for _ in range(number))


def order(dice: random.Random) -> str:
    """
    Take an order: three audit rows and a log line under one request id.
    """
    user, number = f"u-{dice.randrange(40, 90)}", dice.randrange(9000, 10_000)
    amount = dice.randrange(500, 90_000) / 100
    with fasten.bind(actor=user, method="http", client="203.0.113.7") as scope:
        fasten.emit(
            code="ORDER_PLACED",
            target=f"ord-{number}",
            detail={"amount": amount, "currency": "EUR", "card": "4111111111111111"},
        )
        fasten.log.info("order_placed", order=number, amount=amount)
        declined = dice.random() < 0.08
        fasten.emit(
            code="PAYMENT_PROCESSED",
            target=f"ord-{number}",
            actor="system",
            outcome="failure" if declined else "success",
            detail={"provider": "acquirer", "amount": amount},
        )
        if not declined:
            fasten.emit(code="JOB_COMPLETED", target=f"pick-{number}", actor="wms")
        return scope.request_id


def visit(dice: random.Random) -> None:
    """
    Log somebody in, or turn them away.
    """
    user = f"u-{dice.randrange(40, 90)}"
    with fasten.bind(actor=user, method="http"):
        if dice.random() < 0.1:
            fasten.emit(
                code="AUTH_FAILED",
                target=user,
                outcome="denied",
                reason="wrong password",
            )
        else:
            fasten.emit(code="AUTH_LOGIN", target=user)


def administer(dice: random.Random) -> None:
    """
    Change something that somebody will ask about.
    """
    with fasten.bind(actor="admin", actor_kind="admin", method="ui"):
        match dice.randrange(3):
            case 0:
                fasten.emit(
                    code="USER_CREATED",
                    target=f"u-{dice.randrange(90, 99)}",
                    detail={"email": "a@ex.com", "password": "never stored"},
                )
            case 1:
                fasten.emit(
                    code="CONFIG_UPDATED",
                    target="shop/shipping",
                    reason="carrier strike",
                    detail={"before": {"carrier": "A"}, "after": {"carrier": "B"}},
                )
            case _:
                fasten.emit(code="ROLE_GRANTED", target="u-77", detail={"role": "ops"})


def sweep_stock() -> None:
    """
    Run the nightly job.
    """
    with fasten.bind(actor_kind="scheduler", method="scheduler"):
        fasten.emit(
            code="BATCH_PROCESSED", target="stock-count", detail={"items": 4211}
        )


def live_through(day: Day, dice: random.Random) -> str:
    """
    Let a day of traffic happen; return the request id of one order in it.
    """
    orders = []
    for second in moments(900, dice):
        day.skip_to(second)
        kind = dice.random()
        if kind < 0.45:
            orders.append(order(dice))
        elif kind < 0.95:
            visit(dice)
        elif kind < 0.99:
            administer(dice)
        else:
            sweep_stock()
    return orders[len(orders) // 2]


def show(*command: str) -> None:
    """
    Run a command as an operator would, and show both it and what it says.
    """
    print(f"\n$ {' '.join(command)}", flush=True)
    fasten_cli = Path(sys.executable).with_name("fasten")
    subprocess.run([fasten_cli, *command[1:]], check=True)


def main() -> None:
    """
    Record the day, then read it back.
    """
    os.environ.setdefault("NO_COLOR", "1")
    with tempfile.TemporaryDirectory(prefix="fasten-demo-") as directory:
        os.chdir(directory)
        os.environ |= {
            "FASTEN_SERVICE_ID": "shop",
            "FASTEN_NODE_ID": "host-01",
            "FASTEN_AUDIT_DSN": "sqlite:///./audit.db",
            "FASTEN_STDOUT": "",
        }
        day = Day()
        fasten.codes.registry.ensure()
        settings = Settings.from_env(os.environ, hostname="host-01", cwd=Path.cwd())
        install(Engine(settings, clock_ns=day))
        started = time.perf_counter()
        request_id = live_through(day, random.Random(7))
        fasten.flush()
        stats, seconds = fasten.stats(), time.perf_counter() - started
        print(
            f"a day of traffic: {stats['stored']} audit rows stored, "
            f"{stats['dropped']} dropped, in {seconds:.2f} s"
        )
        fasten.close()
        show("fasten", "tail", "--stream", "audit", "--limit", "12")
        show("fasten", "tail", "--stream", "audit", "--request-id", request_id)
        show("fasten", "doctor")


if __name__ == "__main__":
    main()
