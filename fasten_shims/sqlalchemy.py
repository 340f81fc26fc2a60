# SPDX-License-Identifier: Apache-2.0
"""
SQLAlchemy: changes of chosen models become audit rows of the same transaction.

Objects that a session flushes are seen, and insert(), update() and delete() statements
that it executes. Statements of a Connection, and the legacy bulk_*() methods, are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from fasten import emit
from fasten_shims._models import Change, Kind, Record, found_for, rows_of

__all__ = ["Record", "install"]


def install(sessions: Any, models: Mapping[type, Record]) -> Callable[[], None]:
    """
    Record the changes that *sessions* make to *models*; return what ends it.

    *sessions* is a sessionmaker, an async_sessionmaker, a scoped_session, a class of
    sessions or one session. A subclass of a model is recorded as the model.

    Raises:
        UnknownCode: a code of *models* is not registered.
        TypeError: *sessions* is none of these.
    """
    from sqlalchemy import event

    for record in models.values():
        record.check()
    recorder = _Recorder(dict(models))
    target = _listened(sessions)
    listeners: list[tuple[str, Callable[..., Any]]] = [
        ("after_flush", recorder.flushed),
        ("do_orm_execute", recorder.executing),
        ("after_commit", recorder.committed),
        ("after_soft_rollback", recorder.rolled_back),
    ]
    for name, listener in listeners:
        event.listen(target, name, listener)

    def end() -> None:
        for name, listener in listeners:
            event.remove(target, name, listener)

    return end


def _listened(sessions: Any) -> Any:
    """
    Return what SQLAlchemy listens to: its async makers know no events of their own.
    """
    from sqlalchemy import orm
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    if isinstance(sessions, async_sessionmaker):
        given = sessions.kw.get("sync_session_class")
        base = given or sessions.class_.sync_session_class
        if given is None:
            # A class of its own: those of other makers are not recorded.
            given = type("RecordedSession", (base,), {})
            sessions.configure(sync_session_class=given)
        return given
    if isinstance(sessions, AsyncSession):
        return sessions.sync_session
    is_class = isinstance(sessions, type) and issubclass(sessions, orm.Session)
    kinds = (orm.sessionmaker, orm.scoped_session, orm.Session)
    if is_class or isinstance(sessions, kinds):
        return sessions
    raise TypeError(
        f"install() listens to sessions, not to {sessions!r:.80}; pass a sessionmaker, "
        "an async_sessionmaker or a class of sessions"
    )


class _Recorder:
    """
    What listens to sessions, and keeps rows that wait for a commit.
    """

    def __init__(self, models: dict[type, Record]) -> None:
        self._models = models
        # Each with the transaction that it belongs to.
        self._late: WeakKeyDictionary[Any, list[tuple[Any, dict[str, Any]]]] = (
            WeakKeyDictionary()
        )

    # -- the unit of work --

    def flushed(self, session: Any, _context: Any) -> None:
        """
        Record what a flush has written.
        """
        for kind, objects in (
            ("created", session.new),
            ("updated", session.dirty),
            ("deleted", session.deleted),
        ):
            for found in objects:
                self._flushed_one(session, kind, found)

    def _flushed_one(self, session: Any, kind: Any, found: Any) -> None:
        record = found_for(self._models, type(found))
        if record is None:
            return
        change = _change(record, kind, found)
        self._tell(session, record, kind, [change], 1, type(found))

    # -- statements --

    def executing(self, state: Any) -> Any:
        """
        Record what a statement does; return its result.
        """
        if not (state.is_insert or state.is_update or state.is_delete):
            return None
        model = self._model_of(state)
        if model is None:
            return None
        way = _Inserted if state.is_insert else _Changed
        return way(self, state, model, self._models[model]).run()

    def _model_of(self, state: Any) -> type | None:
        """
        Return the recorded model whose table a statement writes.
        """
        from sqlalchemy import inspect

        table = state.statement.table
        given = state.bind_mapper.class_ if state.bind_mapper is not None else None
        if given is not None and (record := found_for(self._models, given)):
            return next(m for m, known in self._models.items() if known is record)
        for model in self._models:
            mapper: Any = inspect(model)
            if mapper.local_table is table:
                return model
        return None

    # -- telling --

    def tell(
        self,
        state: Any,
        model: type,
        kind: Kind,
        made: Sequence[Change],
        count: int | None,
    ) -> None:
        """
        Record what a statement did.
        """
        self._tell(state.session, self._models[model], kind, made, count, model)

    def _tell(
        self,
        session: Any,
        record: Record,
        kind: Kind,
        made: Sequence[Change],
        count: int | None,
        model: type,
    ) -> None:
        for row in rows_of(record, kind, made, count, model.__name__):
            if record.is_transactional:
                emit(**row, connection=session)
                continue
            transaction = session.get_nested_transaction() or session.get_transaction()
            self._late.setdefault(session, []).append((transaction, row))

    def committed(self, session: Any) -> None:
        """
        Emit what waited for the commit; of a savepoint, it waits for the outer one.
        """
        waiting = self._late.get(session)
        if not waiting:
            return
        nested = session.get_nested_transaction()
        if nested is not None:
            waiting[:] = [
                (nested.parent if owner is nested else owner, row)
                for owner, row in waiting
            ]
            return
        rows, waiting[:] = list(waiting), []
        for _, row in rows:
            emit(**row)

    def rolled_back(self, session: Any, transaction: Any) -> None:
        """
        Forget what belonged to a transaction that is rolled back, or was inside it.
        """
        waiting = self._late.get(session)
        if waiting:
            waiting[:] = [each for each in waiting if not _is_in(each[0], transaction)]


def _is_in(inner: Any, outer: Any) -> bool:
    while inner is not None:
        if inner is outer:
            return True
        inner = inner.parent
    return False


def _change(record: Record, kind: Kind, found: Any) -> Change:
    """
    Read what the session knows of an object, without loading more.
    """
    from sqlalchemy import inspect

    state = inspect(found)
    mapper = state.mapper
    keys = [column.key for column in mapper.column_attrs]
    loaded = {key: state.dict[key] for key in keys if key in state.dict}
    identity = state.identity or mapper.primary_key_from_instance(found)
    target = record.name(loaded, identity)
    if kind == "created":
        return Change(target, None, loaded)
    if kind == "deleted":
        return Change(target, loaded, None)
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    for key in keys:
        history = state.attrs[key].history
        # A value that was never loaded is not known, and that side is left out.
        if history.has_changes() and history.deleted:
            before[key] = history.deleted[0]
        if history.has_changes() and history.added:
            after[key] = history.added[0]
    return Change(target, before, after)


class _Statement:
    """
    One insert(), update() or delete() of a session, and the table it writes.
    """

    def __init__(
        self, recorder: _Recorder, state: Any, model: type, record: Record
    ) -> None:
        from sqlalchemy import inspect

        self._recorder, self._state = recorder, state
        self._model, self._record = model, record
        mapper: Any = inspect(model)
        self.statement = state.statement
        self.table = state.statement.table
        #: The columns that are looked at, by the names of their attributes.
        self.columns = {
            mapper.get_property_by_column(column).key: column
            for column in self.table.columns
            if mapper.has_property(_key_of(mapper, column))
        }
        self.keys = [
            name for name, column in self.columns.items() if column.primary_key
        ]
        self.chosen = {
            name: column
            for name, column in self.columns.items()
            if name in self.keys or record.target or record.is_chosen(name)
        }
        parameters = state.parameters
        self.many = parameters if isinstance(parameters, list) else None

    def change(
        self, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
    ) -> Change:
        """
        Name the object whose columns these are.
        """
        known = {**(before or {}), **(after or {})}
        key = [known.get(name) for name in self.keys]
        return Change(self._record.name(known, key), before, after)

    def read(self, query: Any, parameters: Any = None) -> list[dict[str, Any]]:
        """
        Read columns in the session's transaction, past the session's objects.
        """
        state = self._state
        connection = state.session.connection(bind_arguments=state.bind_arguments)
        names = list(self.chosen)
        found = connection.execute(query, parameters or {}).all()
        return [dict(zip(names, row, strict=True)) for row in found]

    def tell(self, kind: Kind, made: Sequence[Change], count: int | None) -> None:
        """
        Record what was done.
        """
        self._recorder.tell(self._state, self._model, kind, made, count)


def _key_of(mapper: Any, column: Any) -> str:
    try:
        return str(mapper.get_property_by_column(column).key)
    except Exception:  # a column that the model leaves out
        return ""


class _Changed(_Statement):
    """
    An update() or delete(): looked at before, and after.
    """

    def run(self) -> Any:
        """
        Execute the statement; record it; return its result.
        """
        state, record = self._state, self._record
        kind: Kind = "updated" if state.is_update else "deleted"
        if record.code(kind) is None:
            return None
        if state.session.autoflush:
            state.session.flush()  # as the statement itself would, a moment later
        known = self._before()
        result = state.invoke_statement()
        count = self._count(result, known)
        if count is None or count > record.each:
            known = known[: record.sample]
        after = self._after(known)
        made = [self.change(row, after.get(self._key(row))) for row in known]
        if kind == "deleted":
            made = [change for change in made if change.after is None]
        if count is not None and count <= record.each:
            count = len(made)
        self.tell(kind, made, count)
        return result

    def _before(self) -> list[dict[str, Any]]:
        from sqlalchemy import select

        self._lock()
        query = select(*self.chosen.values()).limit(self._record.each + 1)
        # Locked, as the statement is about to do: what is read is what it changes.
        query = query.with_for_update(of=self.table)
        if self.many is not None:
            return self.read(query.where(self._is_one_of(self.many)))
        where = self.statement.whereclause
        return self.read(
            query if where is None else query.where(where), self._state.parameters
        )

    def _lock(self) -> None:
        """
        Take SQLite's lock of writers before we read.

        A transaction that has read cannot begin to write once another has written:
        the caller's own statement would fail, and without us it would not.
        """
        from sqlalchemy import false

        state = self._state
        connection = state.session.connection(bind_arguments=state.bind_arguments)
        if connection.dialect.name == "sqlite":
            column = self.columns[self.keys[0]]
            nothing = self.table.update().where(false()).values({column: column})
            connection.execute(nothing)

    def _count(self, result: Any, known: list[dict[str, Any]]) -> int | None:
        if len(known) <= self._record.each:
            return len(known)
        if self.many is not None:
            return len(self.many)
        count = getattr(result, "rowcount", -1)
        return count if count is not None and count >= 0 else None

    def _after(self, known: list[dict[str, Any]]) -> dict[tuple[Any, ...], Any]:
        from sqlalchemy import select

        if not known:
            return {}
        query = select(*self.chosen.values()).where(self._is_one_of(known))
        return {self._key(row): row for row in self.read(query)}

    def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.keys)

    def _is_one_of(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        from sqlalchemy import tuple_

        columns = [self.columns[name] for name in self.keys]
        rows = rows[: self._record.each + 1]
        if len(columns) == 1:
            return columns[0].in_([row[self.keys[0]] for row in rows])
        return tuple_(*columns).in_([self._key(row) for row in rows])


class _Inserted(_Statement):
    """
    An insert(): its rows are what it returns, or was given.
    """

    def run(self) -> Any:
        """
        Execute the statement; record it; return its result.
        """
        if self._record.code("created") is None:
            return None
        if self.statement.select is not None:
            return self._from_select()
        if self.many is not None and len(self.many) > self._record.each:
            result = self._state.invoke_statement()
            given = self.many[: self._record.sample]
            self._tell_rows([self._named(row) for row in given], len(self.many))
            return result
        if self._returns:
            return self._returned()
        return self._returning()

    @property
    def _returns(self) -> bool:
        # The public names remember their answer, and what the caller derives from this
        # statement would inherit it.
        return bool(getattr(self.statement, "_returning", ()))

    def _from_select(self) -> Any:
        options = {"preserve_rowcount": True}  # of an insert it is dropped otherwise
        result = self._state.invoke_statement(execution_options=options)
        count = getattr(result, "rowcount", -1)
        self.tell("created", [], count if count is not None and count >= 0 else None)
        return result

    def _named(self, row: Mapping[Any, Any]) -> dict[str, Any]:
        """
        Spell what a caller handed in by the names of attributes.
        """
        names = {column.key: name for name, column in self.columns.items()}
        named = {names.get(str(key), str(key)): value for key, value in row.items()}
        return {name: value for name, value in named.items() if name in self.chosen}

    def _tell_rows(self, rows: list[dict[str, Any]], count: int) -> None:
        self.tell("created", [self.change(None, row) for row in rows], count)

    def _returned(self) -> Any:
        """
        Look at what the caller asked to be returned, and hand it on.
        """
        frozen = self._state.invoke_statement().freeze()
        rows = []
        for found in frozen().mappings():
            row: dict[str, Any] = {}
            for key, value in found.items():
                loaded = getattr(value, "__dict__", None)
                is_model = isinstance(value, self._model) and loaded is not None
                row |= loaded if is_model and loaded else {str(key): value}
            rows.append(self._named(row))
        self._tell_rows(rows, len(rows))
        return frozen()

    def _returning(self) -> Any:
        """
        Ask for what was inserted, keys that the database made included.
        """
        from sqlalchemy.engine import CursorResult

        dialect = self._dialect
        is_one = self.many is None and not _is_multiple(self.statement)
        returns = (
            dialect.insert_returning if is_one else dialect.insert_executemany_returning
        )
        if is_one or not returns:
            result = self._state.invoke_statement()
            if is_one and isinstance(result, CursorResult):
                self._tell_rows(self._found(result.inserted_primary_key), 1)
            else:
                given = self.many or [{}]
                self._tell_rows([self._named(row) for row in given], len(given))
            return result
        asked = self.statement.returning(*self.chosen.values())
        result = self._state.invoke_statement(statement=asked)
        rows = [dict(zip(self.chosen, row, strict=True)) for row in result.all()]
        # Nobody reads the rows of an insert that returns none, but some its count.
        result.rowcount = len(rows)
        self._tell_rows(rows, len(rows))
        return result

    def _found(self, key: Any) -> list[dict[str, Any]]:
        from sqlalchemy import and_, select

        pairs = zip(self.keys, key, strict=True)
        matches = [self.columns[name] == part for name, part in pairs]
        return self.read(select(*self.chosen.values()).where(and_(*matches)))

    @property
    def _dialect(self) -> Any:
        state = self._state
        return state.session.get_bind(**state.bind_arguments).dialect


def _is_multiple(statement: Any) -> bool:
    # insert().values([...]): what it holds has no public name.
    return bool(getattr(statement, "_multi_values", ()))
