# SPDX-License-Identifier: Apache-2.0
"""
What ORM audit packages record of a bulk statement over 1,000 rows, and what we do.

`python -m benchmarks.bulk_peers`, with django-auditlog, django-simple-history and
sqlalchemy-continuum installed beside fasten; those that are not are left out.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import fasten

ROWS = 1_000
PRINTED = "{:24}{:>14}{:>14}"


@contextmanager
def recording(folder: Path) -> Iterator[Callable[[], int]]:
    """
    Run fasten on a file of *folder*; yield what counts its rows since the last count.
    """
    dsn = f"sqlite:///{folder / 'audit.db'}"
    fasten.init(
        service_id="peers",
        node_id="n",
        stdout="",
        audit_dsn=dsn,
        outbox_dsn=outbox(folder),
    )
    counted = 0

    def count() -> int:
        nonlocal counted
        assert fasten.flush(120)
        before, counted = counted, int(fasten.stats()["moved"])
        return counted - before

    yield count
    fasten.close()


def outbox(folder: Path) -> str:
    """
    Return the DSN of the business.
    """
    return f"sqlite:///{folder / 'business.db'}"


def django(folder: Path) -> None:
    """
    Count for Django: bulk_create(), then update() of a queryset.
    """
    from django.conf import settings

    peers = [name for name in ("auditlog", "simple_history") if find_spec(name)]
    settings.configure(
        SECRET_KEY="none",
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(folder / "business.db"),
            }
        },
        INSTALLED_APPS=[
            "django.contrib.contenttypes",
            "django.contrib.auth",
            *peers,
        ],
        USE_TZ=True,
    )
    import django as framework

    framework.setup()
    from django.core.management import call_command
    from django.db import connection, models

    class Person(models.Model):
        name = models.CharField(max_length=50)

        if "simple_history" in peers:
            from simple_history.models import HistoricalRecords

            history = HistoricalRecords()

        class Meta:
            app_label = "auth"

        def __str__(self) -> str:
            return self.name

    call_command("migrate", verbosity=0)
    with connection.schema_editor() as editor:
        for model in [
            Person,
            *([Person.history.model] if "simple_history" in peers else []),
        ]:
            editor.create_model(model)
    counts: dict[str, Callable[[], int]] = {}
    if "auditlog" in peers:
        from auditlog.models import LogEntry
        from auditlog.registry import auditlog

        auditlog.register(Person)
        counts["django-auditlog"] = LogEntry.objects.count
    if "simple_history" in peers:
        counts["django-simple-history"] = Person.history.count
    from fasten.shim.django.orm import Record, install

    install({Person: Record("USER", fields=["name"])})
    with recording(folder) as ours:
        counts["fasten"] = ours
        compare(
            counts,
            lambda: Person.objects.bulk_create(
                Person(name=f"n{n}") for n in range(ROWS)
            ),
            lambda: Person.objects.update(name="same"),
        )


def sqlalchemy(folder: Path) -> None:
    """
    Count for SQLAlchemy: insert() of many parameters, then update().
    """
    import sqlalchemy as sa
    from sqlalchemy import orm

    has_peer = find_spec("sqlalchemy_continuum") is not None
    if has_peer:
        from sqlalchemy_continuum import make_versioned, version_class

        make_versioned(user_cls=None)
    base = orm.declarative_base()

    class Person(base):  # type: ignore[valid-type,misc]
        __versioned__: ClassVar[dict[str, Any]] = {}
        __tablename__ = "people"
        id = sa.Column(sa.Integer, primary_key=True)
        name = sa.Column(sa.String(50))

    orm.configure_mappers()
    engine = sa.create_engine(outbox(folder))
    base.metadata.create_all(engine)
    session = orm.sessionmaker(engine)
    from fasten.shim.sqlalchemy import Record, install

    install(session, {Person: Record("USER", fields=["name"])})
    counts: dict[str, Callable[[], int]] = {}
    if has_peer:
        counts["sqlalchemy-continuum"] = lambda: _count(session, version_class(Person))

    def do(*statement: Any) -> None:
        with session.begin() as running:
            running.execute(*statement)

    with recording(folder) as ours:
        counts["fasten"] = ours
        compare(
            counts,
            lambda: do(sa.insert(Person), [{"name": f"n{n}"} for n in range(ROWS)]),
            lambda: do(sa.update(Person).values(name="same")),
        )


def _count(session: Any, model: Any) -> int:
    import sqlalchemy as sa

    with session() as running:
        return int(
            running.execute(sa.select(sa.func.count()).select_from(model)).scalar()
        )


def compare(
    counts: dict[str, Callable[[], int]],
    create: Callable[[], Any],
    update: Callable[[], Any],
) -> None:
    """
    Do both; print what each package has recorded of either.
    """
    created = (create(), {name: count() for name, count in counts.items()})[1]
    updated = (update(), {name: count() for name, count in counts.items()})[1]
    for name in counts:
        # Theirs count all they have, ours what is new.
        of_update = updated[name] - (0 if name == "fasten" else created[name])
        print(PRINTED.format(name, created[name], of_update))


def main() -> None:
    """
    Print both tables.
    """
    for run in (django, sqlalchemy):
        print(PRINTED.format(run.__name__, "bulk insert", "bulk update"))
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            run(Path(folder))
        print()


if __name__ == "__main__":
    main()
