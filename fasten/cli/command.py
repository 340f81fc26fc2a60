# SPDX-License-Identifier: Apache-2.0
"""
What every command shares: --env-file, exit codes, errors as one line on stderr.

The grammar of the file is in `envfile`.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import click

from fasten.cli.envfile import EnvFileError, read_env_file
from fasten.cli.text import terminal_safe
from fasten.errors import (
    AuditStoreError,
    FastenError,
    InvalidQuery,
    MissingExtra,
    SettingsError,
)
from fasten.settings import Settings

__all__ = [
    "CANNOT_SAY",
    "FINDING",
    "OK",
    "USAGE",
    "Command",
    "Failure",
    "Group",
    "NoAnswer",
    "WrongUsage",
    "env_file",
    "is_coloured",
    "read_settings",
    "say",
    "write",
]

OK: Final = 0
"""Exit code: as it should be."""

FINDING: Final = 1
"""Exit code: something was found, or refused."""

USAGE: Final = 2
"""Exit code: the command line or a setting is wrong."""

CANNOT_SAY: Final = 3
"""Exit code: the store or reader is not reachable, so there is no answer."""


class Failure(click.ClickException):
    """
    End the command with one line on stderr: something was found, or refused.
    """

    exit_code = FINDING

    def show(self, file: IO[Any] | None = None) -> None:
        """
        Print the message, whatever it quotes, so that a terminal survives it.
        """
        lines = [terminal_safe(line) for line in self.message.split("\n")]
        click.echo("\n".join((f"Error: {lines[0]}", *lines[1:])), file=file, err=True)


class WrongUsage(Failure):
    """
    End the command: its words, or a setting, are wrong.
    """

    exit_code = USAGE


class NoAnswer(Failure):
    """
    End the command: whatever had to be asked is not there, or is something else.
    """

    exit_code = CANNOT_SAY


@contextmanager
def _errors_as_exits() -> Iterator[None]:
    try:
        yield
    except (InvalidQuery, SettingsError, EnvFileError) as error:
        raise WrongUsage(str(error)) from error
    except (AuditStoreError, MissingExtra) as error:
        raise NoAnswer(str(error)) from error
    except FastenError as error:
        raise Failure(str(error)) from error


class Command(click.Command):
    """
    A command that takes --env-file and turns fasten's errors into exit codes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(env_file())

    def invoke(self, ctx: click.Context) -> Any:
        """
        Run the command.
        """
        with _errors_as_exits():
            return super().invoke(ctx)


class Group(click.Group):
    """
    A group of such commands, as `fasten codes` is.
    """

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(env_file())


# --- the environment ------------------------------------------------------------------


def env_file() -> click.Option:
    """
    Make the option --env-file.
    """
    return click.Option(
        ["--env-file"],
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        multiple=True,
        is_eager=True,
        expose_value=False,
        callback=_load,
        help="Read FASTEN_* variables from this file; they win over the environment.",
    )


def _load(ctx: click.Context, _: click.Parameter, paths: tuple[Path, ...]) -> None:
    if ctx.resilient_parsing:
        return
    for path in paths:
        try:
            variables = read_env_file(path, os.environ)
        except EnvFileError as error:
            raise WrongUsage(str(error)) from error
        # Put back when the command ends: whoever calls it in process, as tests do,
        # keeps an environment of their own.
        ctx.call_on_close(_restorer({name: os.environ.get(name) for name in variables}))
        os.environ.update(variables)


def _restorer(before: dict[str, str | None]) -> Callable[[], None]:
    def restore() -> None:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    return restore


def read_settings(*, with_key: bool = False) -> Settings:
    """
    Read the environment as a service would; its name may be missing.

    The signing key is read by those that need it only: whoever looks at rows may not
    be allowed to read it, and `keygen` makes the file that its variable names already.

    Raises:
        SettingsError: names every variable that is unusable.
    """
    overrides = {} if os.environ.get("FASTEN_SERVICE_ID") else _UNNAMED
    if os.environ.get("FASTEN_SERVICE_ID_FILE"):
        overrides = {}
    unread = () if with_key else _KEY
    given = {name: text for name, text in os.environ.items() if name not in unread}
    settings = Settings.from_env(
        given, overrides, hostname=socket.gethostname(), cwd=Path.cwd()
    )
    for warning in settings.warnings:
        say(f"warning: {warning}")
    return settings


_UNNAMED: Final = {"service_id": "fasten"}
_KEY: Final = ("FASTEN_SIGNING_KEY", "FASTEN_SIGNING_KEY_FILE")


# --- output ---------------------------------------------------------------------------


def say(message: str) -> None:
    """
    Tell the operator something that is not data: on stderr.
    """
    click.echo(terminal_safe(message), err=True)


def write(lines: Iterable[str]) -> None:
    """
    Print data, line by line, as it comes.
    """
    coloured = is_coloured()
    for line in lines:
        click.echo(line, color=coloured)


def is_coloured() -> bool:
    """
    Tell whether stdout is a terminal that wants colours: https://no-color.org.
    """
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return sys.stdout.isatty()
