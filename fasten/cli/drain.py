# SPDX-License-Identifier: Apache-2.0
"""
`drain`: deliver a spool by hand, or give the store rows again that it refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from fasten.cli.command import (
    FINDING,
    Command,
    Failure,
    NoAnswer,
    WrongUsage,
    say,
    write,
)
from fasten.cli.filters import output_option
from fasten.cli.hands import dsn_option, opened
from fasten.cli.text import counted, json_text, terminal_safe
from fasten.custody import Custody
from fasten.mending import Drained, Returned, give_back
from fasten.mending import drain as deliver
from fasten.settings import parse_duration

__all__ = ["drain"]


@click.command(
    cls=Command,
    epilog="Example: fasten drain --timeout 5m  # before an upgrade, or from cron",
)
@click.option(
    "--quarantine",
    is_flag=True,
    help="Give the store the rows again that it refused, once that is mended.",
)
@click.option(
    "--timeout",
    default="60s",
    show_default=True,
    metavar="DURATION",
    help="For how long to try.",
)
@dsn_option
@output_option("text", "json")
def drain(*, quarantine: bool, timeout: str, dsn: str | None, output: str) -> None:
    """
    Deliver what dead processes of this service left in the spool.

    Running processes deliver what is theirs. With --dsn rows that were meant for
    another store go there, too. Files that are of another service, or of a newer
    fasten, are named.
    """
    with opened(dsn) as custody:
        if quarantine:
            _give_back(custody, output)
            return
        into = custody.dsn if dsn is not None else None
        done = deliver(custody.settings, dsn=into, timeout_s=_seconds(timeout))
    write([json_text(_told(done))] if output == "json" else _lines(done))
    for leftover in done.left:
        say(f"left: {leftover.path}: {leftover.reason}")
    if done.fault:
        kind = NoAnswer if done.is_unreachable else Failure
        raise kind(f"rows are still in the spool: {done.fault}")
    if any(_is_ours(leftover.reason) for leftover in done.left):
        raise SystemExit(FINDING)


def _give_back(custody: Custody, output: str) -> None:
    done = give_back(custody)
    is_json = output == "json"
    write([json_text(_returned(done))] if is_json else _lines_returned(done))
    if done.refused:
        raise SystemExit(FINDING)


def _seconds(text: str) -> float:
    try:
        return float(parse_duration(text))
    except ValueError as error:
        raise WrongUsage(f"--timeout: {error}") from None


def _is_ours(reason: str) -> bool:
    # What belongs to another service is that one's to deliver.
    return not reason.startswith("rows of service")


def _told(done: Drained) -> dict[str, Any]:
    return {
        "rows": sum(done.rows.values()),
        "writers": [
            {"service": service, "node": node, "writer": writer, "rows": rows}
            for (service, node, writer), rows in sorted(done.rows.items())
        ],
        "quarantined": done.quarantined,
        "fault": done.fault or None,
        "left": [
            {"path": str(left.path), "reason": left.reason, "bytes": left.size}
            for left in done.left
        ],
    }


def _lines(done: Drained) -> Iterator[str]:
    for (service, node, writer), rows in sorted(done.rows.items()):
        place = terminal_safe(f"{service}/{node}")
        yield f"delivered {counted(rows, 'row')} of {place} (writer {writer[:8]})"
    if done.quarantined:
        yield f"refused and in quarantine: {counted(done.quarantined, 'row')}"
    yield f"delivered {counted(sum(done.rows.values()), 'row')} in all"


def _returned(done: Returned) -> dict[str, Any]:
    refused = [{"id": id_, "reason": reason} for id_, reason in done.refused]
    return {"stored": done.stored, "refused": refused}


def _lines_returned(done: Returned) -> Iterator[str]:
    for id_, reason in done.refused:
        yield f"still refused: {id_}: {terminal_safe(reason)}"
    yield f"stored {counted(done.stored, 'row')} out of quarantine"
