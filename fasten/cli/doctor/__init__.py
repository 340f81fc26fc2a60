# SPDX-License-Identifier: Apache-2.0
"""
`doctor`: one line per check, in the order in which a service meets the things checked.

What is looked at, and how, is in the modules of this package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any, Final

import click

from fasten.cli.application import Application, app_option
from fasten.cli.command import FINDING, Command, is_coloured, write
from fasten.cli.doctor.environment import check_codes, check_environment
from fasten.cli.doctor.evidence import check_evidence
from fasten.cli.doctor.finding import Finding, Host, fail
from fasten.cli.doctor.journals import check_spool
from fasten.cli.doctor.outbox import check_outbox
from fasten.cli.doctor.stores import (
    check_clock,
    check_role,
    check_round_trip,
    check_store,
    check_streams,
)
from fasten.cli.doctor.wiring import check_application, check_reader
from fasten.cli.source import Store
from fasten.cli.text import json_text, paint, terminal_safe
from fasten.errors import AuditStoreError
from fasten.settings import Settings

__all__ = ["doctor"]

_MARKS: Final = {"ok": "\N{CHECK MARK}", "warn": "\N{WARNING SIGN}", "fail": "\u2717"}
_STYLES: Final = {
    "ok": {"fg": "green"},
    "warn": {"fg": "yellow"},
    "fail": {"fg": "red"},
}


@click.command(
    cls=Command,
    epilog="Example: fasten doctor --app shop.web:app",
)
@app_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def doctor(*, app: str | None, as_json: bool) -> None:
    """
    Try everything that a service here would need, and say what to mend.

    Connects, stores a sample row (AUDIT_SELF_TEST), reads it back, recomputes the
    chain, looks at spool, codes, clock and, with --app, at the application's wiring.
    Exits with 1 if a check fails.
    """
    findings = list(_findings(app, Host()))
    is_well = not any(finding.status == "fail" for finding in findings)
    write([_json(findings, is_well=is_well)] if as_json else _lines(findings))
    if not is_well:
        raise SystemExit(FINDING)


def _findings(app: str | None, host: Host) -> Iterator[Finding]:
    settings, found = check_environment(host)
    yield from found
    # Before the store: an application that does not import is the user's to mend.
    imported = None if app is None else Application(app)
    if settings is None:
        yield from check_codes()
        return
    # The first five lines are those that everybody knows; what explains them follows.
    reached, (first, *others) = check_store(settings, host)
    yield first
    yield from check_application(imported)
    if reached is not None:
        with closing(reached):
            yield from _of_store(settings, reached, host)
    yield from others
    yield from check_codes()
    directory, found = check_spool(settings, host)
    yield from found
    yield from check_streams(settings, host, directory)
    if reached is not None or settings.outbox_dsn is not None:
        yield from check_outbox(settings, host)
    yield from check_reader(settings, imported)


def _of_store(settings: Settings, reached: Store, host: Host) -> Iterator[Finding]:
    try:
        row, found = check_round_trip(settings, reached, host)
        yield from found
        yield from check_evidence(settings, reached)
        yield from check_role(reached)
        yield from check_clock(reached, row, host)
    except AuditStoreError as error:
        yield fail("store", str(error))


def _lines(findings: list[Finding]) -> Iterator[str]:
    coloured = is_coloured()
    for finding in findings:
        mark = _MARKS[finding.status]
        if coloured:
            mark = paint(mark, _STYLES[finding.status])
        told = "; ".join(filter(None, (finding.message, finding.cure)))
        yield f"{mark} {terminal_safe(told)}"


def _json(findings: list[Finding], *, is_well: bool) -> str:
    told: list[dict[str, Any]] = [
        {
            "check": finding.check,
            "status": finding.status,
            "message": finding.message,
            "cure": finding.cure or None,
        }
        for finding in findings
    ]
    return json_text({"ok": is_well, "checks": told})
