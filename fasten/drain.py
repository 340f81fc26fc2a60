# SPDX-License-Identifier: Apache-2.0
"""
The drainer: one daemon thread that delivers what callers have queued.

It knows callables only. Where rows wait lives in `spool` and `streams`, where they
go in `repository`; what a failure means is told by the lane's *classify*.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, Literal, NamedTuple, Protocol

import attrs

__all__ = [
    "Backoff",
    "Batch",
    "Chore",
    "Drainer",
    "Fault",
    "Lane",
    "Rewound",
    "Source",
    "Ticket",
    "Watchdog",
]

logger = logging.getLogger("fasten")

REST_S: Final = 60.0
"""How long a watchdog stays that nobody asks for."""
TURN_S: Final = 0.05
"""How often something is done while a call lasts."""
BATCH_ROWS: Final = 500
BACKLOG_ROWS: Final = 2000
LINGER_S: Final = 0.002
LET_GO_ROWS: Final = 500
"""So many rows are freed at a time: thousands hold the interpreter for milliseconds."""


class Batch(Protocol):
    """
    Rows in order of their index; every index up to *last* is accounted for.
    """

    @property
    def rows(self) -> list[tuple[int, Any]]:
        """
        Return (index, row) pairs, ascending.
        """

    @property
    def last(self) -> int:
        """
        Return the highest index that this batch settles.
        """

    @property
    def missing(self) -> list[tuple[int, int]]:
        """
        Return the inclusive ranges that were journalled and cannot be found.
        """


class Source(Protocol):
    """
    Where a lane's rows wait: a spool, a memory queue, a dead process's journal.
    """

    def take(self, limit: int) -> Batch | None:
        """
        Return up to *limit* rows that follow those taken before, or None.
        """

    def ack(self, index: int) -> None:
        """
        Note that everything up to *index* is delivered.
        """

    @property
    def depth(self) -> int:
        """
        Return how many rows wait.
        """

    @property
    def last_index(self) -> int:
        """
        Return the index of the newest row.
        """

    @property
    def acked(self) -> int:
        """
        Return the index up to which rows are delivered.
        """


class Fault(NamedTuple):
    """
    What a failed delivery means, and what an operator should do about it.

    *kind* `transient` is retried for ever, `row` is narrowed down to the one row
    and set aside, `setup` keeps everything and waits for a person.
    """

    kind: Literal["transient", "row", "setup"]
    message: str
    is_ambiguous: bool = False


class Rewound(Exception):
    """
    Raised by a lane's *deliver*: the store went back. It accounts for rows up to
    *reached* only; *again* are those that followed them.
    """

    def __init__(self, reached: int, again: Iterator[Batch]) -> None:
        super().__init__(f"the store accounts for {reached} rows")
        self.reached, self.again = reached, again


class Rows(NamedTuple):
    """
    A part of a batch: what the drainer makes when it narrows a row fault down.
    """

    rows: list[tuple[int, Any]]
    last: int
    missing: list[tuple[int, int]]

    @classmethod
    def halves(cls, batch: Batch) -> tuple[Rows, Rows]:
        """
        Cut a batch of two rows or more in two; what is missing goes with its place.
        """
        rows, half = batch.rows, len(batch.rows) // 2
        cut = rows[half][0]
        before = [span for span in batch.missing if span[1] < cut]
        after = [span for span in batch.missing if span[1] > cut]
        return cls(rows[:half], cut - 1, before), cls(rows[half:], batch.last, after)


class Backoff:
    """
    Delays that double from *first_s* to *most_s*, each with jitter.

    Full jitter would retry at once now and then; half keeps a floor under it. See
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
    """

    def __init__(
        self,
        first_s: float = 0.05,
        most_s: float = 5.0,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._first_s, self._most_s, self._jitter = first_s, most_s, jitter
        self._attempt = 0

    def reset(self) -> None:
        """
        Start again from the first delay.
        """
        self._attempt = 0

    def next_s(self) -> float:
        """
        Return the seconds to wait before the next attempt.
        """
        ceiling = min(self._most_s, self._first_s * 2.0 ** min(self._attempt, 30))
        self._attempt += 1
        return ceiling * (0.5 + self._jitter() / 2)


class Ticket:
    """
    One row whose caller waits for the store's answer.

    Built on a bare lock: the caller may sit in a place where Event hangs.
    """

    def __init__(self, row: Any) -> None:
        self.row = row
        self.fault: Fault | None = None
        self._state = "waiting"
        self._guard = threading.Lock()
        self._answered = threading.Lock()
        self._answered.acquire()

    def claim(self) -> bool:
        """
        Take the ticket into a batch; false when its caller has withdrawn it.
        """
        with self._guard:
            if self._state != "waiting":
                return False
            self._state = "claimed"
            return True

    def withdraw(self) -> bool:
        """
        Give up on the ticket; false when it is already in a batch.
        """
        with self._guard:
            if self._state != "waiting":
                return False
            self._state = "withdrawn"
            return True

    def answer(self, fault: Fault | None) -> None:
        """
        Tell the caller that the row is stored (None) or what went wrong.
        """
        with self._guard:
            if self._state != "claimed":
                return
            self._state, self.fault = "answered", fault
        self._answered.release()

    def wait(self, timeout_s: float) -> bool:
        """
        Wait for the answer; true when there is one.
        """
        return self._answered.acquire(timeout=timeout_s)


@attrs.define
class Lane:
    """
    One way from a source to a store, with the state of its deliveries.

    *deliver* stores a batch in one transaction, or raises; *settled* is called
    after the source was told. *reached* is the index through which the store accounts
    for this lane's rows. *set_aside* stores a record in the place of a batch's
    one row, which the store refuses, and keeps that elsewhere.
    """

    name: str
    source: Source
    deliver: Callable[[Batch], Any]
    classify: Callable[[BaseException], Fault]
    settled: Callable[[Any], None] = lambda _result: None
    set_aside: Callable[[Batch, Fault], Any] = lambda _batch, _fault: None
    deliver_ticket: Callable[[Sequence[Any]], Any] | None = None
    tickets: deque[Ticket] = attrs.field(factory=deque)
    backoff: Backoff = attrs.field(factory=Backoff)
    fault: Fault | None = None
    fault_since: float = 0.0
    told: set[str] = attrs.field(factory=set)
    retry_at: float = 0.0
    retried: int = 0
    delivered: int = 0
    quarantined: int = 0
    pending: deque[Batch] = attrs.field(factory=deque)
    reached: int = 0
    again: Iterator[Batch] | None = None
    kept: int = 0  # so many of *pending* come after what is delivered again

    @property
    def has_work(self) -> bool:
        """
        Tell whether anything waits here.
        """
        is_waiting = self.pending or self.tickets or self.source.depth
        return bool(is_waiting) or self.again is not None

    def rewind(self, reached: int, again: Iterator[Batch]) -> None:
        """
        Deliver what followed *reached* again, before what is pending.
        """
        if self.again is None:
            self.kept = len(self.pending)
        while len(self.pending) > self.kept:
            self.pending.popleft()
        self.reached, self.again = reached, again

    def next_again(self) -> None:
        """
        Put the next batch that is delivered again before what is pending.
        """
        if self.again is None or len(self.pending) > self.kept:
            return
        batch = next(self.again, None)
        if batch is None:
            self.again = None
        else:
            self.pending.appendleft(batch)

    @property
    def has_to_try(self) -> bool:
        """
        Tell whether the store has to be asked again, rows or not: it was in trouble.
        """
        return self.fault is not None and (
            self.has_work or self.deliver_ticket is not None
        )

    def after_fork_in_child(self) -> None:
        """
        Forget what the parent was at.
        """
        self.pending.clear()
        self.again = None
        self.reached = 0
        self.tickets.clear()
        self.told.clear()
        self.backoff.reset()
        self.fault = None
        self.retry_at = 0.0
        self.retried = self.delivered = self.quarantined = 0


class Watchdog:
    """
    Call *abort* when a guarded call runs past its deadline.

    A stopped server answers nothing: no timeout that the server itself enforces
    comes back, so the socket has to be shut from here. *meanwhile* is called each
    `TURN_S` seconds that a call lasts.
    """

    def __init__(
        self,
        abort: Callable[[], None],
        deadline_s: float,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        self._abort, self._deadline_s = abort, deadline_s
        self._meanwhile = meanwhile
        self.fired = 0
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """
        Begin anew: the thread was the parent's, which may have held the lock.
        """
        self._condition = threading.Condition(threading.Lock())
        self._expires: float | None = None
        self._thread: threading.Thread | None = None

    @contextmanager
    def guard(self, within_s: float | None = None) -> Iterator[None]:
        """
        Watch the calls inside the with-statement; *within_s* is a nearer deadline.
        """
        self._set(time.monotonic() + (within_s or self._deadline_s))
        try:
            yield
        finally:
            self._set(None)

    def _set(self, expires: float | None) -> None:
        with self._condition:
            asleep = self._expires is None
            self._expires = expires
            if self._thread is None and expires is not None:
                self._start()
            elif asleep and expires is not None:
                self._condition.notify()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="fasten-watchdog", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is going down: nobody to watch for
            return
        self._thread = thread

    def _run(self) -> None:
        while self._watch():
            with suppress(Exception):  # a thread's top
                self._meanwhile()

    def _watch(self) -> bool:
        """
        Wait until a call has lasted another turn; false when there is none for long.
        """
        with self._condition:
            while True:
                expires = self._expires
                if expires is None:
                    if not self._condition.wait(REST_S) and self._expires is None:
                        self._thread = None
                        return False
                    continue
                left = expires - time.monotonic()
                if left <= 0:
                    self._expires = None
                    self.fired += 1
                    self._abort()
                    continue
                self._condition.wait(min(left, TURN_S))
                if self._expires == expires:
                    return True


class Drainer:
    """
    Deliver the rows of some lanes, in order, from one daemon thread.

    Nothing starts before the first `wake()`. *suppress* is entered for the life of
    the thread, so that what the stores log does not come back as new rows. *watchdog*
    bounds each call of a lane; one for tickets, whose callers wait, to *ticket_s*.
    *begin* is called once in the thread, and before it, and each time round, *turn*;
    *breathe* where other threads should get a turn.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        *,
        name: str = "fasten-drain",
        watchdog: Watchdog | None = None,
        ticket_s: float | None = None,
        suppress: Callable[[], AbstractContextManager[Any]] = nullcontext,
        linger_s: float = LINGER_S,
        batch_rows: int = BATCH_ROWS,
        clock: Callable[[], float] = time.monotonic,
        begin: Callable[[], None] = lambda: None,
        turn: Callable[[], None] = lambda: None,
        breathe: Callable[[], None] = lambda: None,
        idle: Callable[[], None] = lambda: None,
        idle_s: float = 30.0,
    ) -> None:
        self.lanes = list(lanes)
        self.name = name
        self._watchdog, self._suppress = watchdog, suppress
        self._ticket_s = ticket_s
        self._linger_s, self._batch_rows = linger_s, batch_rows
        self._clock, self._begin, self._turn = clock, begin, turn
        self._breathe = breathe
        self._idle, self._idle_s = idle, idle_s
        self._chores: list[Chore] = []
        self.farewell: Callable[[], None] = lambda: None
        self._reset()

    def _reset(self) -> None:
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self.is_asleep = False
        self.is_running = False
        self._starting = threading.Lock()
        self._ended = threading.Lock()
        self._thread_id = 0
        self._is_closing = False
        # Guards the deliveries: close() drains in its caller's thread where no
        # thread could start, and never beside a running one.
        self._delivering = threading.Lock()
        # Held during each call to a store, and across a fork.
        self._calling = threading.Lock()
        self.busy_since: float | None = None  # when such a call began
        self._is_still = False
        self._progress = threading.Condition(threading.Lock())

    @contextmanager
    def guard(self, within_s: float | None = None) -> Iterator[None]:
        """
        Watch calls to a store, which may hang; no fork falls into them.
        """
        watchdog = self._watchdog
        watch = nullcontext() if watchdog is None else watchdog.guard(within_s)
        with self._calling, watch:
            self.busy_since = self._clock()
            try:
                yield
            finally:
                self.busy_since = None

    def before_fork(self, timeout_s: float) -> None:
        """
        Wait, *timeout_s* seconds at the most, until no call to a store is going on.

        SQLite keeps its locks in memory as well: a child that is forked in the midst
        of a transaction would find the file locked for ever.
        """
        self._is_still = self._calling.acquire(timeout=timeout_s)

    def after_fork_in_parent(self) -> None:
        """
        Let calls go on.
        """
        is_still, self._is_still = self._is_still, False
        if is_still:
            self._calling.release()

    def every(
        self,
        interval_s: float,
        chore: Callable[[], None],
        *,
        first_s: float = 0.0,
        opens: bool = True,
    ) -> Chore:
        """
        Run *chore* in the thread, *first_s* from now and then each *interval_s*.

        Return it: whoever brings its *due* forward, then wakes the thread, has it run
        earlier.
        """
        made = Chore(chore, interval_s, self._clock() + first_s, opens)
        self._chores.append(made)
        return made

    # -- callers' threads ---------------------------------------------------------

    def wake(self) -> None:
        """
        Make sure that the thread runs and looks for rows.

        Safe in signal handlers and `__del__`: no Event, no Condition.
        """
        if not self.is_running:
            self.start()
        if self.is_asleep:
            self.is_asleep = False
            self._wakes.put(None)

    def start(self) -> None:
        """
        Start the thread, unless it runs, is being started, or cannot start.
        """
        if not self._starting.acquire(blocking=False):
            return  # another thread is at it, or this one was re-entered
        try:
            if not self.is_running and not self._is_closing:
                self._ended.acquire(blocking=False)
                self.is_running = True
                # Not threading.Thread: its start() takes locks that a signal handler
                # may have interrupted, and would wait for ever.
                start_new_thread(self._run, ())
        except RuntimeError:
            # No thread can start (interpreter exit): close() drains inline.
            self.is_running = False
        finally:
            self._starting.release()

    def submit(self, lane: Lane, ticket: Ticket) -> None:
        """
        Hand in a row whose caller waits.
        """
        lane.tickets.append(ticket)
        self.wake()

    def wait_for(self, is_done: Callable[[], bool], timeout_s: float) -> bool:
        """
        Wait until *is_done*, looked at after each delivery.
        """
        deadline = self._clock() + timeout_s
        self.wake()
        with self._progress:
            while not is_done():
                left = deadline - self._clock()
                if left <= 0:
                    return False
                # The cap covers a thread that died or never started.
                self._progress.wait(min(left, 0.2))
        return True

    def close(self, timeout_s: float) -> bool:
        """
        Deliver what waits within *timeout_s*, then stop; true when all is out.

        Never delivers beside a thread that hangs in a call: then rows stay.
        """
        deadline = self._clock() + timeout_s
        self._is_closing = True
        if self.is_running and self._thread_id != threading.get_ident():
            self.is_asleep = False
            self._wakes.put(None)
            if self._ended.acquire(timeout=max(0.0, deadline - self._clock())):
                self._ended.release()
        if not self.is_running:
            self._drain_inline(deadline)
        return not any(lane.has_work for lane in self.lanes)

    def _drain_inline(self, deadline: float) -> None:
        if not any(lane.has_work for lane in self.lanes):
            return
        with self._suppress():
            worked = True
            while worked:
                worked = False
                for lane in self.lanes:
                    # Unlike the thread, the caller cannot be left behind in a call.
                    if self._is_store_away() or self._clock() >= deadline:
                        return
                    worked = self._serve(lane) or worked
            self._take_leave()

    def _is_store_away(self) -> bool:
        faults = [lane.fault for lane in self.lanes if lane.fault is not None]
        return any(fault.kind == "transient" for fault in faults)

    def after_fork_in_child(self) -> None:
        """
        Forget the parent's thread, tickets and batches.
        """
        for lane in self.lanes:
            lane.after_fork_in_child()
        if self._watchdog is not None:
            self._watchdog.after_fork_in_child()
        self._reset()

    @property
    def is_this_thread(self) -> bool:
        """
        Tell whether the caller is the thread itself: it cannot wait for its own work.
        """
        return self.is_running and self._thread_id == threading.get_ident()

    # -- the thread ---------------------------------------------------------------

    def _run(self) -> None:
        self._thread_id = threading.get_ident()
        threading.current_thread().name = self.name
        try:
            with self._suppress():
                self._safely(self._turn)
                self._safely(self._begin)
                self._loop()
        finally:
            self.is_running = False
            self._ended.release()

    def _loop(self) -> None:
        busy_at, is_idle = self._clock(), False
        while True:
            # The last round is one that began after close(): a chore may have taken
            # long, and whoever closes would have to try what has come meanwhile.
            is_last = self._is_closing
            worked = self._serve_all()
            self._safely(self._turn)
            # What a chore has opened is closed again behind it in quiet times.
            is_idle = not self._run_chores() and is_idle and not worked
            now = self._clock()
            if worked:
                busy_at = now
            elif is_last:
                self._take_leave()
                # Whoever closes may have stopped waiting: what is open is ours.
                self._safely(self._idle)
                return
            elif self._is_closing:
                continue
            elif not is_idle and now - busy_at >= self._idle_s:
                self._safely(self._idle)
                is_idle = True
            else:
                self._sleep(self._idle_s if is_idle else busy_at + self._idle_s - now)

    def _serve_all(self) -> bool:
        # Every lane gets its turn: any() alone would stop at the first that worked.
        return any([self._serve(lane) for lane in self.lanes])  # noqa: C419

    def _serve(self, lane: Lane) -> bool:
        """
        Make one attempt at the lane's next batch and tickets; true on progress.
        """
        try:
            with self._delivering:
                worked = self._serve_batch(lane) if self._is_due(lane) else False
                worked = self._serve_tickets(lane) or worked
                return worked or self._look_again(lane)
        except Exception as error:  # a thread's top: report, go on, lose nothing
            self._note(
                lane, Fault("transient", f"{type(error).__name__} in the drainer")
            )
            logger.debug("fasten %s: drainer error", lane.name, exc_info=True)
            return False

    def _is_due(self, lane: Lane) -> bool:
        return self._is_closing or lane.fault is None or self._clock() >= lane.retry_at

    def _serve_batch(self, lane: Lane) -> bool:
        lane.next_again()
        batch = lane.pending[0] if lane.pending else self._next_batch(lane)
        if batch is None:
            return False
        if not lane.pending:
            lane.pending.append(batch)
        try:
            with self.guard():
                result = lane.deliver(batch)
        except Rewound as back:
            lane.rewind(back.reached, back.again)
            return True
        except Exception as error:  # the store's: classified, never let out
            return self._failed(lane, batch, lane.classify(error))
        lane.pending.popleft()
        self._settle(lane, batch, result)
        return True

    def _look_again(self, lane: Lane) -> bool:
        """
        See whether a store that was in trouble is well again, where no row waits.
        """
        ask = lane.deliver_ticket
        if ask is None or lane.fault is None or lane.has_work or not self._is_due(lane):
            return False
        try:
            with self.guard():
                ask(())
        except Exception as error:  # the store's: still in trouble
            self._retry_later(lane, lane.classify(error))
            return False
        self._recovered(lane)
        return True

    def _next_batch(self, lane: Lane) -> Batch | None:
        depth = lane.source.depth
        if depth and depth < self._batch_rows and not self._is_closing:
            # A full batch costs the store far less than the same rows in ten.
            time.sleep(self._linger_s)
        # A long backlog goes out in larger pieces: what a commit costs is shared.
        most = max(self._batch_rows, min(depth, BACKLOG_ROWS))
        return lane.source.take(most)

    def _settle(self, lane: Lane, batch: Batch, result: Any) -> None:
        lane.source.ack(batch.last)
        lane.reached = batch.last
        lane.delivered += len(batch.rows)
        self._recovered(lane)
        with self._progress:
            self._progress.notify_all()
        self._safely(lambda: lane.settled(result))
        self._let_go(batch.rows, result if isinstance(result, list) else [])

    def _let_go(self, *lists: list[Any]) -> None:
        for rows in lists:
            del rows[-LET_GO_ROWS:]
        while any(lists):
            self._breathe()
            for rows in lists:
                del rows[-LET_GO_ROWS:]

    def _failed(self, lane: Lane, batch: Batch, fault: Fault) -> bool:
        if fault.kind != "row":
            self._retry_later(lane, fault)
            return False
        if not batch.rows:
            self._retry_later(lane, fault._replace(kind="setup"))
            return False
        if len(batch.rows) > 1:
            # Halve it until the poison row stands alone.
            lane.pending.popleft()
            lane.pending.extendleft(reversed(Rows.halves(batch)))
            return True
        return self._set_aside(lane, batch, fault)

    def _retry_later(self, lane: Lane, fault: Fault) -> None:
        lane.retried += 1
        self._note(lane, fault)
        lane.retry_at = self._clock() + lane.backoff.next_s()

    def _set_aside(self, lane: Lane, batch: Batch, fault: Fault) -> bool:
        """
        Put the one poison row aside, unless its record is refused, too: a store that
        takes nothing is no row's fault.
        """
        try:
            with self.guard():
                result = lane.set_aside(batch, fault)
        except Rewound as back:
            lane.rewind(back.reached, back.again)
            return True
        except Exception as error:  # the store's, or the disk's
            second = lane.classify(error)
            if second.kind == "row":
                message = f"{fault.message}, and every other; see what constraints and "
                second = Fault("setup", f"{message}triggers the table has")
            self._retry_later(lane, second)
            return False
        lane.pending.popleft()
        lane.quarantined += len(batch.rows)
        lane.delivered -= len(batch.rows)
        self._settle(lane, batch, result)
        return True

    def _serve_tickets(self, lane: Lane) -> bool:
        claimed: list[Ticket] = []
        while lane.tickets and len(claimed) < self._batch_rows:
            ticket = lane.tickets.popleft()
            if ticket.claim():
                claimed.append(ticket)
        if not claimed or lane.deliver_ticket is None:
            return False
        self._deliver_tickets(lane, lane.deliver_ticket, claimed)
        return True

    def _deliver_tickets(
        self, lane: Lane, deliver: Callable[[Sequence[Any]], Any], claimed: list[Ticket]
    ) -> None:
        try:
            with self.guard(self._ticket_s):
                result = deliver([ticket.row for ticket in claimed])
        except Exception as error:  # answered to whoever waits
            fault = lane.classify(error)
            if fault.kind == "row" and len(claimed) > 1:
                for ticket in claimed:  # one caller's bad row is not another's
                    self._deliver_tickets(lane, deliver, [ticket])
                return
            if fault.kind != "row":
                self._retry_later(lane, fault)
            self._answer(claimed, fault)
            return
        self._recovered(lane)
        self._answer(claimed, None)
        self._safely(lambda: lane.settled(result))

    @staticmethod
    def _answer(tickets: list[Ticket], fault: Fault | None) -> None:
        for ticket in tickets:
            ticket.answer(fault)

    def _note(self, lane: Lane, fault: Fault) -> None:
        """
        Log a change of state, once, whatever the number of attempts.
        """
        if lane.fault is None:
            lane.fault_since = self._clock()
        lane.fault = fault
        # A server that comes up says something else each time: once is enough.
        if fault.message not in lane.told:
            lane.told.add(fault.message)
            logger.warning(
                "fasten %s: %s; rows are kept and retried", lane.name, fault.message
            )

    def _recovered(self, lane: Lane) -> None:
        lane.backoff.reset()
        if lane.fault is not None:
            lane.fault = None
            lane.told.clear()
            logger.warning("fasten %s: delivering again", lane.name)

    def _sleep(self, longest_s: float) -> None:
        """
        Wait for a wake, a retry or a chore; never longer than *longest_s*.
        """
        # First of all: whoever brings a chore forward from here on wakes this thread.
        self.is_asleep = True
        now = self._clock()
        dues = [lane.retry_at for lane in self.lanes if lane.has_to_try]
        dues += [chore.due for chore in self._chores]
        wait = max(0.0, min([longest_s, *(due - now for due in dues)]))
        # Rows may have come between the last look and the flag: look once more.
        if self._has_ready_work():
            self.is_asleep = False
            return
        with suppress(Empty):
            self._wakes.get(timeout=wait)
        self.is_asleep = False

    def _has_ready_work(self) -> bool:
        if self._is_closing:
            return True
        return any(
            lane.has_work and (lane.fault is None or lane.tickets)
            for lane in self.lanes
        )

    def _run_chores(self) -> bool:
        """
        Run the chores that are due; tell whether one may have opened something.
        """
        now = self._clock()
        due = [c for c in self._chores if c.due <= now and not self._is_closing]
        for chore in due:
            chore.due = now + chore.interval_s
            self._safely(chore.run)
        return any(chore.opens for chore in due)

    def _take_leave(self) -> None:
        """
        Do what is done last, once everything is out.
        """
        if not any(lane.has_work for lane in self.lanes):
            self._safely(self.farewell)

    def _safely(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception:  # a thread's top: a chore must not stop deliveries
            logger.debug("fasten: a background chore failed", exc_info=True)


@attrs.define
class Chore:
    """
    What is done now and then; *due* is on the drainer's clock.

    *opens* says that it may open what has to be closed in quiet times.
    """

    run: Callable[[], None]
    interval_s: float
    due: float
    opens: bool = True
