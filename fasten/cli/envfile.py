# SPDX-License-Identifier: Apache-2.0
"""
Files of variables, as `set -a; . ./.env; set +a` would read them.

Values may be secrets: no message here shows one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = ["EnvFileError", "parse_env", "read_env_file"]


class EnvFileError(ValueError):
    """
    A file of variables has a line that a shell would not take; names file and line.
    """


def read_env_file(path: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """
    Return the variables in the file at *path*.

    Raises:
        EnvFileError: it cannot be read, or a line is no `NAME=value`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise EnvFileError(f"cannot read {path}: {reason}") from None
    except UnicodeDecodeError:
        raise EnvFileError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    try:
        return parse_env(text, environ)
    except EnvFileError as error:
        raise EnvFileError(f"{path}, {error}") from None


_SKIP: Final = re.compile(r"(?:[ \t]*(?:#[^\n]*)?(?:\r?\n|\Z))+")
_NAME: Final = re.compile(r"[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)=")
_PIECE: Final = re.compile(
    r"'(?P<literal>[^']*)'"
    r'|"(?P<quoted>(?:[^"\\]|\\.)*)"'
    r"|\\(?P<escaped>[^\r\n])"
    r"|\\\r?\n"
    r"|\$(?P<name>[A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*\})"
    r"|(?P<bare>[^\s'\"\\$]+|\$)",
    re.DOTALL,
)
_INSIDE: Final = re.compile(
    r"\\(?P<escaped>[\"\\$`])|\\\r?\n"
    r"|\$(?P<name>[A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*\})"
    r"|(?P<bare>.)",
    re.DOTALL,
)
_END: Final = re.compile(r"[ \t]*(?:[ \t]#[^\n]*)?(?:\r?\n|\Z)")


def parse_env(text: str, environ: Mapping[str, str]) -> dict[str, str]:
    """
    Read `NAME=value` lines: quotes, comments, `export` and `$NAME` as in a shell.

    *environ* is what `$NAME` may refer to, beside the lines above.

    Raises:
        EnvFileError: a line is something else; a shell would run commands in it.
    """
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        skipped = _SKIP.match(text, at)
        if skipped and skipped.end() > at:
            at = skipped.end()
            continue
        match = _NAME.match(text, at)
        if match is None:
            raise _fault(text, at, "not NAME=value; a value ends with its line")
        value, at = _value(text, match.end(), match[1], {**environ, **found})
        found[match[1]] = value
    return found


def _value(text: str, at: int, name: str, known: Mapping[str, str]) -> tuple[str, int]:
    parts: list[str] = []
    start = at
    while match := _PIECE.match(text, at):
        at = match.end()
        if (quoted := match["quoted"]) is not None:
            pieces = _INSIDE.finditer(quoted)
            parts += [_expanded(piece, known, text, start, name) for piece in pieces]
        else:
            parts.append(_expanded(match, known, text, start, name))
    end = _END.match(text, at)
    if end is None:
        is_open = text[at] in "'\""
        cure = "a quote is not closed" if is_open else "put a value with blanks in ''"
        raise _fault(text, start, f"{name}: {cure}")
    return "".join(parts), end.end()


def _expanded(
    match: re.Match[str], known: Mapping[str, str], text: str, at: int, name: str
) -> str:
    groups = match.groupdict()
    if groups["name"] is None:
        plain = (groups.get("literal"), groups["escaped"], groups["bare"])
        return next((part for part in plain if part is not None), "")
    wanted = groups["name"].strip("{}")
    if wanted not in known:
        # The variable's name is not told: it may be the tail of a password.
        raise _fault(
            text,
            at,
            f"{name}: a $ refers to a variable that is not set; "
            "set it, or put the value in '' to keep the $",
        )
    return known[wanted]


def _fault(text: str, at: int, what: str) -> EnvFileError:
    line = text.count("\n", 0, at) + 1
    return EnvFileError(f"line {line}: {what}")
