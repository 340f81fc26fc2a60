# SPDX-License-Identifier: Apache-2.0
"""
The layer table of the design, read off the source with `ast`.

What importing costs at run time is in `test_imports`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.outside import ROOT

# Sources are the same for every interpreter.
pytestmark = pytest.mark.slow

VALUES: Final = (
    *("errors", "settings", "codes", "rows", "redact"),
    *("records", "chain", "spill", "evidence", "retention", "difference"),
)
AMBIENT: Final = ("context",)
CARRIERS: Final = ("spool", "drain", "repository", "streams")
CORE: Final = (
    *("processors", "outbox", "losses", "upkeep", "refill", "delivery", "engine"),
    *("proof", "custody", "forgetting", "mending"),
)
FACES: Final = ("__init__", "reader", "cli", "testing")
SHIM: Final = ("shim",)

LAYERS: Final = (VALUES, AMBIENT, CARRIERS, CORE, FACES)
KNOWN: Final = {name for layer in LAYERS for name in layer} | set(SHIM)

SQL: Final = {"sqlalchemy", "psycopg", "sqlite3"}
CLOCKS: Final = {"time", "sched"}
THREADS: Final = {"threading", "_thread", "concurrent", "multiprocessing", "queue"}
HTTP: Final = {"http", "wsgiref", "socketserver", "xmlrpc"}

ANYWHERE: Final = {"attrs", "attr"}
"""Third-party packages that any module may import at its top."""

AT_TOP: Final = {
    "repository": {"sqlalchemy", "psycopg"},
    "processors": {"structlog"},
    "engine": {"structlog"},
    "cli": {"click"},
    "testing": {"pytest"},  # in plugin.py, which only pytest loads
}
"""... and those that one module may import there, too."""

IN_FUNCTIONS: Final = {
    "codes": {"cattrs", "yaml"},
    # An extra that can prove a value: never needed to import it.
    "chain": {"cryptography"},
    "repository": {"cryptography"},
    "engine": {"cryptography"},
    "reader": {"cryptography", "django"},
    "cli": {"cryptography", "textual", "yaml", "pyarrow", "duckdb", "fsspec"},
    "testing": {"structlog", "pytest"},
}
"""... and those that it may import inside the functions that need them."""

LOADED_BY_ITS_FRAMEWORK: Final = {"fasten_shims.django.apps", "fasten_shims.pytest"}
"""Modules of shims that only the framework itself imports: they may, too."""

PUBLIC_NAMES_OF_FUNCTIONS: Final = ("log", "emit", "init", "flush", "close")


class Import(NamedTuple):
    """
    One imported module, and where the import stands.
    """

    module: str
    line: int
    is_top: bool
    is_for_types: bool

    @property
    def package(self) -> str:
        """
        The first part of the name.
        """
        return self.module.partition(".")[0]


class Source:
    """
    One module's source, and which name of the table it falls under.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = path.relative_to(ROOT).with_suffix("").parts
        self.name = parts[1]
        self.dotted = ".".join(parts).removesuffix(".__init__")

    @cached_property
    def tree(self) -> ast.Module:
        """
        What it says.
        """
        return ast.parse(self.path.read_text(encoding="utf-8"), str(self.path))

    @cached_property
    def imports(self) -> list[Import]:
        """
        What it imports, at any level.
        """
        is_package = self.path.stem == "__init__"
        return list(_imports(self.tree, self.dotted, is_package))

    def ours(self) -> Iterator[tuple[str, Import]]:
        """
        Each imported module of fasten, as its name in the table.
        """
        for found in self.imports:
            if found.package == "fasten":
                yield [*found.module.split("."), "__init__"][1], found

    def strangers(self) -> Iterator[Import]:
        """
        Each import that is neither of the standard library nor ours.
        """
        ours = {"fasten", "fasten_shims", *sys.stdlib_module_names}
        return (found for found in self.imports if found.package not in ours)


def _imports(tree: ast.Module, dotted: str, is_package: bool) -> Iterator[Import]:
    package = dotted if is_package else dotted.rpartition(".")[0]
    for node, is_top, is_for_types in _walk(tree, is_top=True, is_for_types=False):
        for module in _modules(node, package):
            yield Import(module, node.lineno, is_top, is_for_types)


def _walk(
    node: ast.AST, *, is_top: bool, is_for_types: bool
) -> Iterator[tuple[ast.AST, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typed = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield child, is_top, is_for_types
        yield from _walk(
            child,
            is_top=is_top and not inner,
            is_for_types=is_for_types or typed,
        )


def _modules(node: ast.AST, package: str) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            start = package.rsplit(".", level - 1)[0] if level else ""
            base = ".".join(filter(None, [start, module]))
            # `from fasten import chain` is an import of the module fasten.chain.
            return [_submodule(base, alias.name) or base for alias in names]
    return []


def _submodule(base: str, name: str) -> str | None:
    if base == "fasten" and name in KNOWN:
        return f"fasten.{name}"
    place = ROOT.joinpath(*base.split("."), name)
    exists = place.with_suffix(".py").exists() or (place / "__init__.py").exists()
    return f"{base}.{name}" if exists else None


def _sources(package: str) -> list[Source]:
    return [Source(path) for path in sorted((ROOT / package).rglob("*.py"))]


FASTEN: Final = _sources("fasten")
SHIMS: Final = _sources("fasten_shims")


def each(*names: str) -> pytest.MarkDecorator:
    """
    Run a test once for each source that falls under one of *names*.
    """
    found = [source for source in FASTEN if source.name in names]
    return pytest.mark.parametrize("source", found, ids=lambda source: source.dotted)


def _lower(name: str) -> set[str]:
    """
    The modules that stand below *name* in the table.
    """
    below: set[str] = set()
    for layer in LAYERS:
        if name in layer:
            # Values build on one another in the order in which they stand.
            return below | set(layer[: layer.index(name)] if layer is VALUES else ())
        below |= set(layer)
    raise LookupError(name)


def _allowed(name: str) -> set[str]:
    if name == "streams":
        return _lower(name) | set(CARRIERS)
    if name in CORE:
        return _lower(name) | set(CORE[: CORE.index(name)])
    return _lower(name) | {name}


class TestHouse:
    def test_each_module_is_in_the_table(self):
        """
        A new module is given its layer here, or it has no place in the house.
        """
        strangers = sorted({source.name for source in FASTEN} - KNOWN)

        assert [] == strangers

    def test_no_module_hides_a_public_function(self):
        """
        Importing `fasten.log` as a module would overwrite the logger of that name.
        """
        names = {source.dotted for source in FASTEN}

        assert set() == names & {f"fasten.{name}" for name in PUBLIC_NAMES_OF_FUNCTIONS}

    @pytest.mark.parametrize("package", ["fasten", "fasten_shims"])
    def test_both_packages_are_typed(self, package):
        """
        Type checkers of users read our annotations.
        """

        assert (ROOT / package / "py.typed").is_file()

    @pytest.mark.parametrize("source", FASTEN + SHIMS, ids=lambda found: found.dotted)
    def test_each_module_says_what_lives_there(self, source):
        """
        A module begins with the licence line and a docstring.
        """
        first, *_ = source.path.read_text(encoding="utf-8").splitlines()

        assert "# SPDX-License-Identifier: Apache-2.0" == first
        assert ast.get_docstring(source.tree)


class TestDirection:
    @each(*VALUES, *AMBIENT, *CARRIERS, *CORE)
    def test_imports_point_down(self, source):
        """
        A module imports from the layers below its own, also inside functions.
        """
        allowed = _allowed(source.name)
        up = [
            f"line {found.line}: {found.module}"
            for name, found in source.ours()
            if name not in allowed
        ]

        assert [] == up

    @each("reader", "cli", "testing")
    def test_faces_do_not_import_each_other(self, source):
        """
        Reader, CLI and testing stand side by side, on the core.
        """
        allowed = _allowed(source.name)
        side = [
            f"line {found.line}: {found.module}"
            for name, found in source.ours()
            if name not in allowed
        ]

        assert [] == side

    def test_the_front_names_faces_and_shims_lazily(self):
        """
        `import fasten` loads neither reader nor CLI: only a look at them does.
        """
        early = [
            found.module
            for source in FASTEN
            if source.dotted == "fasten"
            for name, found in source.ours()
            if name in {*FACES[1:], *SHIM} and found.is_top and not found.is_for_types
        ]

        assert [] == early


class TestThirdParties:
    @each(*KNOWN)
    def test_each_library_has_its_module(self, source):
        """
        SQL stays in repository, YAML in codes, click in cli: nothing else knows them.
        """
        top = ANYWHERE | AT_TOP.get(source.name, set())
        inner = top | IN_FUNCTIONS.get(source.name, set())
        wrong = [
            f"line {found.line}: {found.module}"
            for found in source.strangers()
            if not found.is_for_types
            and found.package not in (top if found.is_top else inner)
        ]

        assert [] == wrong

    @each(*KNOWN - {"repository"})
    def test_sql_lives_in_the_repository(self, source):
        """
        No other module opens a database, not even the standard library's.
        """
        wrong = [
            found.module
            for found in source.imports
            if found.package in SQL and not found.is_for_types
        ]

        assert [] == wrong

    @each(*CORE, *CARRIERS, *AMBIENT, *VALUES)
    def test_nothing_below_the_faces_speaks_http(self, source):
        """
        HTTP is a face: the core would work without it.
        """
        wrong = [found.module for found in source.imports if found.package in HTTP]
        wrong += [
            found.module for found in source.imports if found.module == "urllib.request"
        ]

        assert [] == wrong


class TestPurity:
    @each(*VALUES, *AMBIENT)
    def test_values_start_no_thread(self, source):
        """
        Values are computed where they are asked for.
        """
        # The executor that carries the context is part of the contract.
        allowed = {"concurrent"} if source.name == "context" else set()
        threads = THREADS - allowed
        wrong = [found.module for found in source.imports if found.package in threads]

        assert [] == wrong

    @each(*VALUES, *AMBIENT)
    def test_values_read_no_environment(self, source):
        """
        The environment arrives as an argument.
        """
        environment = {"environ", "environb", "getenv", "getenvb"}
        wrong = [
            node.lineno
            for node in ast.walk(source.tree)
            if (isinstance(node, ast.Attribute) and node.attr in environment)
            and ast.unparse(node.value) == "os"
        ]
        wrong += _names_from(source.tree, {"os"}, environment)

        assert [] == wrong

    @each(*VALUES, *AMBIENT)
    def test_values_read_no_clock(self, source):
        """
        Time arrives as an argument; a clock is named only as the default of one.
        """
        defaults = {id(node) for node in _defaults(source.tree)}
        clocks = {
            alias.asname or alias.name
            for node in ast.walk(source.tree)
            if isinstance(node, ast.ImportFrom) and node.module in CLOCKS
            for alias in node.names
        }
        wrong = [
            f"line {node.lineno}: {ast.unparse(node)}"
            for node in ast.walk(source.tree)
            if _is_clock(node, clocks) and id(node) not in defaults
        ]

        assert [] == wrong

    @each("repository")
    def test_the_repository_never_waits(self, source):
        """
        Waiting, backing off and giving up are the drainer's.
        """
        wrong = [
            found.module
            for found in source.imports
            if found.package in {"threading", "_thread", "sched"}
        ]
        wrong += [
            f"line {node.lineno}: {ast.unparse(node)}"
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Attribute) and node.attr == "sleep"
        ]
        wrong += _names_from(source.tree, {"time", "asyncio"}, {"sleep"})

        assert [] == wrong

    @each("drain")
    def test_the_drainer_knows_callables_only(self, source):
        """
        What it drains into is handed to it.
        """
        wrong = [found.module for found in source.imports if found.package in SQL]

        assert [] == wrong


def _is_clock(node: ast.AST, clocks: set[str]) -> bool:
    match node:
        case ast.Name(id=name, ctx=ast.Load()):
            return name in clocks
        case ast.Attribute(value=ast.Name(id="time"), attr=name):
            return name != "struct_time"
        case ast.Attribute(attr="now" | "utcnow" | "today", value=value):
            return ast.unparse(value).endswith(("datetime", "date"))
    return False


def _defaults(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            for default in [*node.defaults, *node.kw_defaults]:
                if isinstance(default, ast.Name | ast.Attribute):
                    yield default


def _names_from(tree: ast.Module, modules: set[str], names: set[str]) -> list[str]:
    return [
        f"line {node.lineno}: {alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in modules
        for alias in node.names
        if alias.name in names
    ]


def _public_names() -> set[str]:
    for source in FASTEN:
        if source.dotted == "fasten":
            for node in source.tree.body:
                target = ast.unparse(node).partition(" = ")[0].partition(":")[0]
                if target == "__all__" and isinstance(node, ast.Assign | ast.AnnAssign):
                    return set(ast.literal_eval(node.value))
    return set()


class TestShims:
    @pytest.mark.parametrize("source", SHIMS, ids=lambda source: source.dotted)
    def test_shims_use_the_public_surface(self, source):
        """
        A shim imports fasten's public names and its context; engine and store never.
        """
        wrong = [
            f"line {found.line}: {found.module}"
            for name, found in source.ours()
            if name not in {"__init__", "context"}
        ]

        assert [] == wrong

    @pytest.mark.parametrize("source", SHIMS, ids=lambda source: source.dotted)
    def test_shims_reach_nothing_behind_it(self, source):
        """
        `from fasten import x` takes what `fasten.__all__` lists, `fasten.x` too.
        """
        public = _public_names()
        taken = {
            alias.name
            for node in ast.walk(source.tree)
            if isinstance(node, ast.ImportFrom) and node.module == "fasten"
            for alias in node.names
        }
        taken |= {
            node.attr
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "fasten"
        }

        assert set() == taken - public - {"context"}

    @pytest.mark.parametrize("source", SHIMS, ids=lambda source: source.dotted)
    def test_frameworks_are_imported_inside_functions(self, source):
        """
        A shim can be imported without the framework that it serves.
        """
        wrong = [
            f"line {found.line}: {found.module}"
            for found in source.strangers()
            if found.is_top and not found.is_for_types and found.package not in ANYWHERE
        ]
        if source.dotted in LOADED_BY_ITS_FRAMEWORK:
            wrong = []

        assert [] == wrong

    @each(*SHIM)
    def test_the_users_spelling_holds_no_code(self, source):
        """
        `fasten.shim.x` is another name of `fasten_shims.x`, and nothing more.
        """
        if source.dotted == "fasten.shim":
            wrong = [
                name for name, _ in source.ours() if name not in {"context", "shim"}
            ]
        else:
            twin = source.dotted.replace("fasten.shim", "fasten_shims", 1)
            wrong = [
                ast.unparse(node)
                for node in source.tree.body[1:]
                if not isinstance(node, ast.ImportFrom)
                or node.module not in {twin, "__future__"}
            ]

        assert [] == wrong


class TestTheRulesBite:
    """
    A table that nothing can break would prove nothing: each rule is broken once.
    """

    @pytest.mark.parametrize(
        ("code", "expected"),
        [
            ("import fasten.engine", ["fasten.engine"]),
            ("from fasten import engine", ["fasten.engine", "fasten"]),
            ("from fasten.rows import Pending", ["fasten.rows"]),
            ("from . import rows", ["fasten.rows", "fasten"]),
            ("from .rows import Pending", ["fasten.rows"]),
            ("def f():\n    import yaml", ["yaml"]),
        ],
    )
    def test_every_spelling_of_an_import_is_seen(self, code, expected):
        """
        Relative, from-package and nested imports count as what they are.
        """
        found = _imports(ast.parse(code), "fasten.streams", is_package=False)

        assert {each.module for each in found} <= set(expected)

    def test_an_import_inside_a_function_is_not_at_the_top(self):
        """
        Only imports that run when the module does cost at import.
        """
        code = "import a\nif TYPE_CHECKING:\n    import b\ndef f():\n    import c"
        found = _imports(ast.parse(code), "fasten.streams", is_package=False)

        assert [
            ("a", True, False),
            ("b", True, True),
            ("c", False, False),
        ] == [(each.module, each.is_top, each.is_for_types) for each in found]

    @pytest.mark.parametrize(
        "code",
        [
            "time.time()",
            "datetime.now(UTC)",
            "datetime.datetime.utcnow()",
            "from time import time_ns as ns\nns()",
        ],
    )
    def test_every_spelling_of_a_clock_is_seen(self, code):
        """
        A clock read in the body is caught, under whatever name.
        """
        clocks = {"ns"}
        tree = ast.parse(code)

        assert any(_is_clock(node, clocks) for node in ast.walk(tree))

    def test_the_order_of_values_holds(self):
        """
        Rows may read settings, and settings may not read rows.
        """

        assert "settings" in _allowed("rows")
        assert "rows" not in _allowed("settings")

    def test_carriers_do_not_see_each_other(self):
        """
        Only streams sees the others.
        """

        assert {"spool", "drain", "repository"} <= _allowed("streams")
        assert not _allowed("drain") & {"spool", "repository", "streams"}
