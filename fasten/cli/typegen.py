# SPDX-License-Identifier: Apache-2.0
"""
Source text from codes: typed functions for Python, constants for other languages.

Pure functions of a list of metas. Descriptions are prose by anybody: what they hold
never leaves its comment.
"""

from __future__ import annotations

import json
import keyword
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from fasten.cli.text import terminal_safe
from fasten.codes import Meta

__all__ = ["LANGUAGES", "generate"]


def generate(language: str, metas: Sequence[Meta]) -> str:
    """
    Return a source file that names each of *metas*, sorted by code.
    """
    known = sorted(metas, key=_code)
    return "\n".join(LANGUAGES[language](known)) + "\n"


def _code(meta: Meta) -> str:
    return str(meta.id)


def _prose(text: str) -> str:
    """
    Make a description safe in a comment or docstring of any language.

    No line ends, no backslash (line continuation in C++, escapes in Java and Python),
    no trigraph, no quote that could end a docstring.
    """
    flat = terminal_safe(" ".join(text.split()))
    return flat.replace("\\", "/").replace("??", "? ?").replace('"', "'").strip()


def _comment(meta: Meta) -> str:
    return _prose(meta.description) or f"{meta.domain}, {meta.severity.value}."


def _unique(metas: Sequence[Meta], spell: Callable[[str], str]) -> dict[str, str]:
    """
    Name each code by *spell*; those that would share a name get numbers.
    """
    taken: set[str] = set()
    names = {}
    for meta in metas:
        wanted = name = spell(_code(meta))
        number = 2
        while name in taken:
            name, number = f"{wanted}_{number}", number + 1
        taken.add(name)
        names[_code(meta)] = name
    return names


def _camel(code: str) -> str:
    return "".join(word.capitalize() for word in code.split("_"))


# --- Python ---------------------------------------------------------------------------

_PYTHON_TYPES: Final = {
    "str": "str",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "list": "list[Any]",
    "dict": "dict[str, Any]",
}
_TAKEN: Final = {"emit", "fasten"}
_PYTHON_HEAD: Final = '''\
# Made by `fasten codes typegen --lang python`. Do not edit: make it again.
"""
Each registered code as a function that emits it, and all of them as a type.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NotRequired, TypeAlias, TypedDict, Unpack
from uuid import UUID

import fasten

Target: TypeAlias = str | int | UUID


class Anchors(TypedDict, total=False):
    """
    What every row may say beside its code, target and detail.
    """

    actor: str | int | UUID | None
    actor_kind: str | None
    outcome: str
    method: str | None
    severity: str | None
    tenant_id: str | None
    on_behalf_of: str | None
    reason: str | None
    client: str | None
    connection: Any
'''


def _python(metas: Sequence[Meta]) -> Iterator[str]:
    yield _PYTHON_HEAD
    yield ""
    yield "Code: TypeAlias = Literal["
    yield from (f'    "{_code(meta)}",' for meta in metas)
    yield "]"
    yield ""
    yield "CODES: Final[tuple[Code, ...]] = ("
    yield from (f'    "{_code(meta)}",' for meta in metas)
    yield ")"
    names = _unique(metas, _python_name)
    classes = _unique(metas, lambda code: f"{_camel(code)}Detail")
    for meta in metas:
        code = _code(meta)
        if meta.detail is not None:
            yield from _python_class(classes[code], meta.detail)
        yield from _python_function(meta, names[code], classes[code])


def _python_name(code: str) -> str:
    name = code.lower()
    return f"{name}_" if keyword.iskeyword(name) or name in _TAKEN else name


def _python_class(name: str, detail: Mapping[str, str]) -> Iterator[str]:
    # Written as a call: a field's name may be no identifier.
    yield ""
    yield ""
    yield f"{name} = TypedDict("
    yield f'    "{name}",'
    yield "    {"
    for field, kind in detail.items():
        spelt = _PYTHON_TYPES[kind.removesuffix("?")]
        optional = f"NotRequired[{spelt}]" if kind.endswith("?") else spelt
        yield f"        {_quoted(field)}: {optional},"
    yield "    },"
    yield ")"


def _quoted(text: str) -> str:
    inner = ascii(text)[1:-1].replace("\\'", "'")
    if '"' in text and "'" not in text:
        return f"'{inner}'"  # as formatters have it: the fewer escapes
    return '"' + inner.replace('"', '\\"') + '"'


def _python_function(meta: Meta, name: str, class_: str) -> Iterator[str]:
    yield ""
    yield ""
    yield f"def {name}("
    yield "    target: Target,"
    yield "    *,"
    yield from (f"    {line}," for line in _python_detail(meta, class_))
    yield "    **anchors: Unpack[Anchors],"
    yield ") -> str:"
    yield '    """'
    yield f"    {_comment(meta)}"
    yield '    """'
    yield f'    return fasten.emit("{_code(meta)}", target, detail=detail, **anchors)'


def _python_detail(meta: Meta, class_: str) -> Iterator[str]:
    if meta.detail is None:
        yield "detail: Any = None"
    elif all(kind.endswith("?") for kind in meta.detail.values()):
        yield f"detail: {class_} | None = None"
    else:
        yield f"detail: {class_}"


# --- TypeScript -----------------------------------------------------------------------

_TS_TYPES: Final = {
    "str": "string",
    "int": "number",
    "float": "number",
    "bool": "boolean",
    "list": "unknown[]",
    "dict": "Record<string, unknown>",
}


def _typescript(metas: Sequence[Meta]) -> Iterator[str]:
    yield "// Made by `fasten codes typegen --lang typescript`. Do not edit."
    yield ""
    yield "export const Codes = {"
    for meta in metas:
        yield f"  // {_comment(meta)}"
        yield f'  {_code(meta)}: "{_code(meta)}",'
    yield "} as const;"
    yield ""
    yield "export type Code = keyof typeof Codes;"
    yield ""
    yield "/** What each code's `detail` holds. */"
    yield "export interface Details {"
    for meta in metas:
        yield f"  {_code(meta)}: {_ts_detail(meta)};"
    yield "}"


def _ts_detail(meta: Meta) -> str:
    if meta.detail is None:
        return "Record<string, unknown>"
    fields = (
        f"{json.dumps(field)}{'?' if kind.endswith('?') else ''}: "
        f"{_TS_TYPES[kind.removesuffix('?')]}"
        for field, kind in meta.detail.items()
    )
    return f"{{ {'; '.join(fields)} }}"


# --- Go, Rust, C++, Java --------------------------------------------------------------


def _go(metas: Sequence[Meta]) -> Iterator[str]:
    yield "// Code generated by `fasten codes typegen --lang go`. DO NOT EDIT."
    yield ""
    yield "// Package audit names the registered codes."
    yield "package audit"
    names = _unique(metas, lambda code: f"Code{_camel(code)}")
    for meta in metas:
        name = names[_code(meta)]
        yield ""
        yield f"// {name}: {_comment(meta)}"
        yield f'const {name} = "{_code(meta)}"'


def _rust(metas: Sequence[Meta]) -> Iterator[str]:
    yield "// Made by `fasten codes typegen --lang rust`. Do not edit."
    yield ""
    yield "//! The registered codes."
    yield ""
    yield "/// Every code."
    yield f"pub const CODES: [&str; {len(metas)}] = ["
    yield from (f"    code::{_code(meta)}," for meta in metas)
    yield "];"
    yield ""
    yield "/// One constant a code."
    yield "pub mod code {"
    for meta in metas:
        yield f"    /// {_comment(meta)}"
        yield f'    pub const {_code(meta)}: &str = "{_code(meta)}";'
    yield "}"


def _cpp(metas: Sequence[Meta]) -> Iterator[str]:
    # Named kLikeThis: a code in capitals may be somebody's macro (ERROR, DOMAIN).
    names = _unique(metas, lambda code: f"k{_camel(code)}")
    yield "// Made by `fasten codes typegen --lang cpp`. Do not edit. C++14."
    yield "#pragma once"
    yield ""
    yield "namespace fasten {"
    yield "namespace codes {"
    for meta in metas:
        yield ""
        yield f"// {_comment(meta)}"
        yield f'constexpr const char* {names[_code(meta)]} = "{_code(meta)}";'
    yield ""
    yield "}  // namespace codes"
    yield "}  // namespace fasten"


def _java(metas: Sequence[Meta]) -> Iterator[str]:
    yield "// Made by `fasten codes typegen --lang java`. Do not edit."
    yield ""
    yield "/** The registered codes. */"
    yield "public final class FastenCodes {"
    for meta in metas:
        yield f"    // {_comment(meta)}"
        yield f'    public static final String {_code(meta)} = "{_code(meta)}";'
        yield ""
    yield "    private FastenCodes() {}"
    yield "}"


LANGUAGES: Final[Mapping[str, Callable[[Sequence[Meta]], Iterator[str]]]] = {
    "cpp": _cpp,
    "go": _go,
    "java": _java,
    "python": _python,
    "rust": _rust,
    "typescript": _typescript,
}
"""What `--lang` takes."""
