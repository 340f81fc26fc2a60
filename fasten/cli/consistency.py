# SPDX-License-Identifier: Apache-2.0
"""
Whether codes agree: an older list with a newer one, and a program with its list.

Values and source texts in, findings out. Reading files of codes is `fasten.codes`'s,
but for what `fasten dump` prints, in any language.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs

from fasten.cli.command import WrongUsage
from fasten.codes import Meta, Registry, RetentionClass, Severity

__all__ = ["Change", "Literal", "changes", "literal_codes", "read_codes", "sources"]

Known = Mapping[str, Mapping[str, object]]
"""What is known of each code; a dump knows less than a codes file."""


@attrs.frozen
class Change:
    """
    One difference between two lists; *is_finding* where something was taken away.
    """

    kind: str
    code: str
    what: str = ""

    @property
    def is_finding(self) -> bool:
        """
        Tell whether somebody may rely on what is no longer there.
        """
        return self.kind != "added"


# --- reading --------------------------------------------------------------------------

_DUMPED: Final = re.compile(r"([A-Z][A-Z0-9_]*),([^,\s]+),([a-z]+)")


def read_codes(path: Path) -> Known:
    """
    Read a codes file, over the standard catalogue, or what `fasten dump` printed.

    Raises:
        WrongUsage: the file cannot be read.
        InvalidCodes: it is a codes file with mistakes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise WrongUsage(f"cannot read {path}: {reason}") from None
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    dumped = [_DUMPED.fullmatch(line.strip()) for line in lines]
    found = [match for match in dumped if match]
    if lines and len(found) == len(lines):
        return {m[1]: {"domain": m[2], "severity": m[3]} for m in found}
    registry = Registry()
    registry.ensure()
    registry.load(path)
    return {code: _known(registry.meta(code)) for code in registry.entries}


def _known(meta: Meta) -> Mapping[str, object]:
    names = ("domain", "category", "action", "severity", "retention_class")
    known: dict[str, object] = {name: getattr(meta, name) for name in names}
    known |= {name: getattr(meta, name) for name in ("pii_in_detail", "on_failure")}
    return {**known, "detail": meta.detail}


# --- comparing ------------------------------------------------------------------------

_RISING: Final[Mapping[str, tuple[object, ...]]] = {
    "severity": tuple(Severity),
    "retention_class": tuple(RetentionClass),
    "pii_in_detail": (False, True),
    "on_failure": ("queue", "raise"),
}
"""What may grow but not shrink, in its order."""


def changes(old: Known, new: Known) -> list[Change]:
    """
    Return what differs, by code; what is known of one side only is not compared.
    """
    found = [Change("removed", code) for code in old if code not in new]
    found += [Change("added", code) for code in new if code not in old]
    for code in old.keys() & new.keys():
        found += [Change("narrowed", code, w) for w in _narrowed(old[code], new[code])]
    return sorted(found, key=lambda change: (change.code, change.what))


def _narrowed(old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[str]:
    for name in old.keys() & new.keys() - {"detail"}:
        before, after = old[name], new[name]
        order = _RISING.get(name)
        if before == after:
            continue
        if order is None or _place(order, after) < _place(order, before):
            yield f"{name}: {_spelt(before)} -> {_spelt(after)}"
    if "detail" in old and "detail" in new:
        yield from _narrower_detail(old["detail"], new["detail"])


def _place(order: tuple[object, ...], value: object) -> int:
    return order.index(value) if value in order else -1


def _spelt(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _narrower_detail(old: object, new: object) -> Iterator[str]:
    """
    Say what a reader can no longer rely on, or a writer must send from now on.
    """
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        if old is None and new is not None:
            yield "detail: anything -> declared fields only"
        elif old is not None and new is None:
            yield "detail: declared fields -> anything"
        return
    for field, before in old.items():
        after = new.get(field)
        if after is None:
            yield f"detail.{field}: {before} -> removed"
        elif after not in (before, _WIDER.get(before)):
            yield f"detail.{field}: {before} -> {after}"
    for field, after in new.items():
        if field not in old and not str(after).endswith("?"):
            yield f"detail.{field}: absent -> required"


_WIDER: Final = {"int": "float", "int?": "float?"}
"""Every int is a float as well; a field that turns optional is another matter."""


# --- literal codes in a program -------------------------------------------------------

_SKIPPED: Final = {"node_modules", "site-packages", "__pycache__", "tests", "test"}
_EMITS: Final = ("emit", "aemit")


@attrs.frozen
class Literal:
    """
    A code that is written out in a source file.
    """

    path: Path
    line: int
    code: str


def sources(root: Path) -> Iterator[Path]:
    """
    Yield the Python files below *root*, without tests and other people's packages.
    """
    for path in sorted(root.iterdir()):
        name = path.name
        if path.is_dir():
            is_skipped = name in _SKIPPED or name.startswith(".")
            if not is_skipped and not (path / "pyvenv.cfg").exists():
                yield from sources(path)
        elif path.suffix == ".py" and not name.startswith(("test_", "conftest")):
            yield path


def literal_codes(path: Path) -> Iterator[Literal]:
    """
    Yield the codes that a file hands to fasten's emit, or to a shim's `code=`.

    Raises:
        SyntaxError: it is no Python of this version.
    """
    tree = ast.parse(path.read_bytes(), str(path))
    names = _Names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for value in _code_of(node, names):
                yield Literal(path, value.lineno, str(value.value))


class _Names:
    """
    What a module calls fasten, its functions, and what `init()` gave it.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.modules: set[str] = set()
        self.functions: set[str] = set()
        self.shims: set[str] = set()
        for node in ast.walk(tree):
            match node:
                case ast.Import(names=aliases):
                    self._import(aliases)
                case ast.ImportFrom(module=str(module), names=aliases, level=0):
                    self._import_from(module, aliases)
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=made)):
                    if ast.unparse(made).rpartition(".")[2] in ("init", "Engine"):
                        self.modules.add(name)

    def _import(self, aliases: list[ast.alias]) -> None:
        for alias in aliases:
            if alias.name.partition(".")[0] in ("fasten", "fasten_shims"):
                self.modules.add(alias.asname or alias.name.partition(".")[0])

    def _import_from(self, module: str, aliases: list[ast.alias]) -> None:
        if module.partition(".")[0] not in ("fasten", "fasten_shims"):
            return
        for alias in aliases:
            name = alias.asname or alias.name
            if alias.name in _EMITS:
                self.functions.add(name)
            else:
                self.shims.add(name)


def _code_of(call: ast.Call, names: _Names) -> Iterator[ast.Constant]:
    """
    Yield the literal code of a call into fasten, if that is one.
    """
    called = ast.unparse(call.func)
    head, _, tail = called.rpartition(".")
    root = called.partition(".")[0]
    is_emit = called in names.functions or (tail in _EMITS and head in names.modules)
    is_ours = is_emit or root in names.modules or root in names.shims
    if is_emit and call.args and _is_literal(call.args[0]):
        yield call.args[0]  # type: ignore[misc]
    for keyword in call.keywords:
        if is_ours and keyword.arg == "code" and _is_literal(keyword.value):
            yield keyword.value  # type: ignore[misc]


def _is_literal(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
