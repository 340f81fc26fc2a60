# SPDX-License-Identifier: Apache-2.0
"""
`init-db`: what an owner runs once in a database, printed or done.

The SQL is the repository's.
"""

from __future__ import annotations

from pathlib import Path

import click

from fasten.cli.command import Command, WrongUsage, read_settings, say, write
from fasten.settings import Dsn, parse_dsn

__all__ = ["init_db"]


@click.command(
    name="init-db",
    cls=Command,
    epilog="Example: fasten init-db --outbox --print-sql --writer-role shop | psql",
)
@click.option(
    "--outbox",
    is_flag=True,
    help="Only the outbox, in the database of FASTEN_OUTBOX_DSN (else the audit's).",
)
@click.option("--print-sql", is_flag=True, help="Print the SQL, and run nothing.")
@click.option("--dsn", metavar="DSN", help="Log in with this one: the owner's.")
@click.option(
    "--mover-role",
    default="",
    metavar="ROLE",
    help="With --outbox: the role of FASTEN_OUTBOX_DSN, which empties it.",
)
@click.option(
    "--writer-role",
    "writer_roles",
    multiple=True,
    metavar="ROLE",
    help="With --outbox: a role of your transactions, if another; may be repeated.",
)
def init_db(
    *,
    outbox: bool,
    print_sql: bool,
    dsn: str | None,
    mover_role: str,
    writer_roles: tuple[str, ...],
) -> None:
    """
    Make fasten's tables, with the rights that its roles need.

    It may be run again: what is there stays.
    """
    place = _place(dsn, outbox=outbox)
    if (mover_role or writer_roles) and not outbox:
        raise WrongUsage("--mover-role and --writer-role go with --outbox")
    sql = _sql(place, mover_role, writer_roles, outbox=outbox)
    if print_sql:
        write(sql.splitlines())
        return
    from fasten.repository.outbox import run_script

    run_script(place, sql)
    say(f"set up {place.display}")


def _place(dsn: str | None, *, outbox: bool) -> Dsn:
    if dsn is not None:
        return parse_dsn(dsn, cwd=Path.cwd())
    settings = read_settings()
    found = (settings.outbox_dsn if outbox else None) or settings.audit_dsn
    if found is None:
        name = "FASTEN_OUTBOX_DSN" if outbox else "FASTEN_AUDIT_DSN"
        raise WrongUsage(f"no database is named; set {name}, or give --dsn")
    return found


def _sql(dsn: Dsn, mover: str, writers: tuple[str, ...], *, outbox: bool) -> str:
    if outbox:
        from fasten.repository.outbox import outbox_sql

        return outbox_sql(dsn, mover=mover, writers=writers)
    from fasten.repository.roles import init_sql

    return init_sql(dsn)
