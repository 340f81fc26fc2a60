# SPDX-License-Identifier: Apache-2.0
"""
The journal: what was appended is found again, whatever interrupts, kills or damages it.
"""

from __future__ import annotations

import dis
import errno
import gc
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, Self

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fasten import spool
from fasten.rows import Pending
from fasten.spool import Batch, Spool, adopt, files, frames, pack, queue, unpack

ROOT = Path(__file__).parent.parent
SOURCES = (queue.__file__, files.__file__)
SERVICE, NODE, STORE = "orders", "node-1", "store-1"


def make_row(number: int, detail: str = "{}") -> tuple[Any, ...]:
    return tuple(
        Pending(
            id=f"evt-{number:026d}",
            timestamp_us=1_700_000_000_000_000 + number,
            code="USER_CREATED",
            action="created",
            severity="info",
            category="user",
            domain="user",
            retention_class="medium",
            outcome="success",
            actor="admin",
            actor_kind="admin",
            on_behalf_of=None,
            tenant_id="acme",
            client=None,
            target=f"u-{number}",
            method="http",
            reason=None,
            request_id="0" * 32,
            trace_id=None,
            span_id=None,
            detail=detail,
        )
    )


class Clock:
    """
    A clock that a test moves.
    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def make_spool(directory: Path | None, **options: Any) -> Spool:
    return Spool(directory, service=SERVICE, node=NODE, store=STORE, **options)


def put(journal: Spool, *numbers: int) -> list[int]:
    return [journal.append(pack(make_row(n)), make_row(n)) for n in numbers]


def put_into(indexes: list[int], journal: Spool) -> None:
    indexes += put(journal, 9)


def drain(journal: Spool, limit: int = 100) -> tuple[list[int], list[tuple[int, int]]]:
    """
    Take and acknowledge all there is; return indexes and missing ranges.
    """
    indexes: list[int] = []
    missing: list[tuple[int, int]] = []
    while (batch := journal.take(limit)) is not None:
        indexes += [index for index, _ in batch.rows]
        missing += batch.missing
        journal.ack(batch.last)
    return indexes, missing


def find(directory: Path, after: int = 0) -> tuple[dict[int, Any], list[int]]:
    """
    Adopt what is there; return rows by index, and the missing indexes.
    """
    rows: dict[int, Any] = {}
    missing: list[int] = []
    for orphan in adopt(directory, service=SERVICE, store=STORE):
        for batch in orphan.batches(after, 50):
            collect(batch, rows, missing)
        orphan.done()
    return rows, missing


def found_in(directory: Path) -> tuple[list[int], list[int]]:
    rows, missing = find(directory)
    return sorted(rows), missing


def collect(batch: Batch, rows: dict[int, Any], missing: list[int]) -> None:
    for index, row in batch.rows:
        assert index not in rows

        rows[index] = row
    for first, last in batch.missing:
        missing += range(first, last + 1)


@contextmanager
def opened(directory: Path | None, **options: Any) -> Iterator[Spool]:
    journal = make_spool(directory, **options)
    try:
        yield journal
    finally:
        journal.close()


def abandon(journal: Spool) -> None:
    """
    Let go of the files as a killed process would: without a word.
    """
    journal.after_fork_in_child()


def run_script(script: str, *arguments: object, timeout: float = 60) -> str:
    done = subprocess.run(
        [*PROGRAM, PRELUDE + script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )

    assert (0, "") == (done.returncode, done.stderr)

    return done.stdout


# Python 3.12 warns of each fork beside threads: some tests here do just that.
PROGRAM = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c"]
PRELUDE = """
import os, signal, sys, threading, time
from pathlib import Path
from tests.test_spool import drain, find, make_row, make_spool, put
from fasten.spool import adopt, pack
"""

texts = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1
)
optional = st.none() | texts


class TestPack:
    @given(
        fields=st.tuples(*[texts] * 10),
        nullable=st.tuples(*[optional] * 6),
        at=st.integers(-(2**62), 2**62),
    )
    def test_round_trip(self, fields, nullable, at):
        """
        A row comes back as it went in, None included.
        """
        known = dict.fromkeys(Pending._fields, "x")
        known.update(
            zip(("id", "code", "actor", "target", "detail"), fields, strict=False)
        )
        names = ("on_behalf_of", "tenant_id", "client", "reason", "trace_id", "span_id")
        known.update(zip(names, nullable, strict=True))
        row = tuple(Pending(**{**known, "timestamp_us": at}))

        assert row == unpack(pack(row))

    @given(st.binary(max_size=300))
    def test_garbage(self, payload):
        """
        What is not a row is a ValueError, nothing else.
        """
        with pytest.raises(ValueError):
            unpack(payload)

    def test_wire(self):
        """
        The fields are joined by NUL in the order of `Pending`.
        """
        row = make_row(7)

        assert "\0".join("" if f is None else str(f) for f in row) == pack(row).decode()


class TestQueue:
    def test_a_row_after_a_long_silence_is_kept(self, tmp_path):
        """
        Whoever makes segments ready meanwhile does not take the silence for lasting.
        """
        now = [0.0]
        with opened(tmp_path, clock=lambda: now[0]) as journal:
            put(journal, 1)
            drain(journal)
            journal.maintain()
            now[0] += 100.0
            journal.maintain()  # the spare is given back
            now[0] += 2000.0
            put(journal, 2)
            drain(journal)
            journal.provide()

            assert [2] == [i for b in journal.batches(1, 9) for i, _ in b.rows]

    def test_opens_nothing_before_the_first_row(self, tmp_path):
        """
        An idle process costs no file.
        """
        with opened(tmp_path / "spool") as journal:
            journal.maintain()

            assert not (tmp_path / "spool").exists()

    def test_a_process_without_rows_leaves_no_file(self, tmp_path):
        """
        What was prepared and never used is removed by close.
        """
        with opened(tmp_path) as journal:
            journal.prepare()

            assert any(tmp_path.iterdir())

        assert [] == list(tmp_path.iterdir())

    def test_files_are_private(self, tmp_path):
        """
        The directory is 0700 and its files are 0600, whatever the umask.
        """
        old = os.umask(0)
        try:
            with opened(tmp_path / "a" / "spool") as journal:
                put(journal, 1)
                journal.maintain()
                modes = {
                    stat.S_IMODE(p.stat().st_mode) for p in journal_files(tmp_path)
                }
                directory = stat.S_IMODE((tmp_path / "a" / "spool").stat().st_mode)
        finally:
            os.umask(old)

        assert ({0o600}, 0o700) == (modes, directory)

    def test_order(self, tmp_path):
        """
        Rows come out as they went in, in batches of the asked size.
        """
        with opened(tmp_path) as journal:
            indexes = put(journal, *range(250))
            first = journal.take(100)

            assert list(range(1, 251)) == indexes
            assert first is not None
            assert [(i + 1, make_row(i)) for i in range(100)] == first.rows
            assert 100 == first.last

            journal.ack(first.last)

            assert (list(range(101, 251)), []) == drain(journal)
            assert journal.take(10) is None
            assert 0 == journal.depth

    def test_takes_go_on_without_an_ack(self, tmp_path):
        """
        Two batches may be out at once; the spool counts both as waiting.
        """
        with opened(tmp_path) as journal:
            put(journal, *range(20))
            first, second = journal.take(10), journal.take(10)

            assert first is not None
            assert second is not None
            assert list(range(1, 21)) == [i for b in (first, second) for i, _ in b.rows]
            assert 20 == journal.depth

            journal.ack(10)

            assert 10 == journal.depth
            assert 1_700_000_000_000_010 == journal.oldest_us

    @pytest.mark.parametrize("on_disk", [True, False])
    def test_past_the_cache(self, tmp_path, on_disk):
        """
        The journal holds what the cache does not; memory alone refuses it.
        """
        with opened(tmp_path if on_disk else None, capacity=5) as journal:
            indexes = put(journal, *range(12))

            assert list(range(1, 6)) == indexes[:5]
            assert (list(range(6, 13)) if on_disk else [0] * 7) == indexes[5:]
            assert on_disk == journal.has_room
            assert ([i for i in indexes if i], []) == drain(journal, 3)

    @given(
        capacity=st.integers(0, 6),
        steps=st.lists(st.integers(-6, 9), max_size=40),
        seed=st.integers(0, 9),
    )
    def test_any_interleaving(self, tmp_path_factory, capacity, steps, seed):
        """
        However appends, takes and upkeep alternate, each row comes once, in order.
        """
        folder = tmp_path_factory.mktemp("any")
        chance, numbers, got = random.Random(seed), count(1), []
        with opened(folder, capacity=capacity) as journal:
            for step in steps:
                put(journal, *[next(numbers) for _ in range(step)])
                if step <= 0 and (batch := journal.take(1 - step)) is not None:
                    got += batch.rows
                    journal.ack(batch.last)
                if chance.random() < 0.3:
                    chance.choice([journal.maintain, journal.seal])()
            while (batch := journal.take(7)) is not None:
                got += batch.rows
                journal.ack(batch.last)

        assert [(n, make_row(n)) for n in range(1, next(numbers))] == got
        shutil.rmtree(folder)

    def test_overflow_is_read_once(self, tmp_path, monkeypatch):
        """
        Reading the journal past the cache takes a pass over it, not one for each batch.
        """
        calls = []
        monkeypatch.setattr(frames, "parse", count_calls(frames.parse, calls))
        with opened(tmp_path, capacity=100) as journal:
            for number in range(12_000):
                put(journal, number)
                if number % 500 == 0:
                    journal.maintain()
            segments = len(list(tmp_path.glob("*.seg")))

            assert (list(range(1, 12_001)), []) == drain(journal, 200)
            assert len(calls) <= segments

    def test_large_rows(self, tmp_path):
        """
        A row larger than a segment gets one of its own.
        """
        rows = [make_row(n, json.dumps("x" * n)) for n in (10, 3_000_000, 20, 300_000)]
        with opened(tmp_path, capacity=0) as journal:
            for row in rows:
                journal.append(pack(row), row)
                journal.maintain()
            batch = journal.take(10)

            assert batch is not None
            assert list(enumerate(rows, 1)) == batch.rows

    def test_segments_grow_to_a_mebibyte(self, tmp_path):
        """
        A writer of few rows holds little; a busy one has segments of 1 MiB.
        """
        with opened(tmp_path) as journal:
            put(journal, 1)
            journal.maintain()
            put(journal, 2)
            journal.maintain()

            assert journal.bytes_on_disk <= 512 * 1024 + 1024

            for number in range(12_000):
                put(journal, number)
                if number % 500 == 0:
                    journal.maintain()
            sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.seg"))]

            assert 1024 * 1024 == max(sizes)
            assert len(sizes) < 10

    def test_numbers(self, tmp_path):
        """
        Depth, high water and the age of the oldest row tell what waits.
        """
        with opened(tmp_path) as journal:
            put(journal, *range(30))

            assert (30, 30, 0) == (journal.depth, journal.high_water, journal.acked)
            assert 2.0 == journal.oldest_s(1_700_000_002_000_000)
            assert 30 == journal.spooled

            drain(journal)

            assert (0, 30, 30) == (journal.depth, journal.high_water, journal.acked)
            assert 0.0 == journal.oldest_s(1_700_000_002_000_000)

    def test_threads_lose_nothing(self, tmp_path):
        """
        Four threads append beside a taker: each row comes once, each thread's in order.
        """
        each, limit = 50_000, 500
        rows = [make_row(n) for n in range(each)]
        payloads = [pack(row) for row in rows]
        got: list[tuple[int, Any]] = []
        missing: list[Any] = []
        done = threading.Event()
        with opened(tmp_path, capacity=2_000, max_bytes=2**30) as journal:

            def produce(name: int) -> None:
                for row, payload in zip(rows, payloads, strict=True):
                    assert journal.append(payload, (name, *row[1:]))

            def consume() -> None:
                while not (done.is_set() and journal.depth == 0):
                    batch = journal.take(limit)
                    if batch is None:
                        time.sleep(0)
                        continue
                    got.extend(batch.rows)
                    missing.extend(batch.missing)
                    journal.ack(batch.last)
                    journal.maintain()

            taker = threading.Thread(target=consume)
            threads = [threading.Thread(target=produce, args=(n,)) for n in range(4)]
            for thread in (taker, *threads):
                thread.start()
            for thread in threads:
                thread.join(60)
            done.set()
            taker.join(60)

        assert [] == missing
        assert list(range(1, 4 * each + 1)) == [index for index, _ in got]
        cached = [row for _, row in got if isinstance(row[0], int)]
        for name in range(4):
            times = [row[1] for row in cached if row[0] == name]
            assert sorted(times) == times


def count_calls(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return function(*arguments)

    return counted


def journal_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# --- interrupted ------------------------------------------------------------------


class Interrupter:
    """
    Act in the code of `fasten.spool` where Python lets a signal handler in.

    That is before the instruction that follows a call, a jump back or a function's
    entry. *act* is called at the *nth* such place inside an `append`.
    """

    def __init__(self, nth: int, act: Callable[[], None]) -> None:
        self.left, self.act, self.has_acted = nth, act, False

    def __enter__(self) -> Self:
        self.tool = watch(self._reach)
        return self

    def __exit__(self, *_: object) -> None:
        unwatch(self.tool)

    def _reach(self, code: CodeType, offset: int) -> None:
        if self.has_acted or offset not in interruptible(code):
            return
        self.left -= 1
        if self.left < 0:
            self.has_acted = True
            # Seen itself, too, by an interrupter inside of *act*.
            sys.call_tracing(self.act, ())


if sys.version_info >= (3, 12):
    # Tracing of instructions came to depend on what was traced before.
    monitoring = sys.monitoring

    def watch(reach: Callable[[CodeType, int], None]) -> int:
        """
        Have *reach* called before each instruction of the journal's code.
        """
        tool = next(n for n in range(6) if monitoring.get_tool(n) is None)
        monitoring.use_tool_id(tool, "interrupter")
        event = monitoring.events.INSTRUCTION
        monitoring.register_callback(tool, event, reach)
        set_events(tool, event)
        return tool

    def unwatch(tool: int) -> None:
        set_events(tool, monitoring.events.NO_EVENTS)
        monitoring.register_callback(tool, monitoring.events.INSTRUCTION, None)
        monitoring.free_tool_id(tool)

    def set_events(tool: int, events: int) -> None:
        for code in journal_code():
            monitoring.set_local_events(tool, code, events)

    @cache
    def journal_code() -> list[CodeType]:
        # By its type: others' lazy objects do things when asked what they are.
        gc.unfreeze()  # what conftest has frozen is not among the objects
        functions = [f for f in gc.get_objects() if type(f) is FunctionType]
        gc.freeze()
        codes = {function.__code__ for function in functions}
        return [code for code in codes if code.co_filename in SOURCES]

else:

    def watch(reach: Callable[[CodeType, int], None]) -> int:
        """
        Have *reach* called before each instruction of the journal's code.
        """

        def enter(frame: FrameType, event: str, argument: Any) -> Any:
            if frame.f_code.co_filename not in SOURCES:
                return None
            frame.f_trace_opcodes = True
            return step

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "opcode":
                reach(frame.f_code, frame.f_lasti)
            return step

        sys.settrace(enter)
        return 0

    def unwatch(_tool: int) -> None:
        sys.settrace(None)


def interruptible(code: Any, known: dict[Any, set[int]] = {}) -> set[int]:  # noqa: B006
    if code not in known:
        places, previous = set(), ""
        for step in dis.get_instructions(code):
            if previous.startswith(("CALL", "RESUME", "JUMP_BACKWARD")):
                places.add(step.offset)
            previous = step.opname
        known[code] = places
    return known[code]


class Interrupted(BaseException):
    """
    What a signal handler throws.
    """


def throw() -> None:
    raise Interrupted


def scenarios() -> list[Any]:
    return [
        pytest.param({"prepared": True}, id="mapped"),
        pytest.param({"prepared": False}, id="first"),
        pytest.param({"prepared": True, "full": True}, id="full"),
        pytest.param({"prepared": True, "full": True, "spare": True}, id="next"),
        pytest.param({"prepared": True, "void": True}, id="after a void"),
        pytest.param({"memory": True}, id="memory"),
        pytest.param({"memory": True, "broken": True}, id="broken"),
    ]


def set_scene(folder: Path, scene: dict[str, bool]) -> Spool:
    in_memory = scene.get("memory") and not scene.get("broken")
    journal = make_spool(None if in_memory else folder)
    if scene.get("prepared"):
        journal.prepare()
    put(journal, 1, 2)
    journal._is_broken = bool(scene.get("memory"))
    if scene.get("void"):
        with suppress(Interrupted), Interrupter(3, throw):
            put(journal, 0)
    if scene.get("full"):
        journal._limit = journal._offset
        if scene.get("spare"):
            journal._provide_at = 0.0
            journal.maintain()
        assert journal._main is not None
        journal._main.size = journal._offset
    return journal


class TestReentrance:
    @pytest.mark.parametrize("scene", scenarios())
    def test_append_inside_append(self, tmp_path, scene):
        """
        Wherever an append is re-entered, both rows are kept, here and on disk.
        """
        inner: list[int] = []
        for nth in count():
            folder = tmp_path / str(nth)
            journal = set_scene(folder, scene)
            act = partial(put_into, inner, journal)
            with Interrupter(nth, act) as place:
                outer = put(journal, 3)
            if not place.has_acted:
                break
            last = put(journal, 4)
            known = sorted([1, 2, *outer, inner.pop(), *last])

            assert 5 == len(set(known))

            check_found(folder, journal, known, scene)
        assert nth > 3

    @pytest.mark.parametrize("scene", scenarios())
    def test_append_broken_off(self, tmp_path, scene):
        """
        Wherever an append is broken off, its row is kept or void: nothing is missing.
        """
        for nth in count():
            folder = tmp_path / str(nth)
            journal = set_scene(folder, scene)
            before: list[int] = []
            try:
                with Interrupter(nth, throw) as place:
                    before = put(journal, 3)
            except Interrupted:
                pass
            if not place.has_acted:
                break
            after = put(journal, 4, 5)

            check_found(folder, journal, [1, 2, *before, *after], scene)
        assert nth > 3

    @pytest.mark.parametrize("scene", scenarios())
    def test_inner_append_broken_off(self, tmp_path, scene):
        """
        An append inside another one may be broken off too, wherever both are.
        """
        inner: list[int] = []
        broken_off = 0

        def put_and_fail(deep: int) -> Callable[[], None]:
            def act() -> None:
                nonlocal broken_off
                try:
                    with Interrupter(deep, throw):
                        inner.extend(put(journal, 9))
                except Interrupted:
                    broken_off += 1

            return act

        for nth in range(0, 60, 4):
            for deep in range(0, 40, 4):
                folder = tmp_path / f"{nth}-{deep}"
                journal = set_scene(folder, scene)
                inner.clear()
                with Interrupter(nth, put_and_fail(deep)):
                    outer = put(journal, 3)
                after = put(journal, 4)

                check_found(folder, journal, [1, 2, *outer, *inner, *after], scene)
        assert broken_off > 10

    def test_death_inside_a_handler(self, tmp_path):
        """
        Rows that were under way when the process died are not missing.
        """

        class Died(BaseException):
            pass

        def die() -> None:
            assert put(journal, 9)
            raise Died

        for nth in count():
            folder = tmp_path / str(nth)
            journal = set_scene(folder, {"prepared": True})
            try:
                with Interrupter(nth, die) as place:
                    put(journal, 3)
            except Died:
                pass
            abandon(journal)
            rows, missing = find(folder)

            assert [] == missing
            assert {make_row(1), make_row(2)} <= set(rows.values())
            if not place.has_acted:
                break

            assert make_row(9) in rows.values()

    def test_take_inside_append(self, tmp_path):
        """
        A handler that drains never overtakes the append it interrupts.
        """
        for nth in count():
            journal = set_scene(tmp_path / str(nth), {"prepared": True})
            got: list[int] = []

            def act(journal: Spool = journal, got: list[int] = got) -> None:
                put(journal, 9)
                got += drain(journal)[0]
                journal.maintain()
                journal.seal()
                journal.close()

            with Interrupter(nth, act) as place:
                put(journal, 3)
            indexes, missing = drain(journal)

            assert [] == missing
            assert sorted(got + indexes) == list(range(1, len(got + indexes) + 1))
            journal.close()
            if not place.has_acted:
                break

    def test_signals(self, tmp_path):
        """
        A timer's handler appends at any instant; every row is found, in memory and on
        disk.
        """
        inner: list[int] = []
        outer: list[int] = []
        journal = make_spool(tmp_path, capacity=1_000)
        row = make_row(0)
        payload = pack(row)
        old = signal.signal(
            signal.SIGALRM, lambda *_: inner.append(journal.append(payload, row))
        )
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
        try:
            for number in range(20_000):
                outer.append(journal.append(payload, row))
                if number % 500 == 0:
                    journal.maintain()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        known = sorted(inner + outer)

        assert len(inner) > 10
        assert list(range(1, len(known) + 1)) == known
        assert (known, []) == drain(journal)
        abandon(journal)
        rows, missing = find(tmp_path)
        assert (known, []) == (sorted(rows), missing)

    def test_marks_of_rows_in_memory(self, tmp_path):
        """
        Rows that could not be written are written later, whichever was marked first.
        """
        clock = Clock()
        journal = make_spool(tmp_path, clock=clock)
        put(journal, 1)
        journal._opening = 2  # as in a handler's handler, while files are created
        journal._seal_side()
        with journal._lock:
            journal._is_inside = True
            journal._mark_unwritten(3)
            assert [2, 3] == put(journal, 2, 3)
            journal._is_inside = False
        journal._opening = 0
        clock.now += 5
        journal.maintain()
        abandon(journal)

        assert ([1, 2, 3], []) == found_in(tmp_path)

    def test_finalizers(self, tmp_path):
        """
        A `__del__` that the garbage collector runs inside append may append.
        """

        class Mourner:
            def __init__(self) -> None:
                self.me = self

            def __del__(self) -> None:
                inner.append(journal.append(payload, row))

        inner: list[int] = []
        row = make_row(0)
        payload = pack(row)
        journal = make_spool(tmp_path)
        old = gc.get_threshold()
        gc.set_threshold(3)
        try:
            outer = []
            for _ in range(3_000):
                Mourner()
                outer.append(journal.append(payload, row))
        finally:
            gc.set_threshold(*old)
        gc.collect()
        known = sorted(inner + outer)

        assert list(range(1, 6_001)) == known
        assert (known, []) == drain(journal)
        journal.close()


def check_found(
    folder: Path, journal: Spool, known: list[int], scene: dict[str, bool]
) -> None:
    """
    Take everything, then adopt everything: *known* is there, nothing is missing.
    """
    if scene.get("memory"):
        indexes, missing = drain(journal, 1)
        journal.close()
    else:
        batch = journal.take(100)
        assert batch is not None
        indexes, missing = [index for index, _ in batch.rows], batch.missing
        assert journal.last_index == batch.last
        abandon(journal)
        rows, lost = find(folder)
        assert [] == lost
        assert set(known) <= set(rows)
        shutil.rmtree(folder)

    assert [] == missing
    assert set(known) <= set(indexes)
    assert sorted(indexes) == indexes


# --- forks and kills --------------------------------------------------------------


class TestFork:
    def test_child_is_another_writer(self, tmp_path):
        """
        A forked child has its own id, queue and files; its parent's stay the parent's.
        """
        out = run_script(
            """
folder = Path(sys.argv[1])
journal = make_spool(folder)
journal.prepare()
put(journal, 1, 2, 3)
parent = journal.writer_id
if (child := os.fork()) == 0:
    journal.after_fork_in_child()
    assert journal.depth == 0 and journal.take(9) is None
    assert journal.writer_id != parent
    put(journal, 10, 11)
    journal.maintain()
    put(journal, 12)
    batch = journal.take(9)
    assert [row[14] for _, row in batch.rows] == ["u-10", "u-11", "u-12"], batch
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
rows, missing = find(folder)
print(sorted(row[14] for row in rows.values()), missing)
print(drain(journal))
print(put(journal, 4))
""",
            tmp_path,
        )

        assert [
            "['u-10', 'u-11', 'u-12'] []",
            "([1, 2, 3], [])",
            "[4]",
        ] == out.splitlines()

    def test_parents_lock_outlives_its_child(self, tmp_path):
        """
        A child that closes what it inherited does not unlock its parent's journal.
        """
        with opened(tmp_path) as journal:
            put(journal, 1)
            run = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
            try:
                run.communicate(b"\n")

                assert ({}, []) == find(tmp_path)
            finally:
                run.kill()

    def test_fork_while_threads_append(self, tmp_path):
        """
        Children forked at any instant append, and none hangs.
        """
        out = run_script(
            """
folder = Path(sys.argv[1])
journal = make_spool(folder, capacity=500)
journal.prepare()
stop = threading.Event()
acked = [0] * 4
def produce(name):
    while not stop.is_set():
        acked[name] += len(put(journal, name))
threads = [threading.Thread(target=produce, args=(n,)) for n in range(4)]
for thread in threads:
    thread.start()
children = []
for number in range(12):
    time.sleep(0.003)
    journal.maintain()
    if (child := os.fork()) == 0:
        journal.after_fork_in_child()
        signal.alarm(20)
        put(journal, *[1000 + number] * 50)
        journal.maintain()
        put(journal, *[1000 + number] * 50)
        os._exit(0)
    children.append(child)
statuses = [os.waitpid(child, 0)[1] for child in children]
stop.set()
for thread in threads:
    thread.join()
indexes, missing = drain(journal, 1000)
print(statuses == [0] * 12, len(indexes) == sum(acked), missing)
found = [[row for batch in o.batches(0, 100) for _, row in batch.rows]
         for o in adopt(folder, service="orders", store="store-1")]
print(len(found), {len(rows) for rows in found})
""",
            tmp_path,
        )

        assert ["True True []", "12 {100}"] == out.splitlines()

    def test_fork_in_a_handler_inside_append(self, tmp_path):
        """
        A signal handler that forks inside append: the row is stored once, by the
        parent, and both go on.
        """
        out = run_script(
            """
from tests.test_spool import Interrupter
folder = Path(sys.argv[1])
for nth in range(40):
    journal = make_spool(folder / str(nth))
    journal.prepare()
    put(journal, 1)
    children = []
    def fork():
        children.append(os.fork())
        if children == [0]:
            journal.after_fork_in_child()
    with Interrupter(nth, fork):
        put(journal, 2)
    put(journal, 3)
    if children == [0]:
        os._exit(0)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0, nth
    journal.close()
    ids = [row[0] for o in adopt(folder / str(nth), service="orders", store="store-1")
           for batch in o.batches(0, 100) for _, row in batch.rows]
    assert len(set(ids)) == 3, ids
print("done")
""",
            tmp_path,
        )

        assert "done\n" == out


VICTIM = """
folder, pipe, power = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
journal = make_spool(folder, capacity=50, durability=power)
journal.prepare()
lock = threading.Lock()
def produce(name):
    number = name
    while True:
        index, = put(journal, number)
        number += 4
        os.write(pipe, b"%d %d\\n" % (index, number - 4))
def consume():
    while True:
        batch = journal.take(20)
        if batch is not None and batch.last % 3:
            journal.ack(batch.last)
        journal.maintain()
        time.sleep(0.001)
signal.signal(signal.SIGALRM, lambda *_: os.write(
    pipe, b"%d %d\\n" % (put(journal, 10**9)[0], 10**9)))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for name in range(1, 4):
    threading.Thread(target=produce, args=(name,)).start()
threading.Thread(target=consume).start()
produce(0)
"""


def kill_one(folder: Path, delay_s: float, durability: str = "process") -> None:
    """
    Kill a busy process after *delay_s*; each row whose append returned is found.
    """
    reader, writer = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + VICTIM, folder, str(writer), durability],
        cwd=ROOT,
        pass_fds=[writer],
    ) as victim:
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            told = pipe.readline()
            timer = threading.Timer(delay_s, victim.kill)
            timer.start()
            told += pipe.read()
        timer.join()
    lines = told[: told.rfind(b"\n")].splitlines()
    acked = dict(map(int, line.split()) for line in lines)
    rows, missing = find(folder)

    assert acked
    assert [] == missing
    assert {i: make_row(n) for i, n in acked.items()} == {i: rows[i] for i in acked}


class TestKill:
    @pytest.mark.parametrize("trial", range(20))
    def test_kill_9(self, tmp_path, trial):
        """
        Rows acknowledged to threads and handlers outlive kill -9 at a random instant.
        """
        kill_one(tmp_path, random.Random(trial).uniform(0.0, 0.12))

    def test_kill_9_power(self, tmp_path):
        """
        Waiting for fdatasync does not change that.
        """
        kill_one(tmp_path, 0.1, "power")

    @pytest.mark.parametrize("end", ["os._exit(1)", "os.abort()", "os.kill(0, 11)"])
    def test_other_deaths(self, tmp_path, end):
        """
        Nor does it matter how a process dies.
        """
        script = f"""
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.setpgrp()
journal = make_spool(Path(sys.argv[1]))
journal.prepare()
put(journal, *range(100))
{end}
"""
        subprocess.run(
            [sys.executable, "-c", PRELUDE + script, tmp_path],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
        rows, missing = find(tmp_path)

        assert (list(range(1, 101)), []) == (sorted(rows), missing)


# --- damage -----------------------------------------------------------------------


def journal_of(folder: Path, *, mapped: int, written: int) -> None:
    """
    Leave a dead writer's journal: rows in a mapped segment, then in a written one.
    """
    journal = make_spool(folder)
    if mapped:
        journal.prepare()
    put(journal, *range(mapped))
    journal.seal()
    journal._give_back()
    put(journal, *range(mapped, mapped + written))
    abandon(journal)
    for path in segments(folder):
        # Three bytes: two stand in a checksum by chance, once in some hundred runs.
        if b"\0u-" not in path.read_bytes():
            path.unlink()


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.seg"), key=lambda path: int(path.name.split(".")[1]))


def data_end(path: Path) -> int:
    return len(path.read_bytes().rstrip(b"\0"))


class TestDamage:
    @given(
        mapped=st.integers(0, 5),
        written=st.integers(0, 5),
        which=st.integers(0, 1),
        where=st.integers(0, 2_000),
        bit=st.integers(0, 7),
    )
    def test_bit_flips(self, tmp_path_factory, mapped, written, which, where, bit):
        """
        A flipped bit costs at most its own row, and that is reported.
        """
        assume(mapped or written)
        folder = tmp_path_factory.mktemp("flip")
        journal_of(folder, mapped=mapped, written=written)
        path = segments(folder)[which % len(segments(folder))]
        content = bytearray(path.read_bytes())
        content[where % min(data_end(path) + 40, len(content))] ^= 1 << bit
        path.write_bytes(content)
        rows, missing = find(folder)

        assert list(range(1, mapped + written + 1)) == sorted([*rows, *missing])
        assert all(make_row(index - 1) == row for index, row in rows.items())
        assert len(missing) <= 1
        shutil.rmtree(folder)

    @given(st.integers(0, 2_000))
    def test_cut_mapped_segment(self, tmp_path_factory, where):
        """
        A preallocated segment that was cut has lost at least a row, and says so.
        """
        folder = tmp_path_factory.mktemp("cut")
        journal_of(folder, mapped=6, written=0)
        (path,) = segments(folder)
        os.truncate(path, where % data_end(path))
        rows, missing = find(folder)

        assert list(range(1, len(rows) + 1)) == sorted(rows)
        assert missing or path.stat().st_size < 200
        shutil.rmtree(folder)

    @given(st.integers(1, len(pack(make_row(3)))))
    def test_torn_written_segment(self, tmp_path_factory, lacking):
        """
        A write that was cut short by death left no acknowledged row: none is missing.
        """
        folder = tmp_path_factory.mktemp("torn")
        journal_of(folder, mapped=3, written=1)
        path = segments(folder)[-1]
        os.truncate(path, path.stat().st_size - lacking)
        rows, missing = find(folder)

        assert ([1, 2, 3], []) == (sorted(rows), missing)
        shutil.rmtree(folder)

    @pytest.mark.parametrize("copied", [1, 100, 250])
    def test_torn_copy(self, tmp_path, copied):
        """
        A copy that was cut short by death has no header yet: no row is missing.
        """
        journal_of(tmp_path, mapped=3, written=0)
        (path,) = segments(tmp_path)
        frame = frames.encode_frame(frames.ROW, 4, pack(make_row(3)))
        with path.open("r+b") as file:
            file.seek(data_end(path) + frames.HEADER_SIZE)
            file.write(frame[frames.HEADER_SIZE : frames.HEADER_SIZE + copied])
        rows, missing = find(tmp_path)

        assert ([1, 2, 3], []) == (sorted(rows), missing)

    def test_damaged_stretch(self, tmp_path):
        """
        Reading goes on past damage; the ranges in it are told as such.
        """
        journal_of(tmp_path, mapped=40, written=0)
        (path,) = segments(tmp_path)
        content = bytearray(path.read_bytes())
        size = len(pack(make_row(0))) + frames.HEADER_SIZE
        start = content.index(pack(make_row(0)))
        content[start + 5 * size : start + 9 * size] = os.urandom(4 * size)
        content[start + 20 * size] ^= 255
        path.write_bytes(content)
        (orphan,) = adopt(tmp_path, service=SERVICE, store=STORE)
        (batch,) = orphan.batches(0, 100)
        orphan.release()

        assert 40 == batch.last
        assert [(6, 10), (21, 21)] == batch.missing

    def test_damage_below_an_interruption(self, tmp_path):
        """
        A row that was open when a handler appended, and was written then, is missed.
        """
        for nth in range(6):
            folder = tmp_path / str(nth)
            journal = set_scene(folder, {"prepared": True})
            with Interrupter(nth, partial(put, journal, 9)):
                put(journal, 3)
            put(journal, 4)
            abandon(journal)
            (path,) = [p for p in segments(folder) if b"u-3" in p.read_bytes()]
            content = path.read_bytes()
            path.write_bytes(content.replace(b"u-3", b"u-?"))
            rows, missing = find(folder)

            assert {make_row(n) for n in (1, 2, 4, 9)} == set(rows.values())
            assert 1 == len(missing)

    def test_removed_segment(self, tmp_path):
        """
        The rows of a segment that somebody removed are missing.
        """
        journal = make_spool(tmp_path)
        for first in (0, 10, 20):
            put(journal, *range(first, first + 10))
            journal.seal()
        abandon(journal)
        segments(tmp_path)[1].unlink()
        rows, missing = find(tmp_path)

        assert list(range(11, 21)) == missing
        assert 20 == len(rows)

    @pytest.mark.parametrize("with_ack", [True, False])
    def test_retired_front_is_not_missing(self, tmp_path, with_ack):
        """
        What was delivered and removed is no loss, even when the .ack file is gone.
        """
        clock = Clock()
        journal = make_spool(tmp_path, clock=clock)
        put(journal, *range(10))
        journal.seal()
        drain(journal)
        clock.now += spool.RETAIN_S
        put(journal, *range(10, 20))
        journal.maintain()
        abandon(journal)
        if not with_ack:
            next(tmp_path.glob("*.ack")).unlink()
        rows, missing = find(tmp_path)

        assert (list(range(11, 21)), []) == (sorted(rows), missing)

    def test_in_process(self, tmp_path):
        """
        A living process too notices damage in what only its journal holds.
        """
        with opened(tmp_path, capacity=0) as journal:
            journal.prepare()
            put(journal, *range(10))
            (path,) = [p for p in segments(tmp_path) if b"u-4" in p.read_bytes()]
            content = path.read_bytes()
            with path.open("r+b") as file:
                file.seek(content.index(b"u-4"))
                file.write(b"x")

            assert ([1, 2, 3, 4, 6, 7, 8, 9, 10], [(5, 5)]) == drain(journal)

    def test_lost_ack(self, tmp_path):
        """
        A damaged .ack file costs a replay, no row.
        """
        journal = make_spool(tmp_path)
        put(journal, *range(10))
        journal.take(5)
        journal.ack(5)
        abandon(journal)
        next(tmp_path.glob("*.ack")).write_bytes(b"rubbish")
        rows, missing = find(tmp_path)

        assert (list(range(1, 11)), []) == (sorted(rows), missing)


# --- disks ------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path):
    """
    A file system of 640 KiB.
    """
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("only root may mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


class TestDisk:
    def test_full_and_freed(self, tiny_disk):
        """
        On a full disk rows go to memory, then are refused; when it is freed, those in
        memory are journalled too.
        """
        clock = Clock()
        journal = make_spool(tiny_disk, capacity=4_000, clock=clock)
        journal.prepare()
        accepted = []
        while index := put(journal, len(accepted))[0]:
            accepted.append(index)
            journal.maintain()

        assert "memory" == journal.mode
        assert "free space" in journal.fault
        assert not journal.has_room
        assert journal.spooled < len(accepted)

        batch = journal.take(200)
        assert batch is not None
        journal.ack(batch.last)
        remount = ["mount", "-o", "remount,size=8m", tiny_disk]
        subprocess.run(remount, check=True)
        clock.now += 5
        journal.maintain()

        assert ("disk", "") == (journal.mode, journal.fault)

        more = put(journal, len(accepted))
        abandon(journal)
        rows, missing = find(tiny_disk)

        assert [] == missing
        assert set(range(201, more[0] + 1)) <= set(rows)

    def test_full_disk_loses_nothing_it_took(self, tiny_disk):
        """
        Each row that was given an index on a filling disk is delivered.
        """
        journal = make_spool(tiny_disk, capacity=100)
        accepted = [i for n in range(4_000) if (i := put(journal, n)[0])]

        assert 100 < len(accepted) < 4_000
        assert (accepted, []) == drain(journal)
        journal.close()

    def test_file_size_limit(self, tmp_path):
        """
        A write that `ulimit -f` cuts in the middle is made again, in the next file.
        """
        out = run_script(
            """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
folder = Path(sys.argv[1])
journal = make_spool(folder, capacity=10)
for number in range(2_000):
    assert put(journal, number)
    if number % 100 == 0:
        journal.maintain()
print(journal.mode, "ulimit -f" in journal.fault)
for number in range(5):
    assert journal.take(100)
sys.stdout.flush()
os.kill(os.getpid(), 9) if os.fork() == 0 else os.wait()
journal.after_fork_in_child()
rows, missing = find(folder)
print(len(rows), missing, len(list(folder.glob("*.seg"))) > 3)
""",
            tmp_path,
        )

        assert ["disk True", "2000 [] True"] == out.splitlines()

    def test_limit(self, tmp_path):
        """
        At FASTEN_SPOOL_MAX_BYTES delivered segments go first; then rows are refused,
        and the fault names the variable.
        """
        clock = Clock()
        with opened(tmp_path, max_bytes=600_000, capacity=10, clock=clock) as journal:
            for number in range(10_000):
                assert put(journal, number)
                if number % 100 == 0:
                    drain(journal)
                    clock.now += 2
                    journal.maintain()

            assert sum(p.stat().st_size for p in journal_files(tmp_path)) <= 600_000

            accepted = [i for n in range(10_000) if (i := put(journal, n)[0])]

            assert 100 < len(accepted) < 5_000
            assert "memory" == journal.mode
            assert "FASTEN_SPOOL_MAX_BYTES (600000)" in journal.fault
            assert sum(p.stat().st_size for p in journal_files(tmp_path)) <= 600_000

            drain(journal)
            clock.now += 5
            journal.maintain()
            put(journal, 1)

            assert "disk" == journal.mode
            assert (1, []) == (len(drain(journal)[0]), [])

    def test_limit_counts_all_writers(self, tmp_path):
        """
        The limit is of the directory, whoever fills it.
        """
        (tmp_path / "somebody's").write_bytes(b"x" * 500_000)
        with opened(tmp_path, max_bytes=500_100, capacity=10) as journal:
            put(journal, 1)

            assert "memory" == journal.mode

    def test_no_directory(self, tmp_path):
        """
        Where the directory cannot be made, rows are held in memory, and the fault says
        what to do.
        """
        (tmp_path / "file").touch()
        clock = Clock()
        with opened(tmp_path / "file" / "spool", clock=clock) as journal:
            assert [1, 2] == put(journal, 1, 2)
            assert "memory" == journal.mode
            assert "set FASTEN_SPOOL_DIR to a directory" in journal.fault

            (tmp_path / "file").unlink()
            clock.now += 5
            journal.maintain()

            assert ("disk", "") == (journal.mode, journal.fault)

            abandon(journal)

        assert {1: make_row(1), 2: make_row(2)} == find(tmp_path / "file" / "spool")[0]

    def test_memory_only(self):
        """
        Without a directory the fault tells what that costs.
        """
        with opened(None, capacity=3) as journal:
            journal.prepare()

            assert [1, 2, 3, 0] == put(journal, 1, 2, 3, 4)
            assert "memory" == journal.mode
            assert "lost when" in journal.fault
            assert 0 == journal.spooled
            assert ([1, 2, 3], []) == drain(journal)
            assert [4] == put(journal, 5)

    def test_without_posix_fallocate(self, tmp_path, monkeypatch):
        """
        Where segments cannot be preallocated, each row is written by a system call.
        """
        monkeypatch.delattr(os, "posix_fallocate")
        journal = make_spool(tmp_path, capacity=5)
        journal.prepare()
        put(journal, *range(20))
        journal.maintain()

        assert list(range(1, 21)) == [i for i, _ in journal.take(99).rows]

        abandon(journal)

        assert list(range(1, 21)) == sorted(find(tmp_path)[0])

    @pytest.mark.parametrize("how", ["remove", "rename", "remove all"])
    def test_active_segments_taken_away(self, tmp_path, how):
        """
        Rows of a segment that somebody removed are written again while we live.
        """
        folder = tmp_path / "spool"
        clock = Clock()
        journal = make_spool(folder, clock=clock, capacity=3)
        put(journal, 1)
        journal.maintain()
        put(journal, *range(2, 11))
        for path in segments(folder):
            if how == "rename":
                path.rename(path.with_suffix(".bak"))
            else:
                path.unlink()
        if how == "remove all":
            shutil.rmtree(folder)
        put(journal, 11)
        clock.now += 5
        journal.maintain()
        put(journal, 12)

        assert list(range(1, 13)) == [i for i, _ in journal.take(99).rows]

        abandon(journal)
        rows, missing = find(folder)

        assert (list(range(1, 13)), []) == (sorted(rows), missing)

    def test_closed_segments_taken_away(self, tmp_path):
        """
        One look later, the rows of such a file that are in memory are in another.
        """
        clock = Clock()
        journal = make_spool(tmp_path, clock=clock)
        put(journal, *range(1, 11))
        journal.seal()
        journal.maintain()
        put(journal, 11)
        for path in segments(tmp_path):
            if b"u-4" in path.read_bytes():
                path.unlink()
        clock.now += 5
        journal.maintain()
        abandon(journal)
        rows, missing = find(tmp_path)

        assert (list(range(1, 12)), []) == (sorted(rows), missing)

    def test_segment_taken_away_while_it_is_read(self, tmp_path):
        """
        A backlog that is being read from the journal goes on where it was rescued to.
        """
        clock = Clock()
        with opened(tmp_path, clock=clock, capacity=0) as journal:
            journal.prepare()
            put(journal, *range(1, 101))
            journal.seal()
            put(journal, *range(101, 201))
            first = journal.take(20)
            segments(tmp_path)[-1].unlink()
            for path in segments(tmp_path):
                if b"u-150" in path.read_bytes():
                    path.unlink()
            clock.now += 5
            journal.maintain()

            assert first is not None
            assert list(range(1, 21)) == [index for index, _ in first.rows]
            assert (list(range(21, 201)), []) == drain(journal, 30)

    def test_two_spools_share_a_directory(self, tmp_path):
        """
        Writers of one service do not disturb each other.
        """
        with opened(tmp_path) as one, opened(tmp_path) as other:
            put(one, *range(10))
            put(other, *range(5))

            assert (list(range(1, 11)), []) == drain(one)
            assert (list(range(1, 6)), []) == drain(other)
            assert ({}, []) == find(tmp_path)


class TestPower:
    def test_append_waits_for_fdatasync(self, tmp_path, monkeypatch):
        """
        When append returns, the bytes of the row have been synced: mapped or written,
        from threads or a handler.
        """
        synced: dict[int, bytes] = {}
        real = os.fdatasync

        def sync(fd: int) -> None:
            synced[os.fstat(fd).st_ino] = os.pread(fd, os.fstat(fd).st_size, 0)
            real(fd)

        monkeypatch.setattr(os, "fdatasync", sync)
        journal = make_spool(tmp_path, durability="power")
        unsynced: list[int] = []

        def produce(name: int) -> None:
            for number in range(name * 1000, name * 1000 + 40):
                put(journal, number)
                if not any(pack(make_row(number)) in b for b in [*synced.values()]):
                    unsynced.append(number)

        produce(9)
        journal.maintain()
        threads = [threading.Thread(target=produce, args=(n,)) for n in range(1, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for nth in range(12):
            with Interrupter(nth, partial(produce, nth + 20)):
                put(journal, 7)

        assert [] == unsynced
        assert 172 + 480 == len(drain(journal)[0])
        journal.close()

    def test_names_are_synced(self, tmp_path, monkeypatch):
        """
        The names of all segments are synced as they are made, and those of the new
        directories that they are in.
        """
        synced: dict[Path, set[Path]] = {}
        real = os.fsync

        def sync(fd: int) -> None:
            real(fd)
            folder = Path(f"/proc/self/fd/{fd}").readlink()
            synced[folder] = set(folder.iterdir())

        monkeypatch.setattr(os, "fsync", sync)
        folder = tmp_path / "new" / "spool"
        with opened(folder, durability="power") as journal:
            for number in range(3):
                put(journal, number)
                journal.seal()
                journal.maintain()

                assert set(segments(folder)) <= synced[folder]
        assert folder in synced[folder.parent]
        assert folder.parent in synced[tmp_path]

    def test_group_commit(self, tmp_path, monkeypatch):
        """
        Threads that wait at the same time share a sync.
        """
        calls = []
        entered, go = threading.Event(), threading.Event()
        real = os.fdatasync

        def sync(fd: int) -> None:
            calls.append(fd)
            entered.set()
            go.wait(10)
            real(fd)

        journal = make_spool(tmp_path, durability="power")
        journal.prepare()
        put(journal, 0)
        monkeypatch.setattr(os, "fdatasync", sync)
        threads = [
            threading.Thread(target=put, args=(journal, n)) for n in range(1, 20)
        ]
        for thread in threads:
            thread.start()
        entered.wait(10)
        while journal.last_index < 20:
            time.sleep(0.001)
        go.set()
        for thread in threads:
            thread.join(10)

        assert len(calls) <= 4
        assert 20 == len(drain(journal)[0])
        journal.close()

    def test_failed_sync_is_not_trusted(self, tmp_path, monkeypatch):
        """
        After an error of fdatasync the rows are written and synced in another file.
        """
        real, failed, good = os.fdatasync, set(), []

        def sync(fd: int) -> None:
            inode = os.fstat(fd).st_ino
            if not failed:
                failed.add(inode)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            assert inode not in failed
            real(fd)
            good.append(os.pread(fd, os.fstat(fd).st_size, 0))

        journal = make_spool(tmp_path, durability="power")
        journal.prepare()
        put(journal, 1)
        monkeypatch.setattr(os, "fdatasync", sync)
        put(journal, 2, 3)

        assert all(any(pack(make_row(n)) in b for b in good) for n in (2, 3))
        assert "" == journal.fault

        abandon(journal)

        assert ([1, 2, 3], []) == found_in(tmp_path)

    def test_disk_that_cannot_sync(self, tmp_path, monkeypatch):
        """
        Where that fails too, rows go on and the fault says what they lack.
        """

        def sync(fd: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fdatasync", sync)
        with opened(tmp_path, durability="power") as journal:
            journal.prepare()

            assert [1, 2] == put(journal, 1, 2)
            assert "not a power cut: check the disk" in journal.fault
            assert ([1, 2], []) == drain(journal)


# --- upkeep and adoption ----------------------------------------------------------


class TestUpkeep:
    def test_delivered_segments_stay_15_minutes(self, tmp_path):
        """
        A segment goes when it is delivered and 15 minutes old, not before.
        """
        clock = Clock()
        with opened(tmp_path, clock=clock) as journal:
            put(journal, 1)
            (first,) = segments(tmp_path)
            journal.seal()
            put(journal, 2)
            clock.now += 10_000
            journal.maintain()

            assert first.exists()

            drain(journal)
            clock.now += spool.RETAIN_S - 1
            journal.maintain()

            assert first.exists()

            clock.now += 1
            journal.maintain()

            assert not first.exists()

    def test_idle_writer_gives_back(self, tmp_path):
        """
        A quiet minute costs the spare segment, a quiet quarter of an hour the rest.
        """
        clock = Clock()
        with opened(tmp_path, clock=clock) as journal:
            put(journal, 1)
            journal.maintain()
            put(journal, 2)
            journal.maintain()

            assert 3 == len(segments(tmp_path))

            drain(journal)
            clock.now += spool.IDLE_S
            journal.maintain()

            assert 2 == len(segments(tmp_path))
            assert journal.bytes_on_disk <= 16 * 1024 * 1024 // 32

            clock.now += spool.RETAIN_S
            journal.maintain()

            assert [] == segments(tmp_path)
            assert [3] == put(journal, 3)
            assert ([3], []) == drain(journal)

    def test_undelivered_rows_are_kept_when_quiet(self, tmp_path):
        """
        However quiet, what is not delivered stays.
        """
        clock = Clock()
        journal = make_spool(tmp_path, clock=clock)
        put(journal, 1)
        journal.maintain()
        put(journal, 2)
        clock.now += 10 * spool.RETAIN_S
        journal.maintain()
        abandon(journal)

        assert [1, 2] == sorted(find(tmp_path)[0])

    def test_erasure(self, tmp_path):
        """
        After seal, delivery and purge nothing of the rows is on disk.
        """
        with opened(tmp_path) as journal:
            put(journal, 1)
            journal.maintain()
            row = make_row(2, '"canary"')
            journal.append(pack(row), row)
            journal.seal()
            put(journal, 3)
            drain(journal)
            journal.purge()

            assert not [
                p for p in journal_files(tmp_path) if b"canary" in p.read_bytes()
            ]
            assert [4] == put(journal, 4)

    def test_refill(self, tmp_path):
        """
        What was delivered can be read again, while it is there.
        """
        with opened(tmp_path, capacity=4) as journal:
            put(journal, *range(10))
            drain(journal)
            again = [index for b in journal.batches(3, 2) for index, _ in b.rows]

            assert list(range(4, 11)) == again

    def test_lock_file_taken_away(self, tmp_path):
        """
        A living writer whose lock file is removed keeps its rows, and locks again.
        """
        clock = Clock()
        with opened(tmp_path, clock=clock) as journal:
            put(journal, 1)
            next(tmp_path.glob("*.lock")).unlink()

            assert ({}, []) == find(tmp_path)

            clock.now += 5
            journal.maintain()

            assert 1 == len(list(tmp_path.glob("*.lock")))
            assert ({}, []) == find(tmp_path)

    def test_append_after_close(self, tmp_path):
        """
        A row that comes after close still reaches the journal, of a new writer.
        """
        journal = make_spool(tmp_path)
        put(journal, 1)
        journal.close()
        put(journal, 2)
        abandon(journal)

        assert {1: make_row(1), 2: make_row(2)} == find(tmp_path)[0]


class TestAdopt:
    def test_delivered_before(self, tmp_path):
        """
        Delivery goes on where the dead writer stopped.
        """
        journal = make_spool(tmp_path)
        put(journal, *range(10))
        journal.take(4)
        journal.ack(4)
        abandon(journal)
        (orphan,) = adopt(tmp_path, service=SERVICE, store=STORE)

        assert (SERVICE, NODE, 4) == (orphan.service, orphan.node, orphan.acked)
        assert 32 == len(orphan.writer_id)
        assert orphan.bytes_on_disk > 1000

        batches = list(orphan.batches(orphan.acked, 4))
        orphan.release()

        assert [[5, 6, 7, 8], [9, 10]] == [[i for i, _ in b.rows] for b in batches]

    def test_one_adopter(self, tmp_path):
        """
        Of two processes one gets the rows; the other when the first lets go.
        """
        journal_of(tmp_path, mapped=3, written=0)
        (orphan,) = adopt(tmp_path, service=SERVICE, store=STORE)

        assert [] == adopt(tmp_path, service=SERVICE, store=STORE)

        orphan.release()
        (again,) = adopt(tmp_path, service=SERVICE, store=STORE)
        again.after_fork_in_child()

        assert [1, 2, 3] == sorted(find(tmp_path)[0])

    def test_done_is_kept_15_minutes(self, tmp_path):
        """
        A replayed journal can be recalled for 15 minutes; then it is removed.
        """
        journal_of(tmp_path, mapped=3, written=2)
        find(tmp_path)
        now = time.time()

        assert [] == adopt(tmp_path, service=SERVICE, store=STORE)

        (orphan,) = spool.recall(tmp_path, service=SERVICE, store=STORE)
        again = [index for batch in orphan.batches(0, 10) for index, _ in batch.rows]
        orphan.release()

        assert [1, 2, 3, 4, 5] == again

        adopt(
            tmp_path, service=SERVICE, store=STORE, now=lambda: now + spool.RETAIN_S - 9
        )

        assert 2 == len(segments(tmp_path))

        adopt(
            tmp_path, service=SERVICE, store=STORE, now=lambda: now + spool.RETAIN_S + 9
        )

        assert [] == list(tmp_path.iterdir())

    def test_purge(self, tmp_path):
        """
        After an erasure a replayed journal goes at once.
        """
        journal_of(tmp_path, mapped=3, written=2)
        (orphan,) = adopt(tmp_path, service=SERVICE, store=STORE)
        orphan.purge()

        assert [] == list(tmp_path.iterdir())

    def test_clean_close(self, tmp_path):
        """
        A writer that closed with all delivered is done; with rows left it is not.
        """
        with opened(tmp_path) as journal:
            put(journal, 1, 2)
            drain(journal)

        assert [] == adopt(tmp_path, service=SERVICE, store=STORE)

        with opened(tmp_path) as journal:
            put(journal, 3)

        assert [make_row(3)] == list(find(tmp_path)[0].values())

    def test_missing_lock_file(self, tmp_path):
        """
        A dead writer whose lock file is gone is adopted all the same.
        """
        journal_of(tmp_path, mapped=3, written=2)
        next(tmp_path.glob("*.lock")).unlink()

        assert [1, 2, 3, 4, 5] == sorted(find(tmp_path)[0])

    def test_unnamed_lock_file(self, tmp_path):
        """
        What a writer left that died while being born is tidied up.
        """
        newborn = tmp_path / f"{'a' * 32}.lock.0123abcd"
        newborn.touch()
        adopt(tmp_path, service=SERVICE, store=STORE)

        assert newborn.exists()

        adopt(tmp_path, service=SERVICE, store=STORE, now=lambda: time.time() + 100)

        assert not newborn.exists()

    def test_strangers_in_the_spool(self, tmp_path):
        """
        Links, FIFOs, folders and files of nobody are neither followed nor waited for.
        """
        writer = "b" * 32
        target = tmp_path / "target"
        journal_of(target, mapped=2, written=0)
        folder = tmp_path / "spool"
        folder.mkdir()
        os.mkfifo(folder / f"{writer}.lock")
        os.mkfifo(folder / f"{writer}.1.seg")
        (folder / f"{writer}.2.seg").symlink_to(segments(target)[0])
        (folder / f"{writer}.3.seg").mkdir()
        (folder / f"{writer}.4.seg").touch()
        (folder / "README").write_text("hello")
        (folder / f"{'c' * 32}.lock").symlink_to(next(target.glob("*.lock")))
        found = spool.survey(folder, service=SERVICE, store=STORE)

        assert ({}, []) == find(folder)
        assert {"not a regular file"} == {f.reason for f in found if f.size < 100} - {
            "nothing tells any more whose rows these are; keep it for forensics"
        }
        assert 5 == len(found)

    def test_strange_files_among_good_ones(self, tmp_path):
        """
        They do not keep the rows beside them from being found.
        """
        journal_of(tmp_path, mapped=3, written=0)
        writer = segments(tmp_path)[0].name[:32]
        os.mkfifo(tmp_path / f"{writer}.77.seg")
        (tmp_path / f"{writer}.78.seg").symlink_to("/dev/zero")
        (tmp_path / f"{writer}.79.seg").touch()
        (tmp_path / f"{writer}.80.seg").write_bytes(os.urandom(5_000))

        assert ([1, 2, 3], []) == found_in(tmp_path)

    def test_foreign_owner(self, tmp_path):
        """
        A file of another user is not read.
        """
        if os.geteuid() != 0:
            pytest.skip("only root may give files away")
        journal_of(tmp_path, mapped=3, written=0)
        for path in tmp_path.iterdir():
            os.chown(path, 12345, -1)
        (found, *_) = spool.survey(tmp_path, service=SERVICE, store=STORE)

        assert ({}, []) == find(tmp_path)
        assert "owned by uid 12345, not by 0" == found.reason

    def test_left_alone(self, tmp_path):
        """
        Another service's, another store's and a newer fasten's rows are left alone and
        named; a living process's are not.
        """
        others = [
            ({"service": "billing"}, "rows of service 'billing'"),
            ({"store": "elsewhere"}, "fasten drain --dsn"),
        ]
        for options, _ in others:
            known = {"service": SERVICE, "node": NODE, "store": STORE, **options}
            journal = Spool(tmp_path, **known)
            put(journal, 1)
            abandon(journal)
        newer = make_spool(tmp_path)
        put(newer, 1)
        abandon(newer)
        for path in tmp_path.glob(f"{newer_writer(tmp_path)}.*"):
            if path.suffix != ".ack":
                frame = frames.encode_frame(frames.HEAD, 1, b'{"format":2,"new":[]}')
                path.write_bytes(frame + b"\0\1\2")
        with opened(tmp_path) as living:
            put(living, 1)
            found = spool.survey(tmp_path, service=SERVICE, store=STORE)

        assert 3 == len(found)
        assert all(any(part in f.reason for f in found) for _, part in others)
        assert any("format 2 of a newer fasten" in f.reason for f in found)
        assert [1] == sorted(find(tmp_path)[0])

    def test_has_foreign(self, tmp_path):
        """
        Whether to look for dead writers can be told without opening anything.
        """
        assert not spool.has_foreign(tmp_path / "nowhere")

        journal_of(tmp_path, mapped=1, written=0)

        assert spool.has_foreign(tmp_path)


def newer_writer(folder: Path) -> str:
    return max(folder.glob("*.lock"), key=lambda path: path.stat().st_mtime_ns).stem


class TestQuarantine:
    def test_round_trip(self, tmp_path):
        """
        A row that was put aside is found again, with the reason; not by adopt.
        """
        folder = tmp_path / "spool"
        row = make_row(4, '"line\\nbreak"')

        assert spool.quarantine(folder, "d" * 32, (4, row), "too long")

        (path,) = folder.iterdir()
        with path.open("ab") as file:
            file.write(b"{rubbish\n")
        found = list(spool.quarantined(folder))

        assert [(path, "too long", row, "", "")] == [tuple(entry) for entry in found]
        assert 0o600 == stat.S_IMODE(path.stat().st_mode)
        assert ({}, []) == find(folder)

    def test_no_directory(self, tmp_path):
        """
        Where it cannot be kept, that is told.
        """
        (tmp_path / "file").touch()

        assert not spool.quarantine(tmp_path / "file", "d" * 32, (1, make_row(1)), "")
