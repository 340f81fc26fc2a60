# SPDX-License-Identifier: Apache-2.0
"""
`sweep` and `hold`: what has expired goes, what is held stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from fasten.cli.command import Command, Group, WrongUsage, say, write
from fasten.cli.filters import output_option
from fasten.cli.hands import dsn_option, opened
from fasten.cli.text import counted, json_text, plain, short_time, terminal_safe
from fasten.cli.verify import progress_bar

if TYPE_CHECKING:
    from fasten.repository.holds import Hold
    from fasten.repository.pruning import Sweep

__all__ = ["hold", "sweep"]


@click.command(cls=Command, epilog="Example: fasten sweep --dry-run")
@click.option(
    "--dry-run", is_flag=True, help="Count what would go, and change nothing."
)
@click.option(
    "--now",
    is_flag=True,
    help="Let shorter periods hold at once, without FASTEN_RETENTION_GRACE.",
)
@dsn_option
@output_option("text", "json")
def sweep(*, dry_run: bool, now: bool, dsn: str | None, output: str) -> None:
    """
    Delete the rows of this service that have expired, of all three streams.

    From the front of each chain, in steps of 10,000 rows; it may be killed at any
    point. One RETENTION_SWEEP_RAN row tells what went.
    """
    with opened(dsn) as custody, progress_bar("sweeping", "rows") as progress:
        done = custody.sweep(is_forced=now, is_dry=dry_run, progress=progress)
    for right in done.missing:
        say(f"warning: missing right: {right}")
    write([json_text(_told(done))] if output == "json" else _lines(done))


def _told(done: Sweep) -> dict[str, Any]:
    names = ("deleted", "by_class", "erased", "held", "streams")
    return {name: getattr(done, name) for name in names} | {"dry_run": done.is_dry}


def _lines(done: Sweep) -> Iterator[str]:
    verb = "would delete" if done.is_dry else "deleted"
    classes = ", ".join(f"{n} {name}" for name, n in sorted(done.by_class.items()))
    audit = counted(done.deleted, "audit row")
    yield f"{verb} {audit}" + (f": {classes}" if classes else "")
    for name, number in done.streams.items():
        yield f"{verb} {counted(number, f'{name} row')}"
    if done.held:
        yield f"stopped by a legal hold: {counted(done.held, 'chain')}"
    if done.erased:
        yield f"erased {counted(done.erased, 'expired row')} behind it"


# --- holds ----------------------------------------------------------------------------


@click.group(cls=Group)
def hold() -> None:
    """
    Keep rows from being deleted or erased, whatever their age.
    """


@hold.command(epilog="Example: fasten hold add --target ord-9001 --reason 'case 12/26'")
@click.option("--target", metavar="TEXT", help="Rows about this target.")
@click.option("--actor", metavar="TEXT", help="Rows of this actor.")
@click.option("--code", metavar="CODE", help="Rows with this code.")
@click.option("--reason", required=True, metavar="TEXT", help="Why; shown by `list`.")
@dsn_option
def add(*, reason: str, dsn: str | None, **given: str | None) -> None:
    """
    Put a legal hold on rows, those to come included; print its id.
    """
    named = [(field, value) for field, value in given.items() if value]
    if len(named) != 1:
        raise WrongUsage("give one of --target, --actor and --code")
    ((field, value),) = named
    with opened(dsn, is_of_service=False) as custody:
        made = custody.hold(field, value, reason)
    write([made.id])


@hold.command(epilog="Example: fasten hold remove 5f3a09c1")
@click.argument("hold_id", metavar="ID")
@dsn_option
def remove(*, hold_id: str, dsn: str | None) -> None:
    """
    Lift a legal hold: what has expired meanwhile goes with the next sweep.
    """
    with opened(dsn, is_of_service=False) as custody:
        lifted = custody.lift(hold_id)
    write([_line(lifted)])


@hold.command(name="list", epilog="Example: fasten hold list -o json")
@dsn_option
@output_option("text", "json")
def list_(*, dsn: str | None, output: str) -> None:
    """
    Print the legal holds in force, oldest first.
    """
    with opened(dsn, is_of_service=False) as custody:
        found = custody.holds()
    if output == "json":
        write([json_text([each.to_dict() for each in found])])
    else:
        write(map(_line, found))


def _line(each: Hold) -> str:
    what = f"{each.field}={plain(each.value)}" if each.field else "everything"
    return (
        f"{terminal_safe(each.id)}  {short_time(each.at)}  {what}  "
        f"by={plain(each.by)}  reason={plain(each.reason)}"
    )
