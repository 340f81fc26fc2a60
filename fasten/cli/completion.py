# SPDX-License-Identifier: Apache-2.0
"""
`completion`: the script that teaches a shell to complete fasten's commands.
"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from fasten.cli.command import Command, NoAnswer, write

__all__ = ["completion"]


@click.command(
    cls=Command,
    epilog='Example: eval "$(fasten completion bash)", or for fish: '
    "fasten completion fish > ~/.config/fish/completions/fasten.fish",
)
@click.argument("shell", type=click.Choice(["bash", "fish", "zsh"]))
def completion(shell: str) -> None:
    """
    Print the completion script for SHELL; it completes codes and anchors, too.
    """
    from fasten.cli import main

    kind = get_completion_class(shell)
    if kind is None:
        raise NoAnswer(f"this click knows no completion for {shell}")
    write(kind(main, {}, "fasten", "_FASTEN_COMPLETE").source().splitlines())
