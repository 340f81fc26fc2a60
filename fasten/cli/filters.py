# SPDX-License-Identifier: Apache-2.0
"""
The reader's filters, window and page as options, completed by the shell.

One set serves every stream; whether a value makes sense is for `Query.parse` to say.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, get_args

import click
from click.shell_completion import CompletionItem

from fasten import codes
from fasten.cli.command import say
from fasten.codes import ActorKind, Outcome, RetentionClass, Severity
from fasten.errors import FastenError
from fasten.rows import FILTERS, SHORT_FORMS, ReadingOrder

__all__ = [
    "ALL",
    "DEFAULT_LIMIT",
    "filter_options",
    "load_codes",
    "number_or_all",
    "output_option",
    "page_options",
    "window_options",
]

_HELP: Final = {
    "action": "WHAT, in a word: created, granted.",
    "actor": "WHO did it.",
    "actor_kind": "user, admin, service, system, scheduler or agent.",
    "category": "The code's category.",
    "client": "Where the caller came from.",
    "code": "WHAT was done, as in USER_CREATED.",
    "domain": "The code's domain.",
    "event": "The text of a log line.  [sys]",
    "id": "One row, by its id.",
    "level": "debug, info, warning, error or critical.  [sys]",
    "logger": "Who logged the line.  [sys]",
    "method": "HOW: http, mqtt, cli ...; of api rows GET, POST ...",
    "monotonic_seq": "The row's number on its node.",
    "on_behalf_of": "For whom the actor did it.",
    "origin_id": "The id the row was born with.",
    "outcome": "success, failure, denied or unknown.",
    "path": "The path of a request.  [api]",
    "reason": "WHY.",
    "request_id": "What belongs to one request, job or message.",
    "retention_class": "short, medium or long.",
    "route": "The route that matched.  [api]",
    "service_id": "The service that recorded it.",
    "severity": "debug, info, warn, error or critical.",
    "shipped_at": "When the row was shipped.",
    "source_node_id": "The node that recorded it.",
    "span_id": "The W3C span.",
    "status": "The HTTP status.  [api]",
    "stored_at": "When the store took the row.",
    "target": "WHOM it was done to.",
    "tenant_id": "The tenant.",
    "timestamp": "Exactly when.",
    "trace_id": "The W3C trace.",
    "wire_version": "The version of the row's form.",
}
_KINDS: Final[dict[str, type[StrEnum]]] = {
    "actor_kind": ActorKind,
    "outcome": Outcome,
    "retention_class": RetentionClass,
    "severity": Severity,
}

_Command = Callable[..., Any]
"""A command's function, on its way to become one."""


def filter_options(command: _Command) -> _Command:
    """
    Add an option for each filter of any stream.
    """
    names = sorted({name for stream in FILTERS.values() for name in stream})
    shorts = {long: short for short, long in SHORT_FORMS.items()}
    spellings = {
        name: [
            f"--{each}" for each in (shorts.get(name), name.replace("_", "-")) if each
        ]
        for name in names
    }
    options = (
        click.option(
            *spellings[name],
            name,
            metavar="TEXT",
            help=_HELP[name],
            shell_complete=_completer(name),
        )
        for name in names
    )
    return _with(command, options)


ALL: Final = 0
"""The limit that stands for no limit."""

DEFAULT_LIMIT: Final = 100
"""The limit where none is given, as in the reader."""


def number_or_all(text: str) -> int:
    """
    Read a number of rows; ALL for `all`.

    Raises:
        click.BadParameter: it is neither.
    """
    if text == "all":
        return ALL
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        raise click.BadParameter(f"{text[:80]!r} is not a number from 1, nor all")
    return int(text)


def window_options(command: _Command) -> _Command:
    """
    Add --since and --until.
    """
    return _with(command, _WINDOW)


def page_options(command: _Command) -> _Command:
    """
    Add what picks a page of the rows that match.
    """
    return _with(command, _PAGE)


def output_option(*outputs: str) -> Callable[[_Command], _Command]:
    """
    Add `-o`, with the first of *outputs* as its default.
    """
    return click.option(
        "-o",
        "--output",
        type=click.Choice(outputs),
        default=outputs[0],
        show_default=True,
        help="How to print it.",
    )


def _with(
    command: _Command, options: Iterable[Callable[[_Command], _Command]]
) -> _Command:
    # Options are listed in the order in which decorators stand: from the last one up.
    for option in reversed(list(options)):
        command = option(command)
    return command


_WINDOW: Final = (
    click.option(
        "--since", metavar="TIME", help="2026-04-20T12:00:00Z, or back from now: 2h."
    ),
    click.option("--until", metavar="TIME", help="Up to then, exclusive."),
)
_PAGE: Final = (
    click.option(
        "-n",
        "--limit",
        type=number_or_all,
        metavar="N|all",
        default=str(DEFAULT_LIMIT),
        show_default=True,
        help="How many rows: the newest.",
    ),
    click.option("--offset", metavar="N", help="Skip that many first."),
    click.option("--cursor", metavar="TEXT", help="Go on where a page ended."),
    click.option(
        "--order",
        type=click.Choice(get_args(ReadingOrder)),
        help="Page from the oldest or the newest row, or as they were stored: late "
        "ones last.",
    ),
    click.option("--count", is_flag=True, help="Print how many rows there are, only."),
    click.option("--q", metavar="TEXT", help="Text anywhere in a line.  [sys]"),
)


# --- completion -----------------------------------------------------------------------


def load_codes() -> None:
    """
    Register the codes that a service started here would: FASTEN_CODES, or the files
    of this directory.

    Raises:
        InvalidCodes: names every mistake in them.
    """
    with warnings.catch_warnings(record=True, action="always") as told:
        codes.registry.ensure()
        codes.load(*_codes_files())
    for warning in told:
        say(f"warning: {warning.message}")


def _codes_files() -> Iterable[str]:
    given = os.environ.get("FASTEN_CODES")
    if not given:
        return codes.discover(Path.cwd())
    named = (path.strip() for path in re.split(f"[,{os.pathsep}]", given))
    return [path for path in named if path]


def _completer(
    name: str,
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    def complete(
        _ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [
            CompletionItem(value)
            for value in sorted(set(_values(name)))
            if value.startswith(incomplete)
        ]

    return complete


def _values(name: str) -> Iterable[str]:
    if name in _KINDS:
        return [member.value for member in _KINDS[name]]
    if name not in ("action", "category", "code", "domain"):
        return ()
    with suppress(FastenError):  # a broken file: complete what is known
        load_codes()
    return [str(getattr(entry, name)) for entry in codes.registry.entries.values()]
