# SPDX-License-Identifier: Apache-2.0
"""
changes(): two states in, what differs out, whatever the states are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import attrs
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import orm

import fasten
from fasten import changes
from tests.web.django_project import configure

WANTED = {"changes": {"email": {"before": "a@x", "after": "b@x"}}}


@attrs.frozen
class OfAttrs:
    name: str
    email: str


@dataclass
class OfDataclass:
    name: str
    email: str


class OfTuple(NamedTuple):
    name: str
    email: str


class Plain:
    def __init__(self, name: str, email: str) -> None:
        self.name, self.email, self._cache = name, email, object()


class Base(orm.DeclarativeBase):
    pass


class OfSqlalchemy(Base):
    __tablename__ = "people"
    name: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    email: orm.Mapped[str]


def of_pydantic(name: str, email: str) -> Any:
    """
    Make a model of pydantic.
    """
    import pydantic

    made = pydantic.create_model("Person", name=(str, ...), email=(str, ...))
    return made(name=name, email=email)


def of_django(name: str, email: str) -> Any:
    """
    Make a model of Django.
    """
    configure()
    from django.contrib.auth.models import User

    return User(username=name, email=email)


class TestStates:
    @pytest.mark.parametrize(
        "make",
        [
            *(OfAttrs, OfDataclass, OfTuple, Plain, OfSqlalchemy, of_pydantic),
            lambda name, email: {"name": name, "email": email},
            lambda name, email: vars(Plain(name, email)),
        ],
    )
    def test_what_differs(self, make: Any) -> None:
        """
        Each kind of state gives the one field that differs, with both its values.
        """
        before, after = make(name="n", email="a@x"), make(name="n", email="b@x")

        assert WANTED == changes(before, after)

    def test_models_of_django(self) -> None:
        """
        Columns of a Django model are compared, by the names of their attributes.
        """
        before, after = of_django("n", "a@x"), of_django("n", "b@x")

        assert WANTED == changes(before, after, exclude=["date_joined"])

    def test_different_kinds(self) -> None:
        """
        A mapping that was kept is compared with the object it was made from.
        """
        assert WANTED == changes({"name": "n", "email": "a@x"}, Plain("n", "b@x"))

    def test_nothing_is_loaded(self) -> None:
        """
        What SQLAlchemy has expired is left out, and stays so.
        """
        engine = sa.create_engine("sqlite://")
        Base.metadata.create_all(engine)
        with orm.Session(engine) as session:
            person = OfSqlalchemy(name="n", email="a@x")
            session.add(person)
            session.commit()

            assert {"changes": {}} == changes(None, person)
            assert {"name", "email"} <= sa.inspect(person).expired_attributes
        engine.dispose()


class TestChoice:
    def test_what_was_created_or_deleted(self) -> None:
        """
        None leaves out its side.
        """
        assert {"changes": {"a": {"after": 1}}} == changes(None, {"a": 1})
        assert {"changes": {"a": {"before": 1}}} == changes({"a": 1}, None)

    def test_a_value_of_none_is_a_value(self) -> None:
        """
        A field that became None is not a field that went away.
        """
        wanted = {"changes": {"a": {"before": 1, "after": None}}}

        assert wanted == changes({"a": 1}, {"a": None})

    def test_chosen_fields(self) -> None:
        """
        Only chosen fields are compared; an excluded one is not, even if chosen.
        """
        before, after = {"a": 1, "b": 1, "_c": 1}, {"a": 2, "b": 2, "_c": 2}

        assert ["a"] == list(changes(before, after, fields=["a", "x"])["changes"])
        assert ["a"] == list(changes(before, after, exclude=["b"])["changes"])
        assert ["_c"] == list(changes(before, after, fields=["_c"])["changes"])
        assert [] == list(
            changes(before, after, fields=["a"], exclude=["a"])["changes"]
        )

    def test_values_that_refuse_to_be_compared(self) -> None:
        """
        A comparison that raises counts as a difference.
        """

        class Stubborn:
            def __ne__(self, other: object) -> bool:
                raise ValueError("the truth of an array is ambiguous")

            __hash__ = None  # type: ignore[assignment]

        same = Stubborn()

        assert {} == changes({"a": same}, {"a": same})["changes"]
        assert ["a"] == list(changes({"a": same}, {"a": Stubborn()})["changes"])

    @pytest.mark.parametrize("wrong", [7, "text", b"x", [1], Plain])
    def test_what_has_no_fields(self, wrong: Any) -> None:
        """
        A TypeError says what cannot be compared.
        """
        with pytest.raises(TypeError, match=r"changes\(\) compares"):
            changes({}, wrong)

    @given(*[st.dictionaries(st.text("abc"), st.integers(0, 2))] * 2)
    def test_sides_are_the_states(
        self, before: dict[str, int], after: dict[str, int]
    ) -> None:
        """
        The sides of what changed turn the one state into the other.
        """
        found = changes(before, after)["changes"]
        remade = {k: v for k, v in before.items() if k not in found}
        remade |= {k: v["after"] for k, v in found.items() if "after" in v}

        assert after == remade


def test_secrets_are_redacted_by_emit() -> None:
    """
    A field with a secret's name shows that it changed, and neither of its values.
    """
    with fasten.testing.capture() as trail:
        detail = changes({"password": "old-one"}, {"password": "new-one"})
        fasten.emit("USER_UPDATED", "u-1", detail=detail)

    assert "old-one" not in str(trail.audit)
    assert "new-one" not in str(trail.audit)
    assert "password" in trail.audit[0]["detail"]["changes"]
