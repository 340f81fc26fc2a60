# SPDX-License-Identifier: Apache-2.0
"""
Where rows are stored and read: the tables, and the only SQL of fasten.

`Database` is one server or file, shared by the repositories on it. Importing this
package loads SQLAlchemy: a service pays for it in the drainer, at the first row.
"""

from fasten.repository.audit import AuditRepository, Writer
from fasten.repository.database import (
    CommitUnanswered,
    Database,
    Problem,
    SchemaProblem,
    is_missing,
)
from fasten.repository.outbox import OutboxRepository
from fasten.repository.schema import SCHEMA
from fasten.repository.stream import StreamRepository
from fasten.repository.tables import Tables

__all__ = [
    "SCHEMA",
    "AuditRepository",
    "CommitUnanswered",
    "Database",
    "OutboxRepository",
    "Problem",
    "SchemaProblem",
    "StreamRepository",
    "Tables",
    "Writer",
    "is_missing",
]
