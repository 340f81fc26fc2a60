# SPDX-License-Identifier: Apache-2.0
"""
`restored`: put on record that the store went back, and what is gone with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from fasten.chain import Restored
from fasten.cli.command import Command, say, write
from fasten.cli.filters import output_option
from fasten.cli.hands import dsn_option, opened
from fasten.cli.text import json_text, terminal_safe
from fasten.cli.verify import notes_in
from fasten.mending import restored as put_on_record
from fasten.proof import trusted

__all__ = ["restored"]


@click.command(
    cls=Command,
    epilog="Example: fasten restored --reason 'disk of db-1, backup of 03:00'",
)
@click.option("--reason", required=True, metavar="TEXT", help="Why; it is on record.")
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    metavar="FILE",
    help="What `fasten checkpoint` printed before: the store had those rows; may be "
    "repeated.",
)
@dsn_option
@output_option("text", "json")
def restored(
    *, reason: str, checkpoints: tuple[str, ...], dsn: str | None, output: str
) -> None:
    """
    Put on record (CHAIN_RESTORED) that the store went back, as after a restored backup.

    What is gone is known from the spool of this host and from checkpoints. No number
    is used twice, and `fasten verify` says `restored: n-m on record`. Services notice
    a restore by themselves and store again what they had delivered in the last 15
    minutes; this is for the rest.
    """
    notes = [note for path in checkpoints for note in notes_in(path)]
    with opened(dsn) as custody:
        verifiers = trusted(custody.settings)
        if notes and not verifiers:
            say("warning: no FASTEN_SIGNING_KEY: the checkpoints are taken on trust")
        lost = put_on_record(custody, reason, notes=notes, verifiers=verifiers)
    write([_json(lost)] if output == "json" else _lines(lost))


def _json(lost: Sequence[Restored]) -> str:
    return json_text({"restored": [one.detail() for one in lost]})


def _lines(lost: Sequence[Restored]) -> Iterator[str]:
    for one in lost:
        place = terminal_safe(f"{one.service_id}/{one.source_node_id}")
        yield f"restored: {one.from_seq}-{one.to_seq} of {place} on record"
    if not lost:
        yield "nothing is missing: no spool and no checkpoint knows of later rows"
