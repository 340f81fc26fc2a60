# SPDX-License-Identifier: Apache-2.0
"""
What a store proves: verified as a whole, or recomputed for its newest rows.
"""

from __future__ import annotations

from collections import defaultdict
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from fasten.chain import COMMITTED_FIELDS, FORM, HEADER_KEYS, Salt, commitment_of
from fasten.cli.doctor.finding import Finding, fail, ok, warn
from fasten.cli.source import Store
from fasten.errors import MissingExtra
from fasten.rows import AuditRow, canonical_json
from fasten.settings import Dsn, Settings

if TYPE_CHECKING:
    from fasten.repository import AuditRepository

__all__ = ["check_evidence", "faults_of"]

_WHOLE: Final = 20_000
"""Up to so many rows the whole store is verified: that is a matter of seconds."""

_LOOKED_AT: Final = 1_000
_MOST_PLACES: Final = 20
_CURE: Final = "keep the store as it is, and run `fasten verify` over the whole of it"


def check_evidence(settings: Settings, found: Store) -> list[Finding]:
    """
    Verify the store, or of a large one the newest rows of each node.
    """
    repository: AuditRepository = found.repository  # type: ignore[assignment]
    ends = found.read(repository.positions)
    if sum(ends.values()) <= _WHOLE:
        return [_verified(settings, found.dsn)]
    faults: list[str] = []
    looked_at = 0
    for place, end in sorted(ends.items())[:_MOST_PLACES]:
        rows = found.read(lambda p=place, e=end: repository.newest(p, e, _LOOKED_AT))  # type: ignore[misc]
        looked_at += len(rows)
        faults += _broken(rows)
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        return [fail("evidence", f"chain broken: {faults[0]}{more}", _CURE)]
    message = f"chain intact over the newest {looked_at} rows of {sum(ends.values())}"
    return [ok("evidence", message)]


def _verified(settings: Settings, dsn: Dsn) -> Finding:
    from fasten.proof import trusted, verify_store  # loads the store's code

    try:
        report = verify_store(dsn, verifiers=trusted(settings))
    except MissingExtra as error:
        return warn("evidence", f"chain not verified: {error}")
    if report.ok:
        return ok("evidence", f"chain verified: {report.rows} rows, {report.verdict}")
    first, *others = report.findings
    more = f" and {len(others)} more" if others else ""
    if report.status == "unverifiable":
        return warn("evidence", f"chain not verified: {first}{more}")
    return fail("evidence", f"chain broken: {first}{more}", _CURE)


def _broken(rows: list[AuditRow]) -> list[str]:
    """
    Say what is wrong with the newest rows of one node.
    """
    chains: dict[str, list[AuditRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.monotonic_seq or 0):
        chains[row.retention_class].append(row)
    faults = []
    for chain in chains.values():
        before: AuditRow | None = None
        for row in chain:
            place = f"{row.service_id}/{row.source_node_id} number {row.monotonic_seq}"
            faults += [f"{place} ({row.id}): {fault}" for fault in faults_of(row)]
            if before is not None and row.prev_hash != before.hash:
                faults.append(f"{place} ({row.id}) does not follow the row before it")
            before = row
    return faults


def faults_of(row: AuditRow) -> list[str]:
    """
    Recompute a row's commitment and hash from its columns.
    """
    if row.canonical_form_id != FORM:
        return [f"form {row.canonical_form_id} is not {FORM}"]
    values = row.to_dict()
    if row.detail is not None:
        values["detail"] = canonical_json(row.detail)
    present = [field for field in COMMITTED_FIELDS if values[field] is not None]
    try:
        salt = Salt.read(row.salt or "", present)
        leaves = {**salt.leaves, **{f: salt.leaf(f, values[f]) for f in present}}
    except (ValueError, KeyError):
        return ["its salt was edited"]
    header = canonical_json({key: values[key] for key in HEADER_KEYS})
    faults = []
    if commitment_of(leaves) != row.commitment:
        faults.append(f"one of {', '.join(present)} was edited")
    if sha256(header.encode()).hexdigest() != row.hash:
        faults.append("a column was edited")
    return faults
