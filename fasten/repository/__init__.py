# SPDX-License-Identifier: Apache-2.0
"""
Where rows are stored and read: the tables, and the only SQL of fasten.

`Database` is one server or file, shared by the repositories on it. Importing this
package loads SQLAlchemy: a service pays for it in the drainer, at the first row. All
that the drainer needs comes with it: a process that forks while a thread imports
leaves its child a lock that nobody opens.
"""

from fasten.repository.anchoring import Anchor
from fasten.repository.audit import AuditRepository, StoreWentBack, Writer
from fasten.repository.database import (
    CommitUnanswered,
    Database,
    Problem,
    SchemaProblem,
    is_missing,
)
from fasten.repository.erasing import GONE_US, Erased, Eraser, Lagging
from fasten.repository.outbox import OutboxRepository
from fasten.repository.periods import Periods
from fasten.repository.pruning import (
    SWEEP_ROWS,
    Order,
    Sweep,
    Sweeper,
    SweepIsBusy,
)
from fasten.repository.restoring import Restorer
from fasten.repository.schema import SCHEMA
from fasten.repository.stream import StreamRepository
from fasten.repository.tables import Tables

__all__ = [
    "GONE_US",
    "SCHEMA",
    "SWEEP_ROWS",
    "Anchor",
    "AuditRepository",
    "CommitUnanswered",
    "Database",
    "Erased",
    "Eraser",
    "Lagging",
    "Order",
    "OutboxRepository",
    "Periods",
    "Problem",
    "Restorer",
    "SchemaProblem",
    "StoreWentBack",
    "StreamRepository",
    "Sweep",
    "SweepIsBusy",
    "Sweeper",
    "Tables",
    "Writer",
    "is_missing",
]
