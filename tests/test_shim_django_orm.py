# SPDX-License-Identifier: Apache-2.0
"""
The adapter of Django's ORM: each change of a recorded model has its row, bulk ones too.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import pytest
from asgiref.sync import sync_to_async

import fasten
from tests.checker import faults, rows_of
from tests.transactions import DjangoConnection, opened, stored
from tests.web.django_project import configure

configure()

from django.contrib.auth.models import Group, User  # noqa: E402
from django.db import models, transaction  # noqa: E402
from django.db.models import F, Value  # noqa: E402
from django.db.models.functions import Concat  # noqa: E402
from django.db.models.signals import pre_delete  # noqa: E402

from fasten.codes import Meta  # noqa: E402
from fasten.shim.django.orm import Record, install  # noqa: E402

FIELDS = Record("USER", fields=["username", "email"])


class Person(models.Model):  # noqa: DJ008
    name = models.CharField(max_length=50)
    mail = models.CharField(max_length=50, default="")
    age = models.IntegerField(default=0)

    class Meta:  # noqa: D106
        app_label = "sessions"  # relations are followed within installed apps only


class Pet(models.Model):  # noqa: DJ008
    owner = models.ForeignKey(Person, on_delete=models.CASCADE)
    name = models.CharField(max_length=50)

    class Meta:  # noqa: D106
        app_label = "sessions"  # relations are followed within installed apps only


class Worker(Person):  # noqa: DJ008
    job = models.CharField(max_length=50, default="")

    class Meta:  # noqa: D106
        app_label = "sessions"  # relations are followed within installed apps only


PEOPLE = Record("USER", fields=["name", "mail", "age"])
Recording = Callable[[dict[type, Record]], None]


@pytest.fixture
def using(store_dsn: str) -> Iterator[str]:
    """
    Return the alias of the store that fasten runs on, with the tables of the models.
    """
    kinds = ("CREATED", "UPDATED", "DELETED")
    fasten.codes.register("zoo", {f"PET_{kind}": Meta() for kind in kinds})
    fasten.init(service_id="svc", node_id="n", stdout="", audit_dsn=store_dsn)
    with opened(DjangoConnection, store_dsn) as way:
        way.commit()  # each statement by itself, as Django does without atomic()
        with way.connection.schema_editor() as editor:
            for model in (Person, Pet, Worker):
                editor.create_model(model)
        yield "business"


@pytest.fixture
def recording() -> Iterator[Recording]:
    """
    Return install(), undone after the test.
    """
    ends = []
    yield lambda given: ends.append(install(given))
    for end in reversed(ends):
        end()


def changed(code: str, target: str, **columns: tuple[Any, Any]) -> tuple[Any, ...]:
    """
    Return what `stored` gives for one object whose columns changed.
    """
    sides = {k: {"before": old, "after": new} for k, (old, new) in columns.items()}
    return code, target, {"changes": sides}


class TestObjects:
    def test_a_life(self, using: str, recording: Recording, store_dsn: str) -> None:
        """
        save() and delete() have a row each, with what changed in the database.
        """
        recording({Person: PEOPLE})
        person = Person(name="ann")
        person.save(using=using)
        key = str(person.pk)
        person.age = F("age") + 7
        person.mail = "a@x"
        person.save(using=using)
        person.save(using=using, update_fields=["name"])
        person.delete(using=using)

        created, updated, deleted = stored(store_dsn)
        assert ("USER_CREATED", key) == created[:2]
        assert {"after": "ann"} == created[2]["changes"]["name"]
        assert changed("USER_UPDATED", key, mail=("", "a@x"), age=(0, 7)) == updated
        assert ("USER_DELETED", key) == deleted[:2]

    def test_atomic_blocks(
        self, using: str, recording: Recording, store_dsn: str
    ) -> None:
        """
        What an atomic block rolls back, a nested one too, is not recorded.
        """
        recording({Person: PEOPLE})
        with suppress(ZeroDivisionError), transaction.atomic(using=using):
            Person(name="a").save(using=using)
            raise ZeroDivisionError
        with transaction.atomic(using=using):
            Person(name="b").save(using=using)
            with suppress(ZeroDivisionError), transaction.atomic(using=using):
                Person(name="c").save(using=using)
                raise ZeroDivisionError

        told = [row[2]["changes"]["name"]["after"] for row in stored(store_dsn)]
        assert ["b"] == told

    def test_without_atomic_it_is_one_transaction(
        self, using: str, recording: Recording, store_dsn: str
    ) -> None:
        """
        Where the row cannot be written, the object is not saved either.
        """
        recording({Person: PEOPLE})
        fasten.init(
            service_id="svc", node_id="n", stdout="", audit_dsn="sqlite:///./other.db"
        )
        with pytest.raises(fasten.AuditStoreError):
            Person(name="a").save(using=using)

        assert 0 == Person.objects.using(using).count()

    def test_created_with_a_key_of_ones_own(
        self, using: str, recording: Recording, store_dsn: str
    ) -> None:
        """
        An object that brings its key is created once, and updated after that.
        """
        recording({Person: PEOPLE})
        Person(pk=40, name="a").save(using=using)
        Person(pk=40, name="b").save(using=using)
        Person.objects.using(using).update_or_create(pk=40, defaults={"name": "c"})

        assert [
            ("USER_CREATED", "40"),
            ("USER_UPDATED", "40"),
            ("USER_UPDATED", "40"),
        ] == [row[:2] for row in stored(store_dsn)]

    def test_what_a_delete_takes_along(
        self, using: str, recording: Recording, store_dsn: str
    ) -> None:
        """
        Cascades are recorded; a child in two tables is one object.
        """
        recording({Person: PEOPLE, Pet: Record("PET", updated=None)})
        worker = Worker(name="ann", job="smith")
        worker.save(using=using)
        Pet(owner_id=worker.pk, name="rex").save(using=using)
        worker.delete(using=using)

        codes = [row[0] for row in stored(store_dsn)]
        assert ["USER_CREATED", "PET_CREATED"] == codes[:2]
        assert ["PET_DELETED", "USER_DELETED"] == sorted(codes[2:])


@pytest.fixture
def people(using: str, recording: Recording) -> Any:
    """
    Return a queryset of three people who are recorded from now on.
    """
    every = Person.objects.using(using)
    for number in (1, 2, 3):
        Person(pk=number, name=f"p{number}").save(using=using)
    recording({Person: PEOPLE})
    return every


class TestQuerysets:
    def test_update(self, people: Any, store_dsn: str) -> None:
        """
        Each updated row has its own old and new values, expressions included.
        """
        count = people.filter(pk__lt=3).update(
            mail=Concat("name", Value("@x")), age=F("age") + 1
        )

        assert 2 == count
        assert [
            changed("USER_UPDATED", "1", mail=("", "p1@x"), age=(0, 1)),
            changed("USER_UPDATED", "2", mail=("", "p2@x"), age=(0, 1)),
        ] == stored(store_dsn)

    def test_an_update_of_what_is_looked_for(self, people: Any, store_dsn: str) -> None:
        """
        Rows that no longer match after the update are told all the same.
        """
        people.filter(name="p1").update(name="other")
        people.filter(name="nobody").update(name="x")

        assert [changed("USER_UPDATED", "1", name=("p1", "other"))] == stored(store_dsn)

    def test_bulk_create_and_bulk_update(self, people: Any, store_dsn: str) -> None:
        """
        Objects of bulk_create() and bulk_update() have a row each.
        """
        made = people.bulk_create([Person(pk=n, name=f"b{n}") for n in (7, 8)])
        for person in made:
            person.age = person.pk
        people.bulk_update(made, ["age"])

        assert [
            ("USER_CREATED", "7"),
            ("USER_CREATED", "8"),
            ("USER_UPDATED", "7"),
            ("USER_UPDATED", "8"),
        ] == [row[:2] for row in stored(store_dsn)]

    def test_conflicts(self, people: Any, store_dsn: str) -> None:
        """
        Of what a conflict may have kept out, one row tells what was tried.
        """
        people.bulk_create(
            [Person(pk=n, name="x") for n in (1, 9)], ignore_conflicts=True
        )

        ((code, target, detail),) = stored(store_dsn)
        assert ("USER_CREATED", "Person", None) == (code, target, detail["count"])
        assert ["1", "9"] == [each["target"] for each in detail["sample"]]

    def test_delete(self, people: Any, store_dsn: str) -> None:
        """
        A queryset's delete() has a row for each object.
        """
        done, _ = people.filter(pk__gt=1).delete()

        assert 2 == done
        assert {("USER_DELETED", "2"), ("USER_DELETED", "3")} == {
            row[:2] for row in stored(store_dsn)
        }

    def test_the_async_twins(self, people: Any, store_dsn: str) -> None:
        """
        Async methods of a queryset, such as aupdate(), go the same way.
        """

        async def use() -> None:
            await people.filter(pk=1).aupdate(name="a")
            # The thread of async calls outlives this test, and so would its connection.
            await sync_to_async(drop)()

        def drop() -> None:
            DjangoConnection.handler()["business"].close()
            del DjangoConnection.handler()["business"]

        asyncio.run(use())

        assert [("USER_UPDATED", "1")] == [row[:2] for row in stored(store_dsn)]

    def test_of_many_there_is_one_row(
        self, using: str, recording: Recording, store_dsn: str
    ) -> None:
        """
        Above *each*, one row tells the number and a sample.
        """
        recording({Person: Record("USER", fields=["name"], each=10, sample=2)})
        every = Person.objects.using(using)
        every.bulk_create([Person(name=f"n{n}") for n in range(50)])
        every.update(name="same")
        every.all().delete()

        rows = stored(store_dsn)
        assert ["USER_CREATED", "USER_UPDATED", "USER_DELETED"] == [r[0] for r in rows]
        assert [50, 50, 50] == [row[2]["count"] for row in rows]
        assert [2, 2, 2] == [len(row[2]["sample"]) for row in rows]

    @pytest.mark.parametrize("store_dsn", ["sqlite"], indirect=True)
    def test_a_delete_holds_the_lock_before_it_reads(
        self, using: str, recording: Recording, store_dsn: str
    ) -> None:
        """
        On SQLite nobody gets between what a delete loads and what it deletes.
        """
        recording({Person: Record("USER", fields=["name"])})
        Person.objects.using(using).bulk_create([Person(name="ann")])
        said: list[str] = []

        def write(**_: Any) -> None:
            path = store_dsn.removeprefix("sqlite:///")
            with closing(sqlite3.connect(path, timeout=0)) as other:
                try:
                    other.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError as error:
                    said.append(str(error))

        pre_delete.connect(write, sender=Person)
        try:
            Person.objects.using(using).all().delete()
        finally:
            pre_delete.disconnect(write, sender=Person)

        assert ["database is locked"] == said

    @pytest.mark.slow
    def test_a_thousand(self, using: str, recording: Recording, store_dsn: str) -> None:
        """
        bulk_create() and update() of 1,000 rows are 1,000 audit rows each.
        """
        recording({Person: PEOPLE})
        every = Person.objects.using(using)
        every.bulk_create([Person(name=f"n{n}") for n in range(1000)])
        every.update(name="y")
        assert fasten.flush(60)

        rows = rows_of(store_dsn)
        assert [] == faults(rows)
        assert 2000 == len({(row["code"], row["target"]) for row in rows}) == len(rows)


class TestWays:
    def test_after_the_commit(
        self, using: str, recording: Recording, store_dsn: str
    ) -> None:
        """
        Without an outbox rows are emitted after the commit, and never before it.
        """
        recording({Person: Record("USER", is_transactional=False)})
        with suppress(ZeroDivisionError), transaction.atomic(using=using):
            Person(name="a").save(using=using)
            raise ZeroDivisionError
        with transaction.atomic(using=using):
            Person(name="b").save(using=using)
            assert 0 == fasten.stats()["emitted"]

        assert [("USER_CREATED", "b")] == [
            (row[0], row[2]["changes"]["name"]["after"]) for row in stored(store_dsn)
        ]

    def test_other_models_are_left_alone(
        self, using: str, recording: Recording, store_dsn: str
    ) -> None:
        """
        Models that nobody named go Django's own way.
        """
        recording({User: FIELDS})
        Person(pk=1, name="a").save(using=using)
        Person.objects.using(using).update(name="b")
        Person.objects.using(using).all().delete()

        assert [] == stored(store_dsn)

    def test_the_end(self, store_dsn: str, using: str) -> None:
        """
        What install() returns gives Django its methods back.
        """
        before = models.Model.save_base, models.QuerySet.update
        end = install({Person: PEOPLE})
        assert before != (models.Model.save_base, models.QuerySet.update)
        end()

        assert before == (models.Model.save_base, models.QuerySet.update)

    def test_a_code_that_nobody_registered(self) -> None:
        """
        It is refused at once, not inside somebody's save().
        """
        with pytest.raises(fasten.UnknownCode, match="GROUP_CREATED"):
            install({Group: Record("GROUP")})
