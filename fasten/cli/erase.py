# SPDX-License-Identifier: Apache-2.0
"""
`erase`: a subject's fields go, wherever fasten can reach them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click

from fasten.chain import COMMITTED_FIELDS
from fasten.cli.command import FINDING, Command, WrongUsage, say, write
from fasten.cli.filters import output_option
from fasten.cli.hands import dsn_option, opened
from fasten.cli.text import counted, json_text, terminal_safe
from fasten.cli.verify import progress_bar
from fasten.custody import Custody
from fasten.errors import InvalidAnchor
from fasten.forgetting import Erasing, Forgetting

__all__ = ["erase"]

_MOST_NAMED: Final = 20


@click.command(
    cls=Command,
    epilog="Example: fasten erase --actor u-42 --reason 'GDPR request 7' --dry-run",
)
@click.option("--actor", metavar="TEXT", help="Rows of this actor.")
@click.option("--target", metavar="TEXT", help="Rows about this target.")
@click.option("--id", "row_id", metavar="ID", help="One row.")
@click.option(
    "--fields",
    metavar="LIST",
    default="",
    help=f"Which fields, of {','.join(COMMITTED_FIELDS)}; by default the one asked for "
    "and detail, with --id all.",
)
@click.option("--reason", metavar="TEXT", help="Why; stands in AUDIT_ROW_ERASED.")
@click.option("--dry-run", is_flag=True, help="Count the rows, and change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--ledger",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append to this file what can be erased again after a restore; without a "
    "subject, erase what it tells.",
)
@dsn_option
@output_option("text", "json")
def erase(
    *,
    actor: str | None,
    target: str | None,
    row_id: str | None,
    fields: str,
    reason: str | None,
    dry_run: bool,
    yes: bool,
    ledger: Path | None,
    dsn: str | None,
    output: str,
) -> None:
    """
    Erase fields of a subject's rows; the chain stays valid.

    Rows that wait in spools and outbox are met on their way. Waits 35 s for the
    service's processes to remove their files, and names those that have not. A second
    run finds nothing.
    """
    subject = _subject({"actor": actor, "target": target, "id": row_id}, ledger)
    if subject is not None and reason is None:
        raise WrongUsage("--reason is missing: it stands in the record of the erasure")
    named = [name.strip() for name in fields.split(",") if name.strip()]
    if not (dry_run or yes):
        _ask(subject, ledger)
    with opened(dsn) as custody:
        done = _erase(custody, subject, reason or "", named, ledger, is_dry=dry_run)
    write([json_text(_told(done))] if output == "json" else _lines(done))
    if not done.is_complete:
        raise SystemExit(FINDING)


def _subject(
    given: dict[str, str | None], ledger: Path | None
) -> tuple[str, str] | None:
    named = [(field, value) for field, value in given.items() if value]
    if not named and ledger is not None:
        return None
    if len(named) != 1:
        raise WrongUsage("give one of --actor, --target and --id")
    return named[0]


def _ask(subject: tuple[str, str] | None, ledger: Path | None) -> None:
    if not sys.stdin.isatty():
        raise WrongUsage("nobody is here to ask; give --yes, or --dry-run to count")
    what = f"{subject[0]} {subject[1]!r}" if subject else f"what {ledger} tells"
    click.confirm(terminal_safe(f"Erase {what}, for good?"), abort=True, err=True)


def _erase(
    custody: Custody,
    subject: tuple[str, str] | None,
    reason: str,
    fields: list[str],
    ledger: Path | None,
    *,
    is_dry: bool,
) -> Erasing:
    with progress_bar("erasing", "rows") as progress:
        try:
            if subject is None and ledger is not None:
                return Forgetting(custody).apply_ledger(ledger, progress=progress)
            return Forgetting(custody).erase(
                subject or ("", ""),
                reason,
                fields=fields,
                is_dry=is_dry,
                ledger=ledger,
                progress=progress,
            )
        except InvalidAnchor as error:
            raise WrongUsage(f"--fields: {error}") from None
        except OSError as error:
            raise WrongUsage(f"--ledger: {error.strerror}") from None


# --- what is printed ------------------------------------------------------------------


def _told(done: Erasing) -> dict[str, Any]:
    names = ("rows", "by_class", "held", "damaged", "lagging", "remains", "unreached")
    told = {name: getattr(done, name) for name in names}
    return {**told, "complete": done.is_complete, "dry_run": done.is_dry}


def _lines(done: Erasing) -> Iterator[str]:
    classes = ", ".join(f"{n} {name}" for name, n in sorted(done.by_class.items()))
    verb = "would erase" if done.is_dry else "erased"
    yield f"{verb} {counted(done.rows, 'row')}" + (f": {classes}" if classes else "")
    for message, items in (
        ("under a legal hold, left as it is: ", done.held),
        ("its salt is damaged, left as it is: ", done.damaged),
        ("has not followed, and may hold a file: ", done.lagging),
        ("is not clear yet: ", done.remains),
    ):
        for item in items[:_MOST_NAMED]:
            yield f"{message}{terminal_safe(item)}"
        if len(items) > _MOST_NAMED:
            yield f"... and {len(items) - _MOST_NAMED} more"
    for place in done.unreached:
        say(f"not reached: {place}")
