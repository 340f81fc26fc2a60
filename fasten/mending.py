# SPDX-License-Identifier: Apache-2.0
"""
What an operator does about rows on their way: deliver a spool by hand, give the store
rows again that it refused, put on record that it went back.

What a service does about it by itself is `delivery`'s and `refill`'s.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final

import attrs

from fasten import spool
from fasten.chain import Memory, Note, Restored, Verifier
from fasten.custody import Custody
from fasten.delivery import Delivery, spool_directory
from fasten.drain import Lane
from fasten.engine import Engine
from fasten.errors import AuditStoreError, FastenError
from fasten.settings import Dsn, Settings

__all__ = ["Drained", "Returned", "drain", "give_back", "restored"]

_PAUSE_S: Final = 0.2


@attrs.define(kw_only=True)
class Drained:
    """
    What became of a spool: *rows* by (service, node, writer) that the store has now,
    how many were *quarantined*, *fault* for why some are still here, and the files
    that are *left*: of other services and stores, or of a newer fasten.
    """

    rows: dict[tuple[str, str, str], int] = attrs.field(factory=dict)
    quarantined: int = 0
    fault: str = ""
    is_unreachable: bool = False
    left: list[spool.Leftover] = attrs.field(factory=list)


def drain(settings: Settings, *, dsn: Dsn | None, timeout_s: float) -> Drained:
    """
    Deliver what dead processes of the service left, into *dsn* if that is given; here
    and now, within *timeout_s* seconds.

    Raises:
        FastenError: there is no store to deliver to.
    """
    into = dsn or settings.audit_dsn
    if into is None:
        raise FastenError("there is no store to drain into; set FASTEN_AUDIT_DSN")
    directory = spool_directory(settings)
    engine = Engine(_by_hand(settings, into, str(directory)))
    delivery = engine.delivery
    if delivery is None:
        raise FastenError("this engine has no spool")
    try:
        done = _drained(delivery, of_any_store=dsn is not None, timeout_s=timeout_s)
    finally:
        engine.close(1.0)
    known = into.fingerprint
    done.left = spool.survey(directory, service=settings.service_id, store=known)
    return done


def _by_hand(settings: Settings, dsn: Dsn, directory: str) -> Settings:
    return attrs.evolve(
        settings,
        audit_dsn=dsn,
        outbox_dsn=None,
        api_dsn=None,
        sys_dsn=None,
        spool_dir=directory,
        stdout=frozenset(),
    )


def _drained(delivery: Delivery, *, of_any_store: bool, timeout_s: float) -> Drained:
    until = time.monotonic() + timeout_s
    try:
        delivery.adopt(of_any_store=of_any_store)
    except Exception as error:  # the store's: told without its DSN
        problem = delivery.audit.database.problem(error)
        is_unreachable = problem.kind == "transient"
        return Drained(fault=problem.message, is_unreachable=is_unreachable)
    taken: list[tuple[spool.Orphan, Lane]] = []
    while delivery.adopted:
        taken += delivery.adopted
        # Without a thread of its own: nothing is left to run when this returns.
        while not delivery.drainer.close(max(0.0, until - time.monotonic())):
            if time.monotonic() + _PAUSE_S > until or _needs_a_person(taken):
                return _told(taken)
            time.sleep(_PAUSE_S)
        delivery.adopt(of_any_store=of_any_store)  # so many are taken at once
    return _told(taken)


def _needs_a_person(taken: Sequence[tuple[spool.Orphan, Lane]]) -> bool:
    waiting = [lane for _, lane in taken if lane.has_work]
    return all(lane.fault and lane.fault.kind == "setup" for lane in waiting)


def _told(taken: Sequence[tuple[spool.Orphan, Lane]]) -> Drained:
    done = Drained()
    for orphan, lane in taken:
        key = (orphan.service, orphan.node, orphan.writer_id)
        done.rows[key] = lane.delivered
        done.quarantined += lane.quarantined
        if lane.has_work:
            fault = lane.fault
            done.fault = fault.message if fault else "the time was over"
            done.is_unreachable = fault is None or fault.kind == "transient"
    return done


# --- rows that were refused -----------------------------------------------------------


@attrs.define(kw_only=True)
class Returned:
    """
    What became of quarantined rows: *stored* of them, *refused* still, each with why.
    """

    stored: int = 0
    refused: list[tuple[str, str]] = attrs.field(factory=list)


def give_back(custody: Custody) -> Returned:
    """
    Give the store each quarantined row again; those that it takes leave the files.

    Raises:
        FastenError: it is not to be had now, or takes nothing.
        OSError: a file cannot be written.
    """
    directory = spool_directory(custody.settings)
    done, taken = Returned(), set[str]()
    try:
        for entry in spool.quarantined(directory):
            reason = _give(custody, entry)
            id_ = str(entry.row[0])
            if reason:
                done.refused.append((id_, reason))
            else:
                taken.add(id_)
    finally:
        spool.drop_quarantined(directory, taken)
        done.stored = len(taken)
    return done


def _give(custody: Custody, entry: spool.Quarantined) -> str:
    """
    Store one row; return why the store refuses it, empty if it does not.
    """
    from fasten.repository import Writer

    repository, settings = custody.repository, custody.settings
    writer = Writer(
        custody.writer.id,
        entry.service or settings.service_id,
        entry.node or settings.node_id,
    )
    try:
        repository.append(writer, [(0, entry.row)], 0)
    except Exception as error:  # the store's: only what it says of this row is ours
        problem = repository.database.problem(error)
        if problem.kind != "row":
            raise
        return problem.message
    return ""


# --- a store that went back -----------------------------------------------------------


def restored(
    custody: Custody,
    reason: str,
    *,
    notes: Iterable[str] = (),
    verifiers: Sequence[Verifier] = (),
) -> list[Restored]:
    """
    Put on record which numbers the store has lost, as the spool and *notes* know.

    *notes* are checkpoints; with *verifiers*, one of them has to have signed each.

    Raises:
        FastenError: a checkpoint is not of this service, or not signed as it should be.
        AuditStoreError: the store cannot be reached now.
    """
    from fasten.repository import Restorer, Writer

    custody.require()
    service, writer_id = custody.settings.service_id, custody.writer.id
    known = [*_remembered(custody), *(_read(n, service, verifiers) for n in notes)]
    known.sort(key=_node)
    places = {node: list(found) for node, found in groupby(known, key=_node)}
    nodes = custody.repository.positions()
    lost = []
    for node in sorted({*places, *(n for s, n in nodes if s == service)}):
        restorer = Restorer(custody.repository, Writer(writer_id, service, node))
        found = restorer.restore(places.get(node, ()), reason=reason)
        if found is not None:
            lost.append(found)
    return lost


def _node(memory: Memory) -> str:
    return memory.source_node_id


def _remembered(custody: Custody) -> list[Memory]:
    settings, dsn = custody.settings, custody.dsn
    if dsn is None:
        raise AuditStoreError("there is no audit store; set FASTEN_AUDIT_DSN")
    texts = spool.memories(
        spool_directory(settings), service=settings.service_id, store=dsn.fingerprint
    )
    return [memory for text in texts if (memory := Memory.decode(text)) is not None]


def _read(text: str, service: str, verifiers: Sequence[Verifier]) -> Memory:
    try:
        note = Note.parse(text)
    except (ValueError, AttributeError):
        raise FastenError(f"{text[:60]!r} is no checkpoint") from None
    said = note.checkpoint
    if said.key[0] != service:
        raise FastenError(
            f"a checkpoint of {'/'.join(said.key)} says nothing of service {service!r}"
        )
    if verifiers and note.verdict(verifiers) != "good":
        raise FastenError(
            f"the checkpoint of {'/'.join(said.key)} is not signed by "
            "FASTEN_SIGNING_KEY; give one that is"
        )
    return Memory.told(said)
