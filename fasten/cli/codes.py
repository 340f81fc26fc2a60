# SPDX-License-Identifier: Apache-2.0
"""
Codes on the command line: `dump`, `codes check`, `codes typegen`.

What is compared lives in `consistency`, what is generated in `typegen`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import click

from fasten.cli.application import Application, app_option
from fasten.cli.command import Command, Failure, Group, WrongUsage, say, write
from fasten.cli.consistency import changes, literal_codes, read_codes, sources
from fasten.cli.filters import load_codes
from fasten.cli.text import json_text, terminal_safe
from fasten.cli.typegen import LANGUAGES, generate
from fasten.codes import OWN_CODES, registry

__all__ = ["codes", "dump"]


@click.command(
    cls=Command,
    epilog="Example: fasten dump --app shop.web:app > codes.csv",
)
@app_option
def dump(*, app: str | None) -> None:
    """
    Print each registered code as `id,domain,severity`, sorted.

    The standard ones, those of the codes files here (FASTEN_CODES) and, with --app,
    those that the application registers.
    """
    _load(app)
    write(registry.dump())


def _load(app: str | None) -> None:
    load_codes()
    if app is not None:
        Application(app)


@click.group(cls=Group)
def codes() -> None:
    """
    Check codes against each other and a program; generate types from them.
    """


# --- check ----------------------------------------------------------------------------


@codes.command(
    epilog="Example: fasten codes check released.codes.yaml fleet.codes.yaml, or: "
    "fasten codes check --app shop.web:app",
)
@click.argument("files", nargs=-1, metavar="[OLD NEW]", type=click.Path(path_type=Path))
@app_option
@click.option(
    "--source",
    type=click.Path(exists=True, path_type=Path),
    help="Where the program is, if not where --app is imported from.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def check(
    *, files: tuple[Path, ...], app: str | None, source: Path | None, as_json: bool
) -> None:
    """
    Find codes that were taken away, or that nothing registers.

    OLD and NEW are codes files, or what `fasten dump` printed, in any language: a code
    that is gone, or whose metadata promise less, is a finding. With --app (or
    --source), codes that the source hands to emit and nothing registers are.
    """
    if len(files) not in (0, 2) or not (files or app or source):
        raise WrongUsage("give two files, OLD and NEW, or --app module:attr")
    if files and (app or source):
        raise WrongUsage("OLD and NEW are compared, or a program is checked: not both")
    if files:
        _compare(*files, as_json=as_json)
    else:
        _scan(app, source, as_json=as_json)


def _compare(old: Path, new: Path, *, as_json: bool) -> None:
    found = changes(read_codes(old), read_codes(new))
    if as_json:
        told = ({"kind": c.kind, "code": c.code, "what": c.what or None} for c in found)
        write([json_text(list(told))])
    else:
        write(f"{c.kind:<8}  {c.code}  {c.what}".rstrip() for c in found)
    findings = sum(change.is_finding for change in found)
    if findings:
        raise Failure(f"{findings} codes are gone or promise less than in {old}")


def _scan(app: str | None, source: Path | None, *, as_json: bool) -> None:
    _load(app)
    strangers = []
    for path in _files(app, source):
        try:
            found = list(literal_codes(path))
        except SyntaxError as error:
            say(f"{path}:{error.lineno}: cannot be read as Python: {error.msg}")
            continue
        strangers += [each for each in found if each.code not in registry.entries]
    told = [
        (each, str(registry.unknown(each.code)))
        for each in sorted(strangers, key=lambda each: (each.path, each.line))
    ]
    if as_json:
        rows = [
            {"path": str(each.path), "line": each.line, "code": each.code, "what": what}
            for each, what in told
        ]
        write([json_text(rows)])
    else:
        write(terminal_safe(f"{each.path}:{each.line}: {w}") for each, w in told)
    if told:
        raise Failure(f"{len(told)} codes in the source are not registered")


def _files(app: str | None, source: Path | None) -> Iterator[Path]:
    root = source or _place_of(str(app))
    return iter([root]) if root.is_file() else sources(root)


def _place_of(app: str) -> Path:
    """
    Return the folder of the package that `--app` is in, or of its module.
    """
    top = app.partition(":")[0].partition(".")[0]
    spec = importlib.util.find_spec(top)
    places = list(spec.submodule_search_locations or ()) if spec else []
    if places:
        return Path(places[0])
    if spec is None or spec.origin is None:
        raise WrongUsage(f"--app {app}: no source is to be had; give --source")
    return Path(spec.origin).parent


# --- typegen --------------------------------------------------------------------------


@codes.command(
    epilog="Example: fasten codes typegen --lang python fleet.codes.yaml > audit.py",
)
@click.option(
    "--lang",
    type=click.Choice(sorted(LANGUAGES)),
    required=True,
    help="The language to write.",
)
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@app_option
def typegen(*, lang: str, files: tuple[Path, ...], app: str | None) -> None:
    """
    Print source code that names each code, from FILES or those found here.

    In Python, one typed function a code: a wrong code, a missing field or a wrong type
    of detail fails mypy and pyright. In other languages, constants.
    """
    _load(app)
    if files:
        registry.load(*files)
    metas = [registry.meta(code) for code in registry.entries if code not in OWN_CODES]
    click.echo(generate(lang, metas), nl=False)
