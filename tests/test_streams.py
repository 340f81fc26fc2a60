# SPDX-License-Identifier: Apache-2.0
"""
Rings, queues and the lines on stdout: real pipes, real forks, real threads.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasten.errors import InvalidQuery
from fasten.rows import AUDIT_COLUMNS, ApiRow, AuditRow, Query, SysRow
from fasten.streams import (
    PIPE_BUF,
    BoundedQueue,
    LineWriter,
    Ring,
    Stream,
    finished,
    json_line,
)
from tests.outside import run_python, wait_until


def sys_row(number: int = 1, **fields: Any) -> dict[str, Any]:
    """
    Make a row of the sys stream.
    """
    return {
        "shape": "sys",
        "level": "info",
        "event": f"event-{number}",
        "request_id": f"r-{number % 3}",
        "service_id": "svc",
        "source_node_id": "node",
        "tenant_id": None,
        "timestamp": f"2026-04-22T12:34:{number % 60:02d}.000000Z",
        "logger": None,
        **fields,
    }


def query(stream: str = "sys", **given_: Any) -> Query:
    """
    Parse a query as the reader does.
    """
    return Query.parse(stream, given_, now_us=0)


def _lines(text: bytes) -> list[str]:
    assert text.endswith(b"\n")
    return text.decode().split("\n")[:-1]


class Stdout:
    """
    A pipe in place of stdout, with the little that fasten uses of a text stream.
    """

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def fileno(self) -> int:
        """
        Return the writing end.
        """
        return self.writer

    def read_some(self) -> bytes:
        """
        Read what is there.
        """
        return os.read(self.reader, 1 << 20)

    def read_lines(self, number: int) -> list[str]:
        """
        Read until *number* whole lines are there.
        """
        got = b""
        while got.count(b"\n") < number:
            piece = os.read(self.reader, 1 << 20)
            assert piece, f"the pipe ended after {got!r}"
            got += piece
        return _lines(got)

    def read_lines_to(self, last: str) -> list[str]:
        """
        Read up to the line *last*.
        """
        got = b""
        while not got.endswith(f"{last}\n".encode()):
            got += self.read_some()
        return _lines(got)

    def close_reader(self) -> None:
        """
        Go away, as a log shipper that crashed.
        """
        os.close(self.reader)
        self.reader = -1

    def close(self) -> None:
        """
        Close what is open.
        """
        for fd in (self.reader, self.writer):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def stdout() -> Iterator[Stdout]:
    """
    Make a pipe that takes the place of stdout while it is entered.
    """
    pipe = Stdout()
    yield pipe
    pipe.close()


@contextmanager
def in_place_of_stdout(out: Any) -> Iterator[None]:
    """
    Have *out* as stdout, from inside the test: pytest puts its own after fixtures.
    """
    before, sys.stdout = sys.stdout, out
    try:
        yield
    finally:
        sys.stdout = before


@contextmanager
def writing(out: Any, capacity: int = 10_000) -> Iterator[LineWriter]:
    """
    Run a LineWriter on *out*, and close it afterwards.
    """
    writer = LineWriter(capacity)
    with in_place_of_stdout(out):
        try:
            yield writer
        finally:
            writer.close(0.1)


class TestLines:
    """
    What a line looks like.
    """

    JSON = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(codec=None)),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )

    @given(st.dictionaries(st.text(st.characters(codec=None)), JSON, max_size=4))
    def test_is_one_line_of_json_whatever_it_holds(self, row: dict[str, Any]) -> None:
        """
        No value adds a line end, and JSON gives the values back.
        """
        line = json_line(row)

        assert "\n" not in line
        assert row == json.loads(line)

    def test_keeps_the_order_of_keys_and_line_separators(self) -> None:
        """
        Only U+000A ends a line, so U+2028 and its kin stay as they are.
        """
        line = json_line({"shape": "sys", "event": "a\u2028b\u0085c\0d\n"})

        assert '{"shape":"sys","event":"a\u2028b\u0085c\\u0000d\\n"}' == line

    def test_says_so_where_a_value_has_no_form(self) -> None:
        """
        A value that slipped through costs itself, not the line.
        """

        class Hostile:
            def __repr__(self) -> str:
                raise RuntimeError

        cycle: list[Any] = []
        cycle.append(cycle)
        line = json_line({"event": "x", "a": float("nan"), "b": cycle, "c": Hostile()})

        assert {
            "event": "x",
            "a": "unprintable float: ValueError",
            "b": "unprintable list: ValueError",
            "c": "unprintable Hostile: ValueError",
        } == json.loads(line)

    def test_finished_makes_a_draft(self) -> None:
        """
        A draft is a function and its arguments; a row is itself.
        """
        row = sys_row()

        assert (row, row) == (finished((sys_row, 1)), finished(row))


class TestLineWriter:
    """
    The writer of stdout.
    """

    def test_writes_rows_drafts_and_text_in_order(self, stdout: Stdout) -> None:
        """
        Each is a line of its own, in the order of the calls.
        """
        with writing(stdout) as writer:
            writer.put("plain")
            writer.put({"shape": "sys"})
            writer.put((dict, {"shape": "api"}))
            flushed = writer.flush()

        assert ["plain", '{"shape":"sys"}', '{"shape":"api"}'] == stdout.read_lines(3)
        assert (True, 3, 0) == (flushed, writer.written, writer.dropped)

    def test_starts_nothing_before_the_first_line(self) -> None:
        """
        A writer that is never used has no thread.
        """
        before = threading.active_count()
        writer = LineWriter()

        assert (True, True) == (writer.flush(), writer.close())
        assert before == threading.active_count()

    def test_its_thread_is_named_and_ends(self, stdout: Stdout) -> None:
        """
        Operators see whose thread it is; close() ends it.
        """
        with in_place_of_stdout(stdout):
            writer = LineWriter()
            writer.put({"name": "x"})
            writer.put((lambda: {"thread": threading.current_thread().name},))
            writer.flush()
            closed = writer.close()

        assert '{"thread":"fasten-stdout"}' == stdout.read_lines(2)[1]
        assert closed

    @pytest.mark.parametrize("text", ["\udc80 \ud800", "\u2028\u2029\u0085", "ü€😀"])
    def test_writes_utf8_and_escapes_what_has_none(
        self, text: str, stdout: Stdout
    ) -> None:
        """
        Lone surrogates become JSON escapes; everything else is UTF-8.
        """
        with writing(stdout) as writer:
            writer.put({"event": text})
            writer.flush()

        assert {"event": text} == json.loads(stdout.read_lines(1)[0])

    def test_lines_longer_than_a_pipe_takes_stay_whole(self, stdout: Stdout) -> None:
        """
        Threads that print large and small lines never tear one another's.
        """

        def put(number: int) -> None:
            for _ in range(20):
                writer.put({"n": number, "text": "x" * (PIPE_BUF * (number % 3) + 10)})

        with writing(stdout) as writer, ThreadPoolExecutor(4) as pool:
            reader = pool.submit(stdout.read_lines, 60)
            list(pool.map(put, range(3)))
            lines = [json.loads(line) for line in reader.result(20)]

        assert {0: 20, 1: 20, 2: 20} == {
            n: sum(line["n"] == n for line in lines) for n in range(3)
        }

    def test_pieces_are_whole_lines_that_a_pipe_takes_at_once(self) -> None:
        """
        Processes that share a pipe do not tear lines of ordinary length.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, writing(theirs) as writer:
            for number in range(150):
                writer.put({"n": number, "text": "x" * 100})
            writer.flush()
            theirs.shutdown(socket.SHUT_WR)
            # Each packet is what one write() held.
            pieces = list(iter(lambda: ours.recv(1 << 20), b""))

        assert all(p.endswith(b"\n") and len(p) <= PIPE_BUF for p in pieces)
        assert 150 == b"".join(pieces).count(b"\n")

    def test_a_descriptor_that_became_another_file_is_left_alone(
        self, stdout: Stdout, tmp_path: Path
    ) -> None:
        """
        A line that stalled half-way is not finished in whatever file came after.
        """
        os.set_blocking(stdout.writer, False)
        with writing(stdout) as writer:
            writer.put("x" * 1_000_000)
            wait_until(lambda: not os.get_blocking(stdout.writer) and not writer.depth)
            stdout.read_some()
            with (tmp_path / "precious").open("wb") as precious:
                os.dup2(precious.fileno(), stdout.writer)
                writer.flush()

        assert (b"", 1) == ((tmp_path / "precious").read_bytes(), writer.dropped)

    def test_a_stuck_pipe_costs_lines_and_not_the_caller(self, stdout: Stdout) -> None:
        """
        Nobody reads: callers go on, the losses are counted, close is bounded.
        """
        with writing(stdout, 100) as writer:
            for number in range(3000):
                writer.put({"n": number, "text": "x" * 1000})
            closed = writer.close(0.1)
            lost = writer.dropped
            kept = sum(1 for _ in stdout.read_lines(1))

        assert not closed
        assert lost > 2000
        assert lost + kept <= 3000

    def test_a_pipe_that_moves_again_gets_lines_again(self, stdout: Stdout) -> None:
        """
        After a stall the next lines come through.
        """
        with writing(stdout, 100) as writer, ThreadPoolExecutor(1) as pool:
            for _ in range(1000):
                writer.put({"text": "x" * 1000})
            waiting = pool.submit(stdout.read_lines, 1000 - writer.dropped + 1)
            wait_until(lambda: not writer.depth)
            writer.put("late")

            assert "late" == waiting.result(10)[-1]

    def test_a_reader_that_is_gone_is_counted(self, stdout: Stdout) -> None:
        """
        EPIPE raises nothing, in the caller or in the thread.
        """
        stdout.close_reader()
        with writing(stdout) as writer:
            writer.put("a")
            writer.flush()
            writer.put("b")
            flushed = writer.flush()

        assert (True, 0, 2) == (flushed, writer.written, writer.dropped)

    @pytest.mark.parametrize("out", [None, object()])
    def test_no_usable_stdout_is_counted(self, out: object) -> None:
        """
        Under pythonw or with a strange object as stdout, lines are lost in peace.
        """
        with writing(out) as writer:
            writer.put("a")
            writer.flush()

        assert 1 == writer.dropped

    def test_a_closed_stdout_is_counted(self) -> None:
        """
        fileno() of a closed file raises ValueError: counted, too.
        """
        gone = io.StringIO()
        gone.close()
        with writing(gone) as writer:
            writer.put("a")
            writer.flush()

        assert 1 == writer.dropped

    def test_writes_to_a_stdout_without_descriptor(self) -> None:
        """
        A StringIO, or what pytest puts there, is written as text.
        """
        out = io.StringIO()
        with writing(out) as writer:
            writer.put({"event": "\ud800"})
            writer.flush()

        assert '{"event":"\\ud800"}\n' == out.getvalue()

    def test_a_pipe_that_does_not_block_gets_everything(self, stdout: Stdout) -> None:
        """
        EAGAIN is waited out, with no byte twice and none missing.
        """
        os.set_blocking(stdout.writer, False)
        with writing(stdout) as writer, ThreadPoolExecutor(1) as pool:
            for number in range(500):
                writer.put({"n": number, "text": "x" * 1000})
            reader = pool.submit(stdout.read_lines, 500)
            lines = reader.result(20)

        assert list(range(500)) == [json.loads(line)["n"] for line in lines]

    def test_a_busy_loop_waits_a_moment_for_a_healthy_reader(
        self, stdout: Stdout
    ) -> None:
        """
        A caller that is merely faster than the writer does not lose its lines to it.
        """
        with writing(stdout, 500) as writer, ThreadPoolExecutor(1) as pool:
            reader = pool.submit(stdout.read_lines_to, "end")
            for number in range(20_000):
                writer.put((sys_row, number))
            writer.flush(20)
            writer.put("end")
            lines = reader.result(30)

        assert 20_001 == len(lines) + writer.dropped
        # Not none: a loaded machine may not run the writer for 20 ms.
        assert writer.dropped < 2_000

    def test_flush_gives_up_in_time(self, stdout: Stdout) -> None:
        """
        A stuck pipe makes flush() return False.
        """
        with writing(stdout) as writer:
            for _ in range(100):
                writer.put("x" * 4000)

            assert not writer.flush(0.05)

    def test_after_close_lines_are_counted(self, stdout: Stdout) -> None:
        """
        Nothing is written any more, and nothing is lost silently.
        """
        with in_place_of_stdout(stdout):
            writer = LineWriter()
            writer.put("a")
            writer.close()
            writer.put("b")

        assert (["a"], 1) == (stdout.read_lines(1), writer.dropped)

    def test_a_row_that_cannot_be_made_is_counted(self, stdout: Stdout) -> None:
        """
        One bad draft costs itself; the thread lives on.
        """
        with writing(stdout) as writer:
            writer.put((lambda: 1 / 0,))
            writer.put("next")
            writer.flush()

        assert (["next"], 1) == (stdout.read_lines(1), writer.dropped)

    def test_a_signal_handler_may_put_lines(self, stdout: Stdout) -> None:
        """
        Interrupting the same code in the same thread neither hangs nor loses.
        """
        fired = threading.Event()

        def handler(*_: object) -> None:
            writer.put("from the handler")
            fired.set()

        before = signal.signal(signal.SIGALRM, handler)
        try:
            with writing(stdout) as writer, ThreadPoolExecutor(1) as pool:
                reader = pool.submit(stdout.read_lines, 5_001)
                signal.setitimer(signal.ITIMER_REAL, 0.005)
                for number in range(5_000):
                    writer.put(f"{number}")
                wait_until(fired.is_set)
                lines = reader.result(30)
        finally:
            signal.signal(signal.SIGALRM, before)

        assert 1 == lines.count("from the handler")

    def test_a_forked_child_starts_empty(self) -> None:
        """
        The child writes its own lines, and never its parent's.
        """
        done = run_python("""
            import os
            from fasten.streams import LineWriter
            writer = LineWriter()
            for number in range(2000):
                writer.put(f"parent {number}")
            pid = os.fork()
            if pid == 0:
                writer.after_fork_in_child()
                writer.put("child")
                writer.close()
                os._exit(0)
            os.waitpid(pid, 0)
            writer.close()
        """)
        lines = done.stdout.splitlines()

        assert (0, "", 2001) == (done.returncode, done.stderr, len(lines))
        assert 1 == lines.count("child")

    def test_what_waits_at_exit_is_written_by_close(self) -> None:
        """
        Where no thread starts any more, close() writes in the calling thread.
        """
        done = run_python("""
            import atexit, _thread
            from fasten import streams
            def refuse(*args):
                raise RuntimeError("can't start new thread at interpreter shutdown")
            streams.start_new_thread = refuse
            writer = streams.LineWriter()
            atexit.register(writer.close)
            for number in range(100):
                writer.put(f"{number}")
        """)

        assert (0, "") == (done.returncode, done.stderr)
        assert [f"{number}" for number in range(100)] == done.stdout.splitlines()

    def test_a_stuck_pipe_does_not_hold_up_the_exit(self) -> None:
        """
        Closing in the calling thread keeps to its timeout, too.
        """
        done = run_python("""
            import os, sys, time
            from fasten import streams
            def refuse(*args):
                raise RuntimeError("no more threads")
            streams.start_new_thread = refuse
            reader, out = os.pipe()
            sys.stdout = os.fdopen(out, "w")
            writer = streams.LineWriter()
            for number in range(100):
                writer.put("x" * 4000)
            began = time.monotonic()
            writer.close(0.2)
            took = time.monotonic() - began
            os.write(2, f"{took < 2} {writer.dropped > 50}".encode())
            os._exit(0)
        """)

        assert "True True" == done.stderr


class TestRing:
    """
    The memory of one process.
    """

    def test_keeps_the_newest(self) -> None:
        """
        The oldest rows make room.
        """
        ring = Ring(3)
        for number in range(5):
            ring.append(sys_row(number))

        assert (3, ["event-2", "event-3", "event-4"]) == (
            len(ring),
            [row["event"] for row in ring.rows()],
        )

    def test_answers_newest_first_with_a_cursor(self) -> None:
        """
        Page after page gives every row once, whatever is appended meanwhile.
        """
        ring = Ring(100)
        for number in range(10):
            ring.append((sys_row, number))
        seen: list[str] = []
        cursor = None
        while True:
            page = ring.query(query(limit=3, cursor=cursor))
            seen += [row.event for row in page.rows]
            ring.append(sys_row(99))
            cursor = page.next
            if cursor is None:
                break

        assert [f"event-{number}" for number in reversed(range(10))] == seen
        assert "ring" == page.completeness

    def test_answers_oldest_first(self) -> None:
        """
        Order asc follows a cursor towards the newer rows.
        """
        ring = Ring(100)
        for number in range(5):
            ring.append(sys_row(number))
        first = ring.query(query(limit=2, order="asc"))
        second = ring.query(query(limit=9, order="asc", cursor=first.next))

        assert ["event-0", "event-1"] == [row.event for row in first.rows]
        assert ["event-2", "event-3", "event-4"] == [row.event for row in second.rows]

    def test_a_full_last_page_has_no_next(self) -> None:
        """
        A cursor is given only if it leads somewhere.
        """
        ring = Ring(10)
        for number in range(4):
            ring.append(sys_row(number))

        assert ring.query(query(limit=4)).next is None

    def test_filters_offsets_and_counts(self) -> None:
        """
        The total counts what matches, not what is shown.
        """
        ring = Ring(100)
        for number in range(9):
            ring.append(sys_row(number))
        page = ring.query(query(request_id="r-1", offset=1, limit=1, count="true"))

        assert (["event-4"], 3) == ([row.event for row in page.rows], page.total)

    def test_other_requests_drafts_are_not_made(self) -> None:
        """
        One request's rows are found without making everybody's.
        """
        made: list[str | None] = []

        def make(rid: str | None, number: int) -> dict[str, Any]:
            made.append(rid)
            return sys_row(number, request_id=rid or "r-1")

        ring = Ring(100)
        for number, rid in enumerate(("r-0", "r-1", None, "r-2")):
            ring.append((make, rid, number))
        page = ring.query(query(request_id="r-1"))

        assert ["event-2", "event-1"] == [row.event for row in page.rows]
        assert [None, "r-1"] == made

    def test_rows_are_typed_and_keep_their_free_fields(self) -> None:
        """
        What readers get has attributes, and the wire form comes back whole.
        """
        ring = Ring(10)
        ring.append(sys_row(1, user_id="u-1"))
        row = ring.query(query()).rows[0]

        assert isinstance(row, SysRow)
        assert ({"user_id": "u-1"}, sys_row(1, user_id="u-1")) == (
            row.fields,
            row.to_dict(),
        )

    def test_holds_api_and_audit_rows_too(self) -> None:
        """
        The query says what the rows are.
        """
        api, audit = Ring(1), Ring(1)
        api.append({"shape": "api", "method": "GET", "path": "/", "timestamp": "x"})
        audit.append(dict.fromkeys(AUDIT_COLUMNS, "x"))

        assert isinstance(api.query(query("api")).rows[0], ApiRow)
        assert isinstance(audit.query(query("audit")).rows[0], AuditRow)

    def test_refuses_a_cursor_of_the_store(self) -> None:
        """
        A page of the store and a page of a ring are not the same list.
        """
        cursor = "c2V2dC0wMQ"  # sevt-01
        with pytest.raises(InvalidQuery, match="ring of one process"):
            Ring(1).query(query(cursor=cursor))

    def test_forgets_what_is_meant(self) -> None:
        """
        Erasing reaches the memory, drafts included.
        """
        ring = Ring(10)
        for number in range(6):
            ring.append((sys_row, number))
        forgotten = ring.forget(lambda row: row["request_id"] == "r-0")

        assert (2, ["r-1", "r-2", "r-1", "r-2"]) == (
            forgotten,
            [row["request_id"] for row in ring.rows()],
        )

    def test_threads_append_and_read_at_once(self) -> None:
        """
        No append is lost and no read fails while eight threads are at it.
        """
        ring = Ring(100_000)

        def work(thread: int) -> int:
            for number in range(1000):
                ring.append(sys_row(number, thread=thread))
            return len(ring.query(query(limit=1000, order="asc")).rows)

        with ThreadPoolExecutor(8) as pool:
            sizes = list(pool.map(work, range(8)))

        assert (8000, True) == (len(ring.rows()), min(sizes) == 1000)

    def test_ten_thousand_lines_take_about_8_megabytes(self) -> None:
        """
        The README's number, with rows of four fields and nothing shared.
        """

        def made(*given_: Any) -> dict[str, Any]:
            return dict(given_[-1])

        tracemalloc.start()
        ring = Ring(10_000)
        for number in range(12_000):
            fields = {"event": f"event {number}", "request_id": f"{number:032x}"}
            fields |= {key: f"value {number} of {key}" for key in "abcd"}
            ring.append((made, number, "info", None, None, None, fields))
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        assert 4e6 < size < 10e6

    def test_huge_rows_shorten_the_ring(self) -> None:
        """
        A service that logs bodies of 64 KiB does not fill the memory with them.
        """
        ring = Ring(1000)
        for number in range(2000):
            ring.append((sys_row, number))
        plain = len(ring)
        body = {"body": ["x" * 1000] * 64}
        for _ in range(2000):
            ring.append({**sys_row(), **body})

        assert (1000, True) == (plain, len(ring) < 1000 * 4096 / 64_000 + 64)


class TestBoundedQueue:
    """
    Rows on their way to a durable store.
    """

    def test_gives_rows_in_order_with_their_index(self) -> None:
        """
        A batch follows the one before, acknowledged or not.
        """
        waiting = BoundedQueue()
        for number in range(5):
            waiting.put((sys_row, number))
        first, second, third = waiting.take(3), waiting.take(3), waiting.take(3)

        assert first is not None
        assert second is not None
        assert ([1, 2, 3], 3, [4, 5], 5, None) == (
            [index for index, _ in first.rows],
            first.last,
            [index for index, _ in second.rows],
            second.last,
            third,
        )
        assert ("event-0", []) == (first.rows[0][1]["event"], first.missing)

    def test_depth_falls_when_rows_are_acknowledged(self) -> None:
        """
        Rows being delivered still count.
        """
        waiting = BoundedQueue()
        for number in range(3):
            waiting.put(sys_row(number))
        waiting.take(2)
        taken = waiting.depth
        waiting.ack(2)

        assert (3, 1) == (taken, waiting.depth)

    def test_drops_the_newest_and_counts(self) -> None:
        """
        What is refused is known, exactly.
        """
        waiting = BoundedQueue(2)
        answers = [waiting.put(sys_row(number)) for number in range(5)]
        kept = waiting.take(9)

        assert kept is not None
        assert ([True, True, False, False, False], 3) == (answers, waiting.dropped)
        assert ["event-0", "event-1"] == [row["event"] for _, row in kept.rows]

    def test_counts_exactly_from_many_threads(self) -> None:
        """
        Taken and dropped rows add up to those that were put.
        """
        waiting = BoundedQueue(500)

        def work(_: int) -> int:
            return sum(waiting.put(sys_row(number)) for number in range(1000))

        with ThreadPoolExecutor(8) as pool:
            taken = sum(pool.map(work, range(8)))

        assert 8000 == taken + waiting.dropped


class TestStream:
    """
    Where a row goes.
    """

    def test_a_row_goes_everywhere(self, stdout: Stdout) -> None:
        """
        Ring, queue and stdout get the same row.
        """
        with writing(stdout) as writer:
            stream = Stream("sys", Ring(5), lines=writer, queue=BoundedQueue())
            stream.record((sys_row, 7))
            line = json.loads(stdout.read_lines(1)[0])
        assert stream.queue is not None
        batch = stream.queue.take(1)
        assert batch is not None

        assert [sys_row(7)] * 3 == [line, stream.ring.rows()[0], batch.rows[0][1]]

    def test_printing_can_be_left_out(self, stdout: Stdout) -> None:
        """
        Whose own renderer prints needs no second line.
        """
        with writing(stdout) as writer:
            stream = Stream("sys", Ring(5), lines=writer)
            stream.record(sys_row(), is_printed=False)
            flushed = writer.flush()

        assert (True, 0, 1) == (flushed, writer.written, len(stream.ring))

    def test_a_forked_child_knows_nothing(self) -> None:
        """
        A ring answers for its own process only.
        """
        stream = Stream("sys", Ring(5), queue=BoundedQueue())
        stream.record(sys_row())
        stream.after_fork_in_child()
        assert stream.queue is not None

        assert (0, 0) == (len(stream.ring), stream.queue.depth)
