# SPDX-License-Identifier: Apache-2.0
"""
The SQLAlchemy adapter: each change of a recorded model has its row, bulk ones too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

import fasten
from fasten.codes import Meta
from fasten.shim.sqlalchemy import Record, install
from tests.checker import faults, rows_of
from tests.transactions import stored, url


class Base(orm.DeclarativeBase):
    pass


class Person(Base):
    __tablename__ = "people"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str]
    mail: orm.Mapped[str | None] = orm.mapped_column("mail_address")
    password: orm.Mapped[str | None]


class Employee(Person):
    pass


class Place(Base):
    __tablename__ = "places"
    country: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    town: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    size: orm.Mapped[int]


class Unseen(Base):
    __tablename__ = "unseen"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)


@pytest.fixture(autouse=True)
def _codes() -> None:
    kinds = ("CREATED", "UPDATED", "DELETED")
    fasten.codes.register("town", {f"PLACE_{kind}": Meta() for kind in kinds})


@pytest.fixture
def made(store_dsn: str) -> Iterator[orm.sessionmaker[orm.Session]]:
    """
    Return a maker of sessions on the store that fasten runs on.
    """
    fasten.init(service_id="svc", node_id="n", stdout="", audit_dsn=store_dsn)
    engine = sa.create_engine(url(store_dsn))
    Base.metadata.create_all(engine)
    yield orm.sessionmaker(engine)
    engine.dispose()


def changed(code: str, target: str, **columns: tuple[Any, Any]) -> tuple[Any, ...]:
    """
    Return what `stored` gives for one changed object; ... stands for no value.
    """
    sides = {
        name: {
            side: value
            for side, value in zip(("before", "after"), pair, strict=True)
            if value is not ...
        }
        for name, pair in columns.items()
    }
    return code, target, {"changes": sides}


class TestUnitOfWork:
    def test_a_life(self, made: Any, store_dsn: str) -> None:
        """
        Created, updated and deleted objects have a row each, with what changed.
        """
        install(made, {Person: Record("USER", exclude=["password"])})
        with made() as session:
            person = Person(name="ann", mail=None)
            session.add(person)
            session.commit()
            key = person.id
            person.mail = "a@x"
            session.commit()
            session.delete(person)
            session.commit()

        created, updated, deleted = stored(store_dsn)
        assert "ann" == created[2]["changes"]["name"]["after"]
        assert ("USER_CREATED", str(key)) == created[:2]
        assert changed("USER_UPDATED", str(key), mail=(None, "a@x")) in (
            updated,
            # Expired by the commit before: the old value was never loaded again.
            (*updated[:2], {"changes": {"mail": {"before": None, "after": "a@x"}}}),
        )
        assert ("USER_DELETED", str(key)) == deleted[:2]

    def test_roll_back_and_savepoints(self, made: Any, store_dsn: str) -> None:
        """
        What was flushed and rolled back is not recorded.
        """
        install(made, {Person: Record("USER")})
        with made() as session:
            session.add(Person(id=1, name="a"))
            session.flush()
            session.rollback()
            session.add(Person(id=2, name="b"))
            session.flush()
            nested = session.begin_nested()
            session.add(Person(id=3, name="c"))
            session.flush()
            nested.rollback()
            session.commit()

        assert [("USER_CREATED", "2")] == [row[:2] for row in stored(store_dsn)]

    def test_only_chosen_columns_and_kinds(self, made: Any, store_dsn: str) -> None:
        """
        fields=, updated=None and target= choose what is told.
        """
        record = Record(
            "USER",
            fields=["name"],
            deleted=None,
            target=lambda columns: f"person/{columns['name']}",
        )
        install(made, {Person: record})
        with made() as session:
            person = Person(id=1, name="ann", mail="a@x")
            session.add(person)
            session.commit()
            person.mail = "other"
            session.commit()
            session.delete(person)
            session.commit()

        wanted = changed("USER_CREATED", "person/ann", name=(..., "ann"))
        assert [wanted] == stored(store_dsn)

    def test_secrets(self, made: Any, store_dsn: str) -> None:
        """
        A password's row shows that it changed, and no value.
        """
        install(made, {Person: Record("USER")})
        with made() as session:
            session.add(Person(id=1, name="a", password="hunter2-hunter2"))
            session.commit()

        assert "hunter2" not in str(rows_of_after_flush(store_dsn))

    def test_subclasses_and_strangers(self, made: Any, store_dsn: str) -> None:
        """
        A subclass is recorded as its model; other models are not.
        """
        install(made, {Person: Record("USER")})
        with made() as session:
            session.add_all([Employee(id=1, name="e"), Unseen(id=1)])
            session.commit()

        assert [("USER_CREATED", "1")] == [row[:2] for row in stored(store_dsn)]

    def test_keys_of_several_columns(self, made: Any, store_dsn: str) -> None:
        """
        A key of two columns is joined with a comma.
        """
        install(made, {Place: Record("PLACE", fields=["size"])})
        with made() as session:
            session.add(Place(country="fr", town="paris", size=2))
            session.commit()
            session.execute(sa.update(Place).values(size=Place.size + 1))
            session.commit()

        assert [
            changed("PLACE_CREATED", "fr,paris", size=(..., 2)),
            changed("PLACE_UPDATED", "fr,paris", size=(2, 3)),
        ] == stored(store_dsn)


def rows_of_after_flush(dsn: str) -> list[dict[str, Any]]:
    """
    Return the rows of a store once all is moved.
    """
    assert fasten.flush(20)
    return rows_of(dsn)


FIELDS = Record("USER", fields=["name", "mail"])


@pytest.fixture
def people(made: Any) -> Any:
    """
    Return a maker of sessions with three people in the table, recorded from now on.
    """
    with made() as session:
        session.add_all([Person(name=f"p{n}") for n in (1, 2, 3)])
        session.commit()
    install(made, {Person: FIELDS})
    return made


class TestStatements:
    def test_update(self, people: Any, store_dsn: str) -> None:
        """
        A bulk update has a row for each object, with its own old and new values.
        """
        with people() as session:
            done = session.execute(
                sa.update(Person)
                .where(Person.id < 3)
                .values(mail=Person.name + "@x", name="same")
            )
            session.commit()

        assert 2 == done.rowcount
        assert [
            changed("USER_UPDATED", "1", name=("p1", "same"), mail=(None, "p1@x")),
            changed("USER_UPDATED", "2", name=("p2", "same"), mail=(None, "p2@x")),
        ] == stored(store_dsn)

    def test_update_by_key(self, people: Any, store_dsn: str) -> None:
        """
        An update of many rows by their keys is told like any other.
        """
        with people() as session:
            session.execute(
                sa.update(Person), [{"id": 1, "mail": "a"}, {"id": 3, "mail": "c"}]
            )
            session.commit()

        assert [
            changed("USER_UPDATED", "1", mail=(None, "a")),
            changed("USER_UPDATED", "3", mail=(None, "c")),
        ] == stored(store_dsn)

    def test_an_update_that_changes_nothing(self, people: Any, store_dsn: str) -> None:
        """
        Rows that keep their values, or match nothing, are not recorded.
        """
        with people() as session:
            session.execute(sa.update(Person).where(Person.id == 1).values(name="p1"))
            session.execute(sa.update(Person).where(Person.id == 9).values(name="x"))
            session.commit()

        assert [] == stored(store_dsn)

    def test_delete_and_the_old_query(self, people: Any, store_dsn: str) -> None:
        """
        delete() and the legacy Query's update() and delete() are seen.
        """
        with people() as session:
            session.execute(sa.delete(Person).where(Person.id == 1))
            assert 1 == session.query(Person).filter_by(id=2).update({"name": "two"})
            assert 1 == session.query(Person).filter_by(id=3).delete()
            session.commit()

        assert [
            ("USER_DELETED", "1"),
            ("USER_UPDATED", "2"),
            ("USER_DELETED", "3"),
        ] == [row[:2] for row in stored(store_dsn)]

    @pytest.mark.parametrize("is_core", [True, False])
    def test_inserts(self, people: Any, store_dsn: str, is_core: bool) -> None:
        """
        Inserts of one, of many values, of many parameters, and those that return.
        """
        into = sa.insert(Person.__table__ if is_core else Person)
        with people() as session:
            session.execute(into.values(name="one"))
            session.execute(into.values([{"name": "two"}, {"name": "three"}]))
            session.execute(into, [{"name": "four"}, {"name": "five"}])
            returned = session.execute(into.values(name="six").returning(Person.id))
            assert 1 == len(returned.all())
            session.commit()
            keys = dict(session.execute(sa.select(Person.name, Person.id)).all())

        found = stored(store_dsn)
        assert {"USER_CREATED"} == {row[0] for row in found}
        names = ["one", "two", "three", "four", "five", "six"]
        assert [str(keys[name]) for name in names] == [row[1] for row in found]
        told = [row[2]["changes"].get("name", {}).get("after") for row in found]
        assert names[:5] == told[:5]

    def test_insert_from_select(self, people: Any, store_dsn: str) -> None:
        """
        What the database copies by itself is one row with its number.
        """
        with people() as session:
            session.execute(
                sa.insert(Person).from_select(["name"], sa.select(Person.name))
            )
            session.commit()

        ((code, _, detail),) = stored(store_dsn)
        assert "USER_CREATED" == code
        assert {"count": 3, "sample": []} == detail

    def test_of_many_there_is_one_row(self, made: Any, store_dsn: str) -> None:
        """
        Above *each*, one row tells the number and a sample.
        """
        record = Record("USER", fields=["name"], each=10, sample=2)
        install(made, {Person: record})
        with made() as session:
            session.execute(sa.insert(Person), [{"name": f"n{n}"} for n in range(50)])
            session.execute(sa.update(Person).values(name="same"))
            session.execute(sa.delete(Person))
            session.commit()

        rows = stored(store_dsn)
        assert ["USER_CREATED", "USER_UPDATED", "USER_DELETED"] == [r[0] for r in rows]
        assert {"Person"} == {row[1] for row in rows}
        assert [50, 50, 50] == [row[2]["count"] for row in rows]
        assert [2, 2, 2] == [len(row[2]["sample"]) for row in rows]
        assert {"before": "n0", "after": "same"} == rows[1][2]["sample"][0]["changes"][
            "name"
        ]

    @pytest.mark.slow
    def test_a_thousand(self, made: Any, store_dsn: str) -> None:
        """
        A bulk update of 1,000 rows is 1,000 audit rows, or none if rolled back.
        """
        with made() as session:
            session.execute(sa.insert(Person), [{"name": f"n{n}"} for n in range(1000)])
            session.commit()
        install(made, {Person: FIELDS})
        with made() as session:
            session.execute(sa.update(Person).values(name="x"))
            session.rollback()
            session.execute(sa.update(Person).values(name="y"))
            session.commit()
        assert fasten.flush(60)

        rows = rows_of(store_dsn)
        assert [] == faults(rows)
        assert 1000 == len({row["target"] for row in rows}) == len(rows)


class TestWays:
    @pytest.mark.parametrize("is_nested", [True, False])
    def test_after_the_commit(self, made: Any, store_dsn: str, is_nested: bool) -> None:
        """
        Without an outbox rows are emitted after the commit, and never before it.
        """
        install(made, {Person: Record("USER", is_transactional=False)})
        with made() as session:
            session.add(Person(id=1, name="a"))
            session.flush()
            assert 0 == fasten.stats()["emitted"]
            session.rollback()
            session.add(Person(id=2, name="b"))
            session.flush()
            nested = session.begin_nested()
            session.add(Person(id=3, name="c"))
            session.flush()
            nested.commit() if is_nested else nested.rollback()
            assert 0 == fasten.stats()["emitted"]
            session.commit()

        wanted = ["2", "3"] if is_nested else ["2"]
        assert wanted == [row[1] for row in stored(store_dsn)]

    def test_async_sessions(self, store_dsn: str) -> None:
        """
        An async_sessionmaker's sessions are recorded, and those of others are not.
        """
        fasten.init(service_id="svc", node_id="n", stdout="", audit_dsn=store_dsn)

        async def use() -> None:
            engine = create_async_engine(url(store_dsn, is_async=True))
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
            mine, others = async_sessionmaker(engine), async_sessionmaker(engine)
            install(mine, {Person: FIELDS})
            async with mine() as session, session.begin():
                session.add(Person(id=1, name="a"))
                await session.flush()
                await session.execute(sa.update(Person).values(name="b"))
            async with others() as session, session.begin():
                session.add(Person(id=2, name="unseen"))
            await engine.dispose()

        asyncio.run(use())

        assert [("USER_CREATED", "1"), ("USER_UPDATED", "1")] == [
            row[:2] for row in stored(store_dsn)
        ]

    def test_the_end(self, made: Any, store_dsn: str) -> None:
        """
        What install() returns ends the recording.
        """
        end = install(made, {Person: FIELDS})
        end()
        with made() as session:
            session.add(Person(id=1, name="a"))
            session.commit()

        assert [] == stored(store_dsn)

    def test_mistakes(self, made: Any) -> None:
        """
        Codes that nobody registered and things that are no sessions are refused early.
        """
        with pytest.raises(fasten.UnknownCode, match="PERSON_CREATED"):
            install(made, {Person: Record("PERSON")})
        with pytest.raises(TypeError, match="sessionmaker"):
            install(made.kw["bind"], {Person: FIELDS})
