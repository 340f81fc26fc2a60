# SPDX-License-Identifier: Apache-2.0
"""
The `fasten` command: which commands there are, and nothing of what they do.

A command is a module of this package, or several of one kind are; naming it in
COMMANDS is all it takes. Modules load when they are asked for.
"""

from __future__ import annotations

import io
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import Final

import click

from fasten.cli.command import env_file

__all__ = ["COMMANDS", "main"]

COMMANDS: Final = {
    "checkpoint": "sign",
    "codes": "codes",
    "completion": "completion",
    "doctor": "doctor",
    "drain": "drain",
    "dump": "codes",
    "erase": "erase",
    "export": "export",
    "hold": "sweep",
    "init-db": "initdb",
    "keygen": "sign",
    "report": "report",
    "restored": "restored",
    "stats": "stats",
    "sweep": "sweep",
    "tail": "read",
    "trace": "read",
    "verify": "verify",
}
"""
Each command and the module that holds it, under its own name with `_` for `-`.
"""


class _Commands(click.Group):
    """
    A group whose commands are imported when they are asked for.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002
        cmd_name: str,
    ) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"fasten.cli.{COMMANDS[cmd_name]}")
        found: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = get_close_matches(args[0], COMMANDS, 1)
        if args[0] not in COMMANDS and near and not ctx.resilient_parsing:
            ctx.fail(f"no such command {args[0]!r}; did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)


@click.command(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    params=[env_file()],
    epilog="Exit codes: 0 ok, 1 a finding, 2 wrong usage, 3 cannot say (the store or "
    "reader is not reachable). Data goes to stdout, everything else to stderr.",
)
@click.version_option(package_name="fasten", prog_name="fasten")
def main() -> None:
    """
    Read, check and explain what fasten recorded.

    Settings come from FASTEN_* variables, as the service has them; --env-file reads
    them from a file.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name in another script than the terminal's is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
