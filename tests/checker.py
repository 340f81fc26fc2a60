# SPDX-License-Identifier: Apache-2.0
"""
An independent check of a store: plain SQL, json, hashlib and rfc8785, none of ours.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

import psycopg
import rfc8785

COMMITTED = ("actor", "client", "detail", "on_behalf_of", "reason", "target")
LEFT_OUT = {*COMMITTED, "salt", "hash", "shipped_at", "stored_at"}


def rows_of(dsn: str, table: str = "audit_log") -> list[dict[str, Any]]:
    """
    Read every row of a store, in order of service, node and number.
    """
    query = f"SELECT * FROM {table} ORDER BY service_id, source_node_id, monotonic_seq"
    if dsn.startswith("sqlite"):
        connection: Any = sqlite3.connect(dsn.removeprefix("sqlite:///"))
    else:
        connection = psycopg.connect(dsn)
    try:
        cursor = connection.execute(query)
    except (sqlite3.OperationalError, psycopg.errors.UndefinedTable) as error:
        connection.close()
        if "no such table" in str(error) or "does not exist" in str(error):
            return []  # nothing was stored yet
        raise
    try:
        names = [column[0] for column in cursor.description]
        found = [dict(zip(names, row, strict=True)) for row in cursor]
    finally:
        connection.close()
    return [{k: _text(v) for k, v in row.items()} for row in found]


def _text(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return value


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """
    Return what is wrong: gaps in the numbers, broken links, wrong hashes, twins.
    """
    found = []
    last: dict[tuple[str, str], int] = defaultdict(int)
    heads: dict[tuple[str, str, str], str] = defaultdict(lambda: "genesis")
    ids = [row["id"] for row in rows]
    if len(set(ids)) != len(ids):
        found.append(f"{len(ids) - len(set(ids))} ids occur twice")
    for row in rows:
        node = (row["service_id"], row["source_node_id"])
        seq = row["monotonic_seq"]
        if seq != last[node] + 1:
            found.append(f"{node}: {seq} follows {last[node]}")
        last[node] = seq
        chain = (*node, row["retention_class"])
        if row["prev_hash"] != heads[chain]:
            found.append(f"{seq} of {chain} does not link")
        if row["commitment"] != commitment(row) or row["hash"] != digest(row):
            found.append(f"{seq} of {chain} does not recompute")
        heads[chain] = row["hash"]
    return found


def commitment(row: dict[str, Any]) -> str:
    """
    Recompute the commitment to the six fields that may be erased.
    """
    leaves = {}
    for field in COMMITTED:
        if row[field] is not None:
            key = hashlib.sha256(f"{row['salt']}:{field}".encode()).digest()
            value = json.loads(row[field]) if field == "detail" else row[field]
            leaves[field] = hashlib.sha256(key + rfc8785.dumps(value)).hexdigest()
    return hashlib.sha256(rfc8785.dumps(leaves)).hexdigest()


def digest(row: dict[str, Any]) -> str:
    """
    Recompute the hash of a row's header.
    """
    header = {k: v for k, v in row.items() if k not in LEFT_OUT}
    return hashlib.sha256(rfc8785.dumps(header)).hexdigest()
