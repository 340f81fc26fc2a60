# SPDX-License-Identifier: Apache-2.0
"""
The libraries that a user would pick instead, each behind the same three methods.

Each is set up as its own documentation does. Whoever needs a package imports it when
it is opened: one that is not installed is reported, not left out.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["PEERS", "Peer"]

Event = dict[str, Any]
FIRST_S, QUIET_S = 20.0, 3.0


class Peer:
    """
    One library over one store in a folder of its own.

    *package* is its distribution, *store* where events end up, *keeps* what a row is
    there besides its text.
    """

    package: ClassVar[str]
    store: ClassVar[str]
    keeps: ClassVar[str] = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self) -> None:
        """
        Get ready to record.
        """
        raise NotImplementedError

    def record(self, event: Event) -> None:
        """
        Record one event, as a caller would.
        """
        raise NotImplementedError

    def settle(self) -> None:
        """
        Return when all that was recorded is in the store; more may follow.
        """

    def targets(self) -> Iterable[str]:
        """
        Read the target of each stored event, in a process that comes afterwards.
        """
        raise NotImplementedError


class _InFile(Peer):
    """
    Events as lines of JSON.
    """

    store = "JSONL"

    @property
    def path(self) -> Path:
        """
        Return the file of events.
        """
        return self.folder / "audit.jsonl"

    def target_of(self, line: Any) -> str:
        """
        Return the target that a line holds.
        """
        raise NotImplementedError

    def targets(self) -> Iterable[str]:
        """
        Read the whole lines.
        """
        for line in self.path.read_text().splitlines():
            try:
                yield self.target_of(json.loads(line))
            except ValueError:  # torn by the kill
                continue


class _InTable(Peer):
    """
    Events as rows of a SQLite file.
    """

    store = "SQLite"
    sql: ClassVar[str]

    @property
    def path(self) -> Path:
        """
        Return the database's file.
        """
        return self.folder / "audit.db"

    def targets(self) -> Iterable[str]:
        """
        Select the targets.
        """
        connection = sqlite3.connect(self.path)
        try:
            yield from (target for (target,) in connection.execute(self.sql))
        except sqlite3.OperationalError:  # no table yet
            return
        finally:
            connection.close()


class Fasten(_InTable):
    """
    Fasten, with its defaults: journal, redaction, seal, indexes, synchronous=FULL.
    """

    package = "fasten"
    keeps = "sealed, indexed"
    sql = "SELECT target FROM audit_log"

    def open(self) -> None:
        """
        Start with a spool beside the file.
        """
        import fasten

        dsn = f"sqlite:///{self.path}"
        fasten.init(service_id="peers", node_id="n", audit_dsn=dsn, stdout="")
        self.record = lambda event: fasten.emit(**event)  # type: ignore[method-assign]

    def settle(self) -> None:
        """
        Wait for the drainer.
        """
        import fasten

        assert fasten.flush(120)

    def targets(self) -> Iterable[str]:
        """
        Start a process of the same service: that is what brings rows home.
        """
        import fasten

        self.open()
        found: list[str] = []
        grown_at = time.monotonic()
        while time.monotonic() - grown_at < (QUIET_S if found else FIRST_S):
            fasten.flush(1)
            now = list(super().targets())
            if len(now) > len(found):
                found, grown_at = now, time.monotonic()
            time.sleep(0.1)
        fasten.close()
        return found


class RustPyAudit(_InFile):
    """
    rust-py-audit: a chained line per call, from Rust.
    """

    package = "rust-py-audit"
    keeps = "sealed"
    is_synced = False

    def open(self) -> None:
        """
        Open its log.
        """
        from rust_py_audit import AuditLogger

        self._log = AuditLogger(
            app_name="peers", file_path=str(self.path), fsync=self.is_synced
        )

    def record(self, event: Event) -> None:
        """
        Log one event; it is in the file when this returns.
        """
        self._log.log(
            actor_id=event["actor"],
            action=event["code"],
            resource="order",
            resource_id=event["target"],
            metadata=event["detail"],
        )

    def target_of(self, line: Any) -> str:
        """
        Return the resource's id.
        """
        return str(line["resource_id"])


class RustPyAuditSynced(RustPyAudit):
    """
    The same, synced to disk on each call.
    """

    is_synced = True
    store = "JSONL, fsync"


class FirmAudit(_InTable):
    """
    firm-audit: a row a transaction, signed with a key.
    """

    package = "firm-audit"
    keeps = "signed, indexed"
    sql = "SELECT subject_id FROM firm_audit_events"

    def open(self) -> None:
        """
        Open it with a key, so that its rows are evidence, too.
        """
        from firm.audit import AuditLog

        self._log = AuditLog(f"sqlite:///{self.path}", mac_key="k" * 32)

    def record(self, event: Event) -> None:
        """
        Record one event in its own transaction.
        """
        self._log.record(
            event["code"],
            subject=("Order", event["target"]),
            actor=("User", event["actor"]),
            data=event["detail"],
        )


class Airlog(_InFile):
    """
    airlog: a checksummed line per call, through loguru.
    """

    package = "airlog"
    keeps = "checksums"

    def open(self) -> None:
        """
        Add its sink.
        """
        from airlog import LoguruAuditStream, Principal

        self._principal = Principal
        self._stream = LoguruAuditStream(sink=str(self.path))

    def record(self, event: Event) -> None:
        """
        Record one event; loguru writes it before this returns.
        """
        self._stream.record(
            event["code"],
            principal=self._principal(subject=event["actor"], auth_method="password"),
            resource="order",
            resource_id=event["target"],
            context=event["detail"],
        )

    def target_of(self, line: Any) -> str:
        """
        Return the resource's id.
        """
        return str(line["record"]["extra"]["resource_id"])


class DjangoAuditlog(_InTable):
    """
    django-auditlog: an entry per change of a model; the change itself is not counted.
    """

    package = "django-auditlog"
    keeps = "indexed"
    sql = "SELECT object_pk FROM auditlog_logentry"

    def open(self) -> None:
        """
        Set Django up and make the tables.
        """
        from django.conf import settings

        settings.configure(
            SECRET_KEY="none",
            USE_TZ=True,
            INSTALLED_APPS=[
                "django.contrib.contenttypes",
                "django.contrib.auth",
                "auditlog",
            ],
            DATABASES={
                "default": {
                    "ENGINE": "django.db.backends.sqlite3",
                    "NAME": str(self.path),
                    "OPTIONS": {
                        "init_command": "PRAGMA journal_mode=WAL",
                        "transaction_mode": "IMMEDIATE",
                    },
                }
            },
        )
        import django

        django.setup()
        from django.core.management import call_command
        from django.db import models

        class Order(models.Model):
            number = models.CharField(max_length=50, primary_key=True)

            class Meta:
                app_label = "auth"

            def __str__(self) -> str:
                return str(self.number)

        call_command("migrate", verbosity=0)
        from auditlog.models import LogEntry

        self._order, self._entry = Order, LogEntry

    def record(self, event: Event) -> None:
        """
        Make the entry that its signal handlers make.
        """
        self._entry.objects.log_create(
            self._order(number=event["target"]),
            action=self._entry.Action.UPDATE,
            actor_email=event["actor"],
            changes={"detail": ["", json.dumps(event["detail"])]},
        )


class _Rows(logging.handlers.BufferingHandler):
    """
    What people write behind a QueueListener: 500 records a transaction.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(500)
        self._connection = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False
        )
        self._connection.execute("PRAGMA journal_mode = WAL")

    def flush(self) -> None:
        """
        Insert what is in the buffer.
        """
        names = ("created", "levelname", "msg", "target", "actor", "detail")
        rows = [tuple(getattr(r, name) for name in names) for r in self.buffer]
        self.buffer.clear()
        run = self._connection
        run.execute("BEGIN IMMEDIATE")
        run.executemany("INSERT INTO log VALUES (?, ?, ?, ?, ?, ?)", rows)
        run.execute("COMMIT")


class StdlibQueue(_InTable):
    """
    The standard library's QueueHandler and QueueListener, before a table.
    """

    package = "python"
    keeps = "neither"
    sql = "SELECT target FROM log"
    indexed: ClassVar[tuple[str, ...]] = ()

    def open(self) -> None:
        """
        Make the table, and start the listener.
        """
        connection = sqlite3.connect(self.path)
        connection.execute("CREATE TABLE log (at, level, code, target, actor, detail)")
        for name in self.indexed:
            connection.execute(f"CREATE INDEX log_{name} ON log ({name})")
        connection.close()
        lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        self._listener = logging.handlers.QueueListener(lines, _Rows(self.path))
        self._listener.start()
        self._logger = logging.getLogger("peers")
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(logging.handlers.QueueHandler(lines))
        self._logger.propagate = False

    def record(self, event: Event) -> None:
        """
        Log one event; its detail is spelt here, before it may change.
        """
        extra = {"target": event["target"], "actor": event["actor"]}
        extra["detail"] = json.dumps(event["detail"])
        self._logger.info(event["code"], extra=extra)

    def settle(self) -> None:
        """
        Stop the listener, which empties the queue first, and start it again.
        """
        self._listener.stop()
        for handler in self._listener.handlers:
            handler.flush()
        self._listener.start()


class IndexedQueue(StdlibQueue):
    """
    The same with indexes on what an audit log is asked for: when, on what, by whom.
    """

    keeps = "indexed"
    indexed = ("at", "target", "actor")


class Auditchain(_InTable):
    """
    auditchain: a chained row a transaction, through its synchronous face.
    """

    package = "auditchain"
    keeps = "sealed"
    sql = "SELECT subject FROM audit_records"

    def open(self) -> None:
        """
        Open its log.
        """
        from auditchain import SqliteBackend
        from auditchain.sync import SyncAuditLog

        self._log = SyncAuditLog(SqliteBackend(str(self.path)))

    def record(self, event: Event) -> None:
        """
        Append one event.
        """
        self._log.append(
            event["actor"], event["code"], event["target"], metadata=event["detail"]
        )


PEERS: dict[str, type[Peer]] = {
    "fasten": Fasten,
    "rust-py-audit": RustPyAudit,
    "rust-py-audit, fsync": RustPyAuditSynced,
    "QueueListener to SQLite": StdlibQueue,
    "the same, indexed": IndexedQueue,
    "airlog": Airlog,
    "django-auditlog": DjangoAuditlog,
    "firm-audit": FirmAudit,
    "auditchain": Auditchain,
}
"""By the name that the table shows."""
