# SPDX-License-Identifier: Apache-2.0
"""
Where to read: --dsn, --url and --token, or what the environment says.

What answers there is `source`'s.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from fasten.cli.command import WrongUsage, read_settings, say
from fasten.cli.source import Reader, Source, Store
from fasten.settings import Dsn, Settings, parse_dsn

__all__ = [
    "STREAMS",
    "open_source",
    "open_stores",
    "place_options",
    "reader_token",
    "refuse_both",
]

STREAMS: Final = ("audit", "sys", "api")
"""The three streams, in the order in which they are shown."""


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """
    Add what says where to read: --dsn, --url, --token.
    """
    for option in (
        click.option(
            "--token",
            metavar="TEXT",
            help="Who you are to the reader; better set FASTEN_READER_TOKEN, which "
            "`ps` does not show.",
        ),
        click.option(
            "--url",
            metavar="URL",
            help="Ask a service's reader, mounted there; a bare host means "
            "/api/v1/logs on it.",
        ),
        click.option(
            "--dsn", metavar="DSN", help="Read this store, not that of FASTEN_*_DSN."
        ),
    ):
        command = option(command)
    return command


def open_source(
    stream: str, *, dsn: str | None, url: str | None, token: str | None
) -> Source:
    """
    Return what answers for *stream*: the given place, or the environment's.

    Raises:
        WrongUsage: there is none.
        SettingsError: the DSN or a variable is unusable.
    """
    if url is not None:
        refuse_both(dsn)
        return Reader(url, reader_token(token), stream)
    if token is not None:
        raise WrongUsage(_NEEDS_URL)
    if dsn is not None:
        return Store(parse_dsn(dsn, cwd=Path.cwd(), table=f"{stream}_log"), stream)
    found = _dsn_of(read_settings(), stream)
    if found is None:
        raise WrongUsage(_nowhere(stream))
    return Store(found, stream)


_NEEDS_URL: Final = "--token goes with --url; a store is opened by its DSN"


def refuse_both(dsn: str | None) -> None:
    """
    See to it that --url does not come with --dsn.

    Raises:
        WrongUsage: it does.
    """
    if dsn is not None:
        raise WrongUsage("--dsn and --url exclude each other; give one")


def _dsn_of(settings: Settings, stream: str) -> Dsn | None:
    found: Dsn | None = getattr(settings, f"{stream}_dsn")
    return found


def _nowhere(stream: str) -> str:
    variable = f"FASTEN_{stream.upper()}_DSN"
    if stream == "audit":
        return f"{variable} is not set; set it, or give --dsn, --env-file or --url"
    return (
        f"{stream} rows are in the service's own memory as long as {variable} is not "
        "set; ask its reader with --url, or set it"
    )


def reader_token(given: str | None) -> str | None:
    """
    Return what --token says, or else the first token of the environment.

    Raises:
        SettingsError: the environment's is unusable.
    """
    if given is not None:
        return given
    names = ("FASTEN_READER_TOKEN", "FASTEN_READER_TOKEN_FILE")
    # By itself: what else is set here is the business of the service, not of a reader
    # somewhere else.
    found = {name: os.environ[name] for name in names if name in os.environ}
    settings = Settings.from_env(
        found, {"service_id": "fasten"}, hostname=socket.gethostname(), cwd=Path.cwd()
    )
    tokens = settings.reader_token
    return tokens[0].reveal() if tokens else None


def open_stores(dsn: str | None, token: str | None) -> dict[str, Store]:
    """
    Open each stream that has a store; say which have none.

    Raises:
        WrongUsage: none has.
    """
    if token is not None:
        raise WrongUsage(_NEEDS_URL)
    settings = read_settings()
    dsns = {stream: _dsn_of(settings, stream) for stream in STREAMS}
    if dsn is not None:
        dsns["audit"] = parse_dsn(dsn, cwd=Path.cwd())
    if not any(dsns.values()):
        raise WrongUsage(_nowhere("audit"))
    for stream, place in dsns.items():
        if place is None:
            say(_nowhere(stream))
    return {stream: Store(place, stream) for stream, place in dsns.items() if place}
