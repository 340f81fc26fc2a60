# SPDX-License-Identifier: Apache-2.0
"""
What differs between two states of a thing: the detail of a row about a change.

Nothing is redacted or encoded here: `emit` does both. No attribute that would have to
be loaded from a database is touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs

__all__ = ["changes"]

_NOTHING: Final = object()


def changes(
    before: Any,
    after: Any,
    *,
    fields: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> dict[str, dict[str, dict[str, Any]]]:
    """
    Say what changed, as `{"changes": {field: {"before": old, "after": new}}}`.

    Both may be mappings, attrs or dataclass instances, models of pydantic, SQLAlchemy
    or Django, or plain objects; None stands for what did not exist, or no longer does,
    and leaves out that side. *fields* are the only ones looked at; without it all are,
    but those that begin with an underscore and those of *exclude*.

    Raises:
        TypeError: one of both has no fields to compare.
    """
    old, new = _state(before), _state(after)
    names = [*old, *(name for name in new if name not in old)]
    if fields is not None:
        names = [name for name in dict.fromkeys(fields) if name in old or name in new]
    else:
        names = [name for name in names if not str(name).startswith("_")]
    left_out = set(exclude)
    found = {
        str(name): _sides(old.get(name, _NOTHING), new.get(name, _NOTHING))
        for name in names
        if name not in left_out
        and _differ(old.get(name, _NOTHING), new.get(name, _NOTHING))
    }
    return {"changes": found}


def _sides(old: Any, new: Any) -> dict[str, Any]:
    sides = {"before": old, "after": new}
    return {side: value for side, value in sides.items() if value is not _NOTHING}


def _differ(old: Any, new: Any) -> bool:
    if old is new:
        return False
    try:
        return bool(old != new)
    except Exception:  # whatever a user's type, or an array, says to being compared
        return True


def _state(given: Any) -> Mapping[Any, Any]:
    """
    Return the fields of *given* that are there, by name.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return given
    if isinstance(given, type):
        raise _nothing_to_compare(given)
    cls = type(given)
    for is_of_kind, read in _KINDS:
        if is_of_kind(cls):
            return read(given)
    state = getattr(given, "__dict__", None)
    if state is None:
        raise _nothing_to_compare(given)
    return dict(state)


def _nothing_to_compare(given: object) -> TypeError:
    return TypeError(
        f"changes() compares mappings and objects with fields, not {given!r:.80}; "
        "pass None for what did not exist"
    )


def _of_attrs(given: Any) -> dict[str, Any]:
    return {f.name: getattr(given, f.name) for f in attrs.fields(type(given))}


def _of_dataclass(given: Any) -> dict[str, Any]:
    return {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}


def _of_pydantic(given: Any) -> dict[str, Any]:
    return {name: getattr(given, name) for name in type(given).model_fields}


def _of_sqlalchemy(given: Any) -> dict[str, Any]:
    # What is expired or deferred is left out: to read it would load it.
    loaded = given.__dict__
    keys = type(given).__mapper__.column_attrs.keys()
    return {key: loaded[key] for key in keys if key in loaded}


def _of_django(given: Any) -> dict[str, Any]:
    loaded = given.__dict__
    names = [field.attname for field in type(given)._meta.concrete_fields]  # noqa: SLF001
    return {name: loaded[name] for name in names if name in loaded}


def _of_namedtuple(given: Any) -> dict[str, Any]:
    return dict(given._asdict())


# Told by what their classes have: nothing is imported that is not loaded. Models come
# before dataclasses, which SQLAlchemy's may be too.
_KINDS: Final[
    tuple[tuple[Callable[[type], bool], Callable[[Any], dict[str, Any]]], ...]
] = (
    (lambda cls: hasattr(cls, "__mapper__"), _of_sqlalchemy),
    (lambda cls: hasattr(getattr(cls, "_meta", None), "concrete_fields"), _of_django),
    (lambda cls: hasattr(cls, "model_fields"), _of_pydantic),
    (attrs.has, _of_attrs),
    (dataclasses.is_dataclass, _of_dataclass),
    (lambda cls: issubclass(cls, tuple) and hasattr(cls, "_asdict"), _of_namedtuple),
)
