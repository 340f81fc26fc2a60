# SPDX-License-Identifier: Apache-2.0
"""
Django's ORM: changes of chosen models become audit rows of the same transaction.

save(), delete(), and the update(), bulk_create(), bulk_update() and delete() of
querysets are seen, and what they cascade to. Raw SQL is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

from fasten import emit
from fasten_shims._models import Change, Kind, Record, found_for, rows_of

__all__ = ["Record", "install"]

_Deleted = dict[tuple[type, str], tuple[str, Record, Change]]


def install(models: Mapping[type, Record]) -> Callable[[], None]:
    """
    Record the changes of *models*; return what ends it.

    A subclass of a model is recorded as the model. Call it in `AppConfig.ready()`. Each
    statement and its rows are one transaction, whether the caller opened one or not.

    Raises:
        UnknownCode: a code of *models* is not registered.
    """
    for record in models.values():
        record.check()
    recorder = _Recorder(dict(models))
    recorder.begin()
    return recorder.end


class _Recorder:
    """
    What stands in for methods of Django's ORM.
    """

    def __init__(self, models: dict[type, Record]) -> None:
        self._models = models
        self._replaced: list[tuple[type, str, Any, Any]] = []
        self._deleted: ContextVar[_Deleted | None] = ContextVar(
            "fasten_deleted", default=None
        )

    def begin(self) -> None:
        """
        Take the methods' places.
        """
        from django.db.models import Model, QuerySet
        from django.db.models.signals import post_delete

        self._replace(Model, "save_base", self._saving)
        self._replace(Model, "delete", self._deleting)
        self._replace(QuerySet, "update", self._updating)
        self._replace(QuerySet, "bulk_create", self._creating)
        self._replace(QuerySet, "delete", self._deleting)
        for model in self._models:
            # Its listeners also keep Django from deleting without looking.
            post_delete.connect(self._was_deleted, sender=model)

    def _replace(self, owner: type, name: str, stand_in: Callable[..., Any]) -> None:
        original = owner.__dict__[name]

        @wraps(original)
        def method(this: Any, *args: Any, **kwargs: Any) -> Any:
            record = found_for(self._models, _model_of(this))
            if record is None and name != "delete":
                return original(this, *args, **kwargs)
            return stand_in(partial(original, this), record, this, args, kwargs)

        self._replaced.append((owner, name, original, method))
        setattr(owner, name, method)

    def end(self) -> None:
        """
        Give the methods back, but for those that somebody else has replaced since.
        """
        from django.db.models.signals import post_delete

        for owner, name, original, method in self._replaced:
            if owner.__dict__.get(name) is method:
                setattr(owner, name, original)
        for model in self._models:
            post_delete.disconnect(self._was_deleted, sender=model)
        self._models = {}

    # -- one object --

    def _saving(
        self, save: Any, record: Record, this: Any, args: Any, kwargs: Any
    ) -> None:
        from django.db import router, transaction

        using = kwargs.get("using") or router.db_for_write(type(this), instance=this)
        with transaction.atomic(using=using, savepoint=False):
            _lock(type(this), using)
            before = _one(record, this, using)
            save(*args, **kwargs)
            if before is None:
                change = _change(record, None, _loaded(record, this))
                self._tell(record, "created", [change], 1, type(this), using)
                return
            after = _one(record, this, using)
            change = _change(record, before, after)
            self._tell(record, "updated", [change], 1, type(this), using)

    def _deleting(
        self, delete: Any, _record: Record | None, this: Any, args: Any, kwargs: Any
    ) -> Any:
        if self._deleted.get() is not None:
            return delete(*args, **kwargs)
        from django.db import router, transaction

        using = kwargs.get("using") or (args[0] if args else None)
        if using is None:
            using = router.db_for_write(_model_of(this))
            using = getattr(this, "_db", None) or using
        with (
            transaction.atomic(using=using, savepoint=False),
            self._collecting() as all_,
        ):
            # Heard by us, a delete loads what it would have deleted unseen.
            _lock(_model_of(this), using)
            done = delete(*args, **kwargs)
            self._tell_deleted(all_)
        return done

    @contextmanager
    def _collecting(self) -> Iterator[_Deleted]:
        """
        Gather what one call deletes, whatever it cascades to.
        """
        found: _Deleted = {}
        token = self._deleted.set(found)
        try:
            yield found
        finally:
            self._deleted.reset(token)

    def _was_deleted(self, sender: type, instance: Any, using: str, **_: Any) -> None:
        record = found_for(self._models, sender)
        if record is None:
            return
        change = _change(record, _loaded(record, instance), None)
        found = self._deleted.get()
        if found is None:
            self._tell(record, "deleted", [change], 1, sender, using)
        else:
            # A child and its parents are one object, in several tables.
            model = next(model for model, r in self._models.items() if r is record)
            found[model, change.target] = using, record, change

    def _tell_deleted(self, found: _Deleted) -> None:
        groups: dict[tuple[type, str], list[Change]] = {}
        for (model, _), (using, _record, change) in found.items():
            groups.setdefault((model, using), []).append(change)
        for (model, using), made in groups.items():
            record = self._models[model]
            self._tell(record, "deleted", made, len(made), model, using)

    # -- querysets --

    def _updating(
        self, update: Any, record: Record, this: Any, args: Any, kwargs: Any
    ) -> Any:
        if record.code("updated") is None or this.query.is_sliced:
            return update(*args, **kwargs)
        from django.db import transaction

        this._for_write = True  # noqa: SLF001  (as the method itself does first)
        model, using = this.model, this.db
        with transaction.atomic(using=using, savepoint=False):
            _lock(model, using)
            keys = list(this.order_by().values_list("pk", flat=True)[: record.each + 1])
            is_each = len(keys) <= record.each
            keys = keys if is_each else keys[: record.sample]
            before = _read(record, model, using, keys)
            count = update(*args, **kwargs)
            after = {row["pk"]: row for row in _read(record, model, using, keys)}
            made = [_change(record, r, after.get(r["pk"])) for r in before]
            number = len(made) if is_each else count
            self._tell(record, "updated", made, number, model, using)
        return count

    def _creating(
        self, create: Any, record: Record, this: Any, args: Any, kwargs: Any
    ) -> Any:
        from django.db import transaction

        this._for_write = True  # noqa: SLF001  (as the method itself does first)
        model, using = this.model, this.db
        with transaction.atomic(using=using, savepoint=False):
            objects = create(*args, **kwargs)
            made = [_change(record, None, _loaded(record, o)) for o in objects]
            # Which of them met a conflict the database does not say.
            is_certain = not any(
                kwargs.get(name) for name in ("ignore_conflicts", "update_conflicts")
            )
            number = len(made) if is_certain else None
            if made:
                self._tell(record, "created", made, number, model, using)
        return objects

    # -- telling --

    def _tell(
        self,
        record: Record,
        kind: Kind,
        made: Sequence[Change],
        count: int | None,
        model: type,
        using: str,
    ) -> None:
        from django.db import connections, transaction

        for row in rows_of(record, kind, made, count, model.__name__):
            if record.is_transactional:
                emit(**row, connection=connections[using])
            else:
                transaction.on_commit(partial(_emit, row), using=using)


def _emit(row: Mapping[str, Any]) -> None:
    emit(**row)


def _model_of(this: Any) -> type:
    found: type = getattr(this, "model", None) or type(this)
    return found if isinstance(found, type) else type(this)


def _chosen(record: Record, model: Any) -> list[str]:
    """
    Return the columns that are looked at, by the names of their attributes.
    """
    names = [field.attname for field in model._meta.concrete_fields]  # noqa: SLF001
    return [name for name in names if record.target or record.is_chosen(name)]


def _lock(model: Any, using: str) -> None:
    """
    Take SQLite's lock of writers before we read.

    A transaction that has read cannot begin to write once another has written: the
    caller's own statement would fail, and without us it would not.
    """
    from django.db import connections

    connection = connections[using]
    if connection.vendor != "sqlite":
        return
    name = connection.ops.quote_name
    table = name(model._meta.db_table)  # noqa: SLF001
    column = name(model._meta.concrete_model._meta.local_concrete_fields[0].column)  # noqa: SLF001
    with connection.cursor() as cursor:
        cursor.execute(f"UPDATE {table} SET {column} = {column} WHERE 0")  # noqa: S608


def _read(
    record: Record, model: Any, using: str, keys: Sequence[Any]
) -> list[dict[str, Any]]:
    """
    Read rows, and lock them: what is read is what the next statement changes.
    """
    known = [key for key in keys if key is not None]
    if not known:
        return []
    rows = model._base_manager.using(using).filter(pk__in=known)  # noqa: SLF001
    return list(
        rows.order_by("pk").select_for_update().values("pk", *_chosen(record, model))
    )


def _one(record: Record, found: Any, using: str) -> dict[str, Any] | None:
    rows = _read(record, type(found), using, [found.pk])
    return rows[0] if rows else None


def _loaded(record: Record, found: Any) -> dict[str, Any]:
    """
    Return what an object holds, without loading what it left out.
    """
    state = found.__dict__
    names = [name for name in _chosen(record, type(found)) if name in state]
    values = {name: state[name] for name in names}
    # An expression is not a value: what it gave is in the database only.
    values = {k: v for k, v in values.items() if not hasattr(v, "resolve_expression")}
    return {"pk": found.pk, **values}


def _change(
    record: Record,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
) -> Change:
    known = {**(before or {}), **(after or {})}
    key = known.get("pk")
    target = record.name(known, key if isinstance(key, tuple) else (key,))
    return Change(target, _columns(before), _columns(after))


def _columns(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if row is None:
        return None
    return {name: value for name, value in row.items() if name != "pk"}
