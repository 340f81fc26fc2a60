# SPDX-License-Identifier: Apache-2.0
"""
`verify`: what a store or an export proves, said in lines and an exit code.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import click

from fasten.chain import Verifier
from fasten.cli.command import (
    Command,
    NoAnswer,
    WrongUsage,
    is_coloured,
    read_settings,
    say,
    write,
)
from fasten.cli.filters import output_option
from fasten.cli.text import counted, json_text, paint, terminal_safe
from fasten.errors import MissingExtra
from fasten.evidence import Report
from fasten.proof import (
    KEY_SHAPE,
    bundled,
    read_keys,
    read_notes,
    trusted,
    verify_file,
    verify_store,
)
from fasten.settings import Dsn, Settings, parse_dsn

__all__ = ["audit_dsn", "notes_in", "progress_bar", "verify"]

_STYLES: Final = {"ok": "green", "unverifiable": "yellow"}


@click.command(
    cls=Command,
    epilog="Example: fasten verify --checkpoint monday.note --key shop.vkey",
)
@click.argument("file", required=False, metavar="[FILE.ndjson]")
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    metavar="FILE",
    help="Hold the rows against what `fasten checkpoint` printed; may be repeated.",
)
@click.option(
    "--key",
    "keys",
    multiple=True,
    metavar="VKEY",
    help="A public key that checkpoints are signed by, or a file of them; without it, "
    "that of FASTEN_SIGNING_KEY.",
)
@click.option(
    "--require-anchor",
    is_flag=True,
    help="Say `unverifiable` of a chain that no checkpoint holds.",
)
@click.option("--dsn", metavar="DSN", help="Verify this store, not FASTEN_AUDIT_DSN.")
@output_option("text", "json")
def verify(
    *,
    file: str | None,
    checkpoints: tuple[str, ...],
    keys: tuple[str, ...],
    require_anchor: bool,
    dsn: str | None,
    output: str,
) -> None:
    """
    Recompute every row, link and checkpoint of a store, or of an export.

    Exits with 0 if all is well, 1 if rows were changed (tampered), cut from the end
    (truncated) or are gone (missing), 3 if it cannot be told (unverifiable, or no
    store).
    """
    if file is not None and dsn is not None:
        raise WrongUsage("FILE is verified, or the store at --dsn: give one")
    settings = read_settings(with_key=not keys)
    given: dict[str, Any] = {
        "given": [note for path in checkpoints for note in notes_in(path)],
        "verifiers": _verifiers(keys, settings),
        "require_anchor": require_anchor,
    }
    if file is not None:
        report = _verify_file(file, given)
    else:
        with progress_bar("verifying", "rows") as progress:
            report = verify_store(audit_dsn(dsn, settings), progress=progress, **given)
    write([_json(report)] if output == "json" else _lines(report))
    if not report.ok:
        raise SystemExit(report.exit_code)


def audit_dsn(given: str | None, settings: Settings) -> Dsn:
    """
    Return the audit store that is meant.

    Raises:
        WrongUsage: there is none.
    """
    if given is not None:
        return parse_dsn(given, cwd=Path.cwd())
    if settings.audit_dsn is None:
        raise WrongUsage(
            "FASTEN_AUDIT_DSN is not set; set it, or give --dsn or --env-file"
        )
    return settings.audit_dsn


def notes_in(path: str) -> list[str]:
    """
    Return the checkpoints in a file of --checkpoint.

    Raises:
        WrongUsage: there are none.
    """
    try:
        return read_notes(Path(path))
    except (OSError, ValueError) as error:
        raise WrongUsage(f"--checkpoint {path}: {_said(error)}") from None


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _verifiers(keys: tuple[str, ...], settings: Settings) -> list[Verifier]:
    if not keys:
        return trusted(settings)
    try:
        return [found for key in keys for found in read_keys(key)]
    except MissingExtra:
        raise
    except (OSError, ValueError) as error:
        raise WrongUsage(f"--key: {_said(error)}") from None


def _verify_file(file: str, given: dict[str, Any]) -> Report:
    with _at_hand(file) as path, progress_bar("verifying", "bytes") as progress:
        try:
            report = verify_file(path, progress=progress, **given)
            keys = [text for shape, text in bundled(path) if shape == KEY_SHAPE]
        except OSError as error:
            raise NoAnswer(f"{file} cannot be read: {error.strerror}") from None
    if keys and not given["verifiers"]:
        say(
            "the file names keys that signed it; compare them with what the service "
            "told you, then give --key:"
        )
        for key in sorted(set(keys)):
            say(f"  {key}")
    return report


@contextmanager
def _at_hand(file: str) -> Iterator[Path]:
    """
    Yield the path of what is verified: stdin is read twice, so it is kept.
    """
    if file != "-":
        yield Path(file)
        return
    with tempfile.NamedTemporaryFile(suffix=".ndjson") as kept:
        shutil.copyfileobj(sys.stdin.buffer, kept)
        kept.flush()
        yield Path(kept.name)


# --- what is printed ------------------------------------------------------------------


def _lines(report: Report) -> Iterator[str]:
    verdict = terminal_safe(report.verdict)
    if is_coloured():
        verdict = paint(verdict, {"fg": _STYLES.get(report.status, "red")})
    chains = counted(len(report.chains), "chain")
    yield f"{verdict} ({counted(report.rows, 'row')}, {chains})"
    for finding in report.findings:
        yield f"  {terminal_safe(finding)}"
    for chain in report.chains:
        yield f"  {terminal_safe(chain)}"
    if report.dropped or report.quarantined:
        yield (
            f"  on record: {counted(report.dropped, 'row')} dropped, "
            f"{report.quarantined} quarantined"
        )


def _json(report: Report) -> str:
    told = {
        "status": report.status,
        "verdict": report.verdict,
        "rows": report.rows,
        "anchored": report.is_anchored,
        "dropped": report.dropped,
        "quarantined": report.quarantined,
        "findings": [attrs.asdict(finding) for finding in report.findings],
        "chains": [
            {**attrs.asdict(chain), "unanchored": chain.unanchored}
            for chain in report.chains
        ],
        "restored": [said.detail() for said in report.restored],
    }
    return json_text(told)


@contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """
    Show how far long work is: on stderr, if somebody is there to see it.

    What is yielded takes what is done, and about how much there is.
    """
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    with click.progressbar(
        length=1,
        label=f"{label} {unit}",
        file=sys.stderr,
        show_pos=True,
        update_min_steps=1,
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.length = max(1, total, done)
            bar.update(done - bar.pos)

        yield progress
