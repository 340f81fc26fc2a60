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
    help="The outbox, in the database of FASTEN_OUTBOX_DSN (else the audit's).",
)
@click.option("--print-sql", is_flag=True, help="Print the SQL, and run nothing.")
@click.option("--dsn", metavar="DSN", help="Log in with this one: the owner's.")
@click.option(
    "--mover-role",
    default="",
    metavar="ROLE",
    help="The role of FASTEN_OUTBOX_DSN, which empties it.",
)
@click.option(
    "--writer-role",
    "writer_roles",
    multiple=True,
    metavar="ROLE",
    help="A role of your transactions, if another; may be repeated.",
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
    Make the outbox that `emit(connection=)` writes to, with the rights it needs.

    It may be run again: what is there stays.
    """
    if not outbox:
        raise WrongUsage("say which tables: --outbox")
    from fasten.repository.outbox import outbox_sql, run_script

    place = _place(dsn)
    sql = outbox_sql(place, mover=mover_role, writers=writer_roles)
    if print_sql:
        write(sql.splitlines())
        return
    run_script(place, sql)
    say(f"set up {place.display}")


def _place(dsn: str | None) -> Dsn:
    if dsn is not None:
        return parse_dsn(dsn, cwd=Path.cwd())
    settings = read_settings()
    found = settings.outbox_dsn or settings.audit_dsn
    if found is None:
        raise WrongUsage("no database is named; set FASTEN_OUTBOX_DSN, or give --dsn")
    return found
