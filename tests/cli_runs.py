# SPDX-License-Identifier: Apache-2.0
"""
How the tests of the CLI run it: in process, as a program, and on a terminal.
"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from click.testing import CliRunner, Result

import fasten
from fasten.cli import main
from tests.outside import ROOT

__all__ = [
    "Followed",
    "emit_sample",
    "fasten_on",
    "following",
    "in_terminal",
    "mounted",
    "program",
    "run",
    "run_program",
    "served",
    "write",
]


def run(*words: str, **environ: str) -> Result:
    """
    Run `fasten WORDS` in this process, *environ* on top of the environment.
    """
    # Entered without a terminal and without a width that somebody's shell has set.
    runner = CliRunner(env={"COLUMNS": None, **environ})
    return runner.invoke(main, words, prog_name="fasten")


def run_program(
    *words: str, env: Mapping[str, str] | None = None, encoding: str | None = None
) -> subprocess.CompletedProcess[str]:
    """
    Run `fasten WORDS` as a program of its own.
    """
    return subprocess.run(
        program(*words),
        env=_environ(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        encoding=encoding,
        timeout=60,
    )


def program(*words: str, first: str = "") -> list[str]:
    """
    Return the command line of `fasten WORDS`; *first* is done before that.
    """
    code = f"{first}from fasten.cli import main; main(prog_name='fasten')"
    return [sys.executable, "-W", "error", "-c", code, *words]


def _environ(env: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}


def in_terminal(
    *words: str, columns: int = 80, keys: tuple[str, str] = ("", ""), **env: str
) -> tuple[int, str]:
    """
    Run `fasten WORDS` on a terminal; return its exit code and what is seen there.

    Of *keys* the second is typed once the first is seen; its stderr is the terminal's,
    too, where keys are typed.
    """
    ours, theirs = pty.openpty()
    expected, typed = (text.encode() for text in keys)
    try:
        given = {"COLUMNS": str(columns), "TERM": "xterm-256color", **env}
        process = subprocess.Popen(
            program(*words, first=_OWN_TERMINAL),
            env=_environ(given),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs if typed else None,
            start_new_session=True,
        )
    finally:
        os.close(theirs)
    seen = b""
    # EIO is how Linux says that nobody holds the other end any more.
    while chunk := _read(ours):
        seen += chunk
        if typed and expected in seen:
            os.write(ours, typed)
            typed = b""
    os.close(ours)
    return process.wait(60), seen.decode().replace("\r\n", "\n")


# So that Ctrl-C is a signal, as where a shell was started; who runs the tests in the
# background of a script may have them ignore it.
_OWN_TERMINAL = (
    "import fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.default_int_handler); "
)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65_536)
    except OSError:
        return b""


class Followed:
    """
    A running `fasten tail -f`: lines as they come.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.said: list[str] = []
        self._news = threading.Condition()
        streams = ((process.stdout, self.lines), (process.stderr, self.said))
        self._readers = [
            threading.Thread(target=self._read, args=given, daemon=True)
            for given in streams
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, into: list[str]) -> None:
        with stream:
            for line in stream:
                with self._news:
                    into.append(line.rstrip("\n"))
                    self._news.notify_all()

    def end(self) -> None:
        """
        Kill the program, if it still runs, and read what is left.
        """
        self.process.kill()
        self.process.wait(10)
        for reader in self._readers:
            reader.join(10)

    def wait_for(self, number: int, timeout: float = 20.0) -> list[str]:
        """
        Return the lines once there are *number* of them.
        """
        with self._news:
            done = self._news.wait_for(lambda: len(self.lines) >= number, timeout)

        assert done, f"{self.lines} after {timeout:g} s, and on stderr {self.said}"
        return list(self.lines)

    def wait_until_said(self, text: str, timeout: float = 20.0) -> None:
        """
        Wait until *text* is in a line on stderr.
        """
        with self._news:
            done = self._news.wait_for(
                lambda: any(text in line for line in self.said), timeout
            )

        assert done, f"{text!r} is not in {self.said}"


@contextmanager
def following(*words: str, env: Mapping[str, str] | None = None) -> Iterator[Followed]:
    """
    Run `fasten tail -f WORDS` as long as the block lasts.
    """
    process = subprocess.Popen(
        program("tail", "-f", *words),
        env=_environ(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    followed = Followed(process)
    try:
        yield followed
    finally:
        followed.end()


@contextmanager
def fasten_on(dsn: str | None, **settings: Any) -> Iterator[fasten.Engine]:
    """
    Run fasten quietly on *dsn*, and have every row stored at the end of the block.
    """
    given = {
        "service_id": "api-server",
        "node_id": "host-01",
        "stdout": "",
        "audit_dsn": dsn,
    }
    running = fasten.init(**given | settings)
    yield running
    assert fasten.flush(20)
    fasten.close()


def emit_sample() -> list[str]:
    """
    Emit the rows of the page under its request id; return their ids.
    """
    with fasten.bind("a1b2c3d4"):
        return [
            fasten.emit("USER_CREATED", "u-42", actor="admin", detail={"plan": "pro"}),
            fasten.emit("ORDER_PLACED", "ord-9001", actor="u-42"),
            fasten.emit("PAYMENT_PROCESSED", "ord-9001", outcome="failure"),
        ]


def write(path: Path, text: str) -> Path:
    """
    Write *text* to *path*; return it.
    """
    path.write_text(text, encoding="utf-8")
    return path


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_words: object) -> None:
        """
        Say nothing: the test's own output is what counts.
        """


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


@contextmanager
def served(application: Any, port: int = 0) -> Iterator[str]:
    """
    Serve a WSGI application on loopback; yield its address.
    """
    server = make_server(
        "127.0.0.1", port, application, server_class=_Server, handler_class=_Quiet
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def mounted(application: Any, mount: str = "/api/v1/logs") -> Any:
    """
    Mount a WSGI application; elsewhere is 404.
    """

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        if not path.startswith(f"{mount}/"):
            start_response("404 Not Found", [("Content-Type", "text/html")])
            return [b"<h1>nothing here</h1>"]
        environ["SCRIPT_NAME"], environ["PATH_INFO"] = mount, path[len(mount) :]
        return application(environ, start_response)

    return answer
