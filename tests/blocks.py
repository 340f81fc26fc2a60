# SPDX-License-Identifier: Apache-2.0
"""
Fenced code blocks of a Markdown file: found, run in order, their output compared.

The blocks of one section (`##`) share a folder and an environment, as they would
for a reader who types them one after the other. A comment before a block says
what else to do with it:

    <!-- not run: needs a broker -->   why it cannot run; its syntax is still checked
    <!-- file: app.py -->              it is the content of that file
    <!-- continues -->                 python that goes on from the python block before
    <!-- output -->                    what the block before prints; `...` for anything
"""

from __future__ import annotations

import ast
import doctest
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from tests.outside import ROOT

__all__ = ["Block", "BlockFailed", "Reader", "sections"]

TIMEOUT_S: Final = 60.0

_FENCE: Final = re.compile(r"^(?P<fence>`{3,}|~{3,})[ ]*(?P<language>[\w+-]*)\s*$")
_COMMENT: Final = re.compile(r"^<!--\s*(?P<verb>[a-z ]+?)(?::\s*(?P<text>.*?))?\s*-->$")
_COMMAND: Final = re.compile(r"((?:[^\n]*\\\n)*[^\n]*\n(?:> [^\n]*\n)*)(.*)", re.DOTALL)
_VERBS: Final = {"not run", "file", "continues", "output"}


class BlockFailed(AssertionError):
    """
    A block did not do what its page says; the message names file and line.
    """


class Block(NamedTuple):
    """
    One fenced block, with the comments right before it as *orders*.
    """

    place: str
    language: str
    text: str
    orders: Mapping[str, str]


def sections(page: Path) -> dict[str, list[Block]]:
    """
    Return the blocks of *page* by the title of their section.

    Raises:
        BlockFailed: a fence is not closed.
    """
    found: dict[str, list[Block]] = {}
    title = page.name
    orders: dict[str, str] = {}
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    for number, line in lines:
        if fence := _FENCE.match(line):
            place = f"{page.name}:{number}"
            text = _until_closed(lines, fence["fence"], place)
            block = Block(place, fence["language"], text, orders)
            found.setdefault(title, []).append(block)
            orders = {}
        elif (comment := _COMMENT.match(line)) and comment["verb"] in _VERBS:
            orders = {**orders, comment["verb"]: comment["text"] or ""}
        elif line.startswith("## "):
            title = line.removeprefix("## ").strip()
        elif line.strip():
            orders = {}
    return found


def _until_closed(lines: Iterator[tuple[int, str]], fence: str, place: str) -> str:
    text: list[str] = []
    for _, line in lines:
        if line.rstrip() == fence:
            return "".join(f"{each}\n" for each in text)
        text.append(line)
    raise BlockFailed(f"{place}: this block is never closed")


class Reader:
    """
    Somebody who does what a section says, in *folder*, block by block.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self._folder = folder
        # `fasten` and `python` are those of the suite, not of the system.
        programs = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
        self._environ = {**environ, "PATH": programs, "PYTHONPATH": str(ROOT)}
        self._python = ""
        self._printed = ""

    def follow(self, block: Block) -> None:
        """
        Do what *block* says, or check at least its syntax where it cannot run.

        Raises:
            BlockFailed: it failed, or printed something else than it shows.
        """
        if "not run" in block.orders:
            self._check(block)
        elif "file" in block.orders:
            target = self._folder / block.orders["file"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        elif "output" in block.orders:
            _compare(block, block.text, self._printed)
        else:
            self._run(block)

    def _run(self, block: Block) -> None:
        match block.language:
            case "python":
                self._run_python(block)
            case "sh" | "bash" | "shell":
                self._printed = self._run_shell(block, block.text)
            case "console":
                self._run_console(block)
            case _:
                self._check(block)

    def _run_python(self, block: Block) -> None:
        before = self._python if "continues" in block.orders else ""
        self._python = f"{before}{block.text}"
        self._printed = self._call(block, [sys.executable, "-c", self._python])

    def _run_shell(self, block: Block, commands: str) -> str:
        # What a block exports, and the folder it changes to, hold for the next.
        state = self._folder / ".environment"
        script = f"set -eu\n{commands}\nenv -0 > {shlex.quote(str(state))}\n"
        printed = self._call(block, ["bash", "-c", script])
        pairs = state.read_text(encoding="utf-8").split("\0")
        self._environ = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        state.unlink()
        return printed

    def _run_console(self, block: Block) -> None:
        for command, expected in _prompts(block):
            printed = self._run_shell(block, command)
            if expected:
                _compare(block, expected, printed)

    def _call(self, block: Block, command: list[str]) -> str:
        try:
            done = subprocess.run(
                command,
                cwd=self._folder,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise BlockFailed(
                f"{block.place}: not done after {TIMEOUT_S:g} s; name why it cannot "
                "run: <!-- not run: ... -->"
            ) from None
        if done.returncode:
            raise BlockFailed(
                f"{block.place}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def _check(self, block: Block) -> None:
        """
        Check what can be told of *block* without running it.
        """
        check = _CHECKS.get(block.language)
        if check is None:
            return
        try:
            check(block.text)
        except Exception as error:  # of whatever parser it was
            raise BlockFailed(
                f"{block.place}: not {block.language}: {error}"
            ) from error


def _prompts(block: Block) -> Iterator[tuple[str, str]]:
    """
    Split a console block into its commands and what each shows as printed.
    """
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        # A command goes on behind a backslash, and under the prompt `> `.
        match = _COMMAND.match(part)
        assert match
        # Lines of comment explain the output, to people.
        shown = re.sub(r"^#.*\n", "", match[2], flags=re.MULTILINE)
        yield re.sub(r"^> ", "", match[1], flags=re.MULTILINE), shown


def _compare(block: Block, expected: str, printed: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not doctest.OutputChecker().check_output(expected, printed, flags):
        raise BlockFailed(
            f"{block.place}: shown\n{expected}\nbut printed\n{printed}\n"
            "(`...` stands for anything)"
        )


def _check_shell(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    targets = re.findall(r"^(?:\$ )?make ([a-z-]+)", text, re.MULTILINE)
    for target in targets:
        subprocess.run(
            ["make", "-n", target], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )


def _check_console(text: str) -> None:
    block = Block("", "console", text, {})
    _check_shell("".join(command for command, _ in _prompts(block)))


def _check_python(text: str) -> None:
    compile(
        text, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
    )


def _check_yaml(text: str) -> None:
    import yaml  # here: few pages need it

    yaml.safe_load(text)


_CHECKS: Final[dict[str, Callable[[str], object]]] = {
    "bash": _check_shell,
    "console": _check_console,
    "json": json.loads,
    "python": _check_python,
    "sh": _check_shell,
    "shell": _check_shell,
    "toml": tomllib.loads,
    "yaml": _check_yaml,
}
