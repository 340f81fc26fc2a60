# SPDX-License-Identifier: Apache-2.0
"""
The crash-safe journal and queue of one process: append, read, adopt.

A row whose `append` returned is in the page cache of a file, so it outlives kill -9.
Delivering it lives in `drain`, storing it in `repository`; a file knows no SQL.

`frames` is the format and how it is read, `files` what lies in the directory, `queue`
this process's own spool, `orphans` those of dead ones.
"""

from __future__ import annotations

from fasten.spool.frames import FORMAT, Batch, Row, pack, unpack
from fasten.spool.orphans import (
    Backlog,
    Leftover,
    Orphan,
    Quarantined,
    adopt,
    amend_quarantined,
    backlog,
    drop_quarantined,
    has_foreign,
    memories,
    quarantine,
    quarantined,
    recall,
    survey,
)
from fasten.spool.queue import IDLE_S, RETAIN_S, Spool

__all__ = [
    "FORMAT",
    "IDLE_S",
    "RETAIN_S",
    "Backlog",
    "Batch",
    "Leftover",
    "Orphan",
    "Quarantined",
    "Row",
    "Spool",
    "adopt",
    "amend_quarantined",
    "backlog",
    "drop_quarantined",
    "has_foreign",
    "memories",
    "pack",
    "quarantine",
    "quarantined",
    "recall",
    "survey",
    "unpack",
]
