# SPDX-License-Identifier: Apache-2.0
"""
`export`: rows as they are stored, in a file that proves itself.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import click

from fasten.chain import Signer
from fasten.cli.command import Command, WrongUsage, read_settings, say
from fasten.cli.filters import filter_options, output_option, window_options
from fasten.cli.hands import dsn_option
from fasten.cli.text import escaped, render
from fasten.cli.verify import audit_dsn, progress_bar
from fasten.custody import telling
from fasten.engine import audit_line
from fasten.proof import KEY_SHAPE
from fasten.rows import AUDIT_COLUMNS, Query
from fasten.settings import Settings
from fasten.upkeep import signers_of

if TYPE_CHECKING:
    from fasten.repository.exporting import Export

__all__ = ["export"]

_STEP: Final = 500


@click.command(
    cls=Command,
    epilog="Example: fasten export --to audit.ndjson && fasten verify audit.ndjson",
)
@output_option("ndjson", "csv")
@click.option(
    "--to",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write to this file, not to stdout.",
)
@click.option("--cursor", metavar="TEXT", help="Go on where an export ended.")
@window_options
@dsn_option
@filter_options
def export(
    *,
    output: str,
    to: Path | None,
    cursor: str | None,
    dsn: str | None,
    **given: Any,
) -> None:
    """
    Write the audit rows of one moment, every key included, by node and number.

    NDJSON ends with a checkpoint of each chain and the public key, where the service
    has one (FASTEN_SIGNING_KEY): `fasten verify FILE --key VKEY` then needs no store.
    With filters it is a selection, which no checkpoint can be held against. The cursor
    to go on from is told on stderr.
    """
    from fasten.repository.exporting import Export, decode_positions
    from fasten.repository.snapshot import snapshot

    settings = read_settings(with_key=True)
    place = audit_dsn(dsn, settings)
    query = Query.parse("audit", given, now_us=time.time_ns() // 1000)
    positions = decode_positions(cursor) if cursor else {}
    with telling(place), _opened(to) as file, snapshot(place) as moment:
        run = Export(moment, place, query, positions)
        try:
            _write_rows(run, output, file)
            if output == "ndjson" and run.is_whole:
                file.writelines(_proof(run, settings))
        finally:
            _tell_cursor(run)


@contextmanager
def _opened(to: Path | None) -> Iterator[IO[str]]:
    if to is None:
        yield sys.stdout
        return
    try:
        # CSV brings its own line ends.
        file = to.open("w", encoding="utf-8", newline="")
    except OSError as error:
        raise WrongUsage(f"{to} cannot be written: {error.strerror}") from None
    with file:
        yield file


def _write_rows(run: Export, output: str, file: IO[str]) -> None:
    with progress_bar("exporting", "rows") as progress:
        rows = _counted(run, progress)
        if output == "csv":
            lines = render(map(_row, rows), "csv", "audit")
        else:
            lines = (escaped(audit_line(row, with_salt=True)) for row in rows)
        file.writelines(f"{line}\n" for line in lines)


def _counted(run: Export, progress: Any) -> Iterator[tuple[Any, ...]]:
    total = run.total
    for number, row in enumerate(run.rows(), 1):
        yield row
        if number % _STEP == 0:
            progress(number, total)


def _row(columns: Sequence[Any]) -> dict[str, Any]:
    row = dict(zip(AUDIT_COLUMNS, columns, strict=True))
    with suppress(ValueError):  # edited: shown as it is
        row["detail"] = None if row["detail"] is None else json.loads(row["detail"])
    return {"shape": "audit", **row}


def _proof(run: Export, settings: Settings) -> Iterator[str]:
    signers: list[Signer] = signers_of(settings)
    for note in run.notes(signers, settings.service_id):
        yield _line({"shape": "checkpoint", "note": note})
    for signer in signers:
        yield _line({"shape": KEY_SHAPE, "vkey": signer.vkey})


def _line(said: dict[str, str]) -> str:
    return json.dumps(said, separators=(",", ":")) + "\n"


def _tell_cursor(run: Export) -> None:
    from fasten.repository.exporting import encode_positions

    if run.positions:
        say(f"go on later with --cursor {encode_positions(run.positions)}")
