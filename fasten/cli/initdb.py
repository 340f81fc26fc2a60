# SPDX-License-Identifier: Apache-2.0
"""
`init-db`: what an owner runs once in a database, printed or done.

The SQL is the repository's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from fasten.cli.command import Command, WrongUsage, read_settings, say, write
from fasten.cli.hands import opened
from fasten.cli.verify import audit_dsn
from fasten.settings import Dsn, parse_dsn

__all__ = ["init_db"]


@click.command(
    name="init-db",
    cls=Command,
    epilog="Example: fasten init-db --print-sql | psql, or: "
    "fasten init-db --outbox --print-sql --writer-role shop | psql",
)
@click.option(
    "--outbox",
    is_flag=True,
    help="Only the outbox, in the database of FASTEN_OUTBOX_DSN (else the audit's).",
)
@click.option(
    "--stream",
    type=click.Choice(["audit", "sys", "api"]),
    default="audit",
    show_default=True,
    help="Whose table: sys and api have one where FASTEN_SYS_DSN, FASTEN_API_DSN say.",
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
    stream: Literal["audit", "sys", "api"],
    print_sql: bool,
    dsn: str | None,
    mover_role: str,
    writer_roles: tuple[str, ...],
) -> None:
    """
    Make the tables of the audit store, or the outbox of `emit(connection=)`.

    It may be run again: what is there stays. On Postgres --print-sql adds to the tables
    the roles fasten_owner, fasten_app, fasten_reader and fasten_retention, and the
    functions and triggers that let them do just what they have to. SQLite has no roles:
    its triggers stop slips, and whoever can write to the file can drop them.
    """
    if outbox and stream != "audit":
        raise WrongUsage("--outbox and --stream exclude each other; give one")
    if not outbox and (mover_role or writer_roles):
        raise WrongUsage("--mover-role and --writer-role are about the --outbox")
    if outbox:
        _outbox(dsn, mover_role, writer_roles, print_sql=print_sql)
    elif stream == "audit":
        _store(dsn, print_sql=print_sql)
    else:
        _stream(dsn, stream, print_sql=print_sql)


def _outbox(
    dsn: str | None, mover_role: str, writer_roles: tuple[str, ...], *, print_sql: bool
) -> None:
    from fasten.repository.outbox import outbox_sql, run_script

    place = _place(dsn, "outbox")
    sql = outbox_sql(place, mover=mover_role, writers=writer_roles)
    if print_sql:
        write(sql.splitlines())
        return
    run_script(place, sql)
    say(f"set up {place.display}")


def _stream(dsn: str | None, stream: Literal["sys", "api"], *, print_sql: bool) -> None:
    from fasten.repository.roles import stream_sql
    from fasten.repository.stream import StreamRepository

    place = _place(dsn, stream)
    if print_sql:
        write(stream_sql(place, stream).splitlines())
        return
    StreamRepository(place, stream).schema.ensure()
    say(f"set up {place.display}")


def _store(dsn: str | None, *, print_sql: bool) -> None:
    from fasten.repository.roles import init_sql

    place = audit_dsn(dsn, read_settings())
    if print_sql:
        write(init_sql(place).splitlines())
        return
    with opened(dsn, is_of_service=False) as custody:
        custody.set_up()
    say(f"set up {place.display}")


def _place(dsn: str | None, what: str) -> Dsn:
    if dsn is not None:
        table = "audit_log" if what == "outbox" else f"{what}_log"
        return parse_dsn(dsn, cwd=Path.cwd(), table=table)
    settings = read_settings()
    found: Dsn | None = getattr(settings, f"{what}_dsn")
    if found is None and what == "outbox":
        found = settings.audit_dsn
    if found is None:
        variable = f"FASTEN_{what.upper()}_DSN"
        raise WrongUsage(f"no database is named; set {variable}, or give --dsn")
    return found
