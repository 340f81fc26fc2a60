# SPDX-License-Identifier: Apache-2.0
"""
What tests need of the world outside their process: wait for it, run it, install it.

The Postgres server is in `postgres`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NoReturn, TypeVar

import pytest

__all__ = ["ROOT", "is_ci", "require_binary", "run_python", "unavailable", "wait_until"]

ROOT: Final = Path(__file__).resolve().parent.parent
"""The checkout."""

T = TypeVar("T")


def wait_until(predicate: Callable[[], T], timeout: float = 5.0) -> T:
    """
    Poll *predicate* until it is true, and return what it returned.

    For what cannot notify: another process, a file, a server. Threads of this
    process set an Event instead.

    Raises:
        TimeoutError: still false after *timeout* seconds.
    """
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still {value!r} after {timeout:g} s")
        pause.wait(0.005)
    return value


def run_python(
    code: str,
    *args: str,
    env: Mapping[str, str] | None = None,
    timeout: float = 30.0,
    cwd: Path | str | None = None,
) -> subprocess.CompletedProcess[str]:
    """
    Run the snippet *code* in a fresh interpreter of this kind, with fasten importable.

    *env* is added to the environment. Warnings are errors there, too. The caller
    looks at `returncode`, `stdout` and `stderr`.

    Raises:
        subprocess.TimeoutExpired: it was killed after *timeout* seconds.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *args],
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        cwd=cwd,
    )


def require_binary(name: str, package: str) -> str:
    """
    Return the path of the program *name*; as root, install Debian's *package* for it.

    Elsewhere the test is skipped, and with CI=true it fails.
    """
    path = _which(name)
    if path is None and os.geteuid() == 0 and shutil.which("apt-get"):
        path = _install(name, package)
    return path or unavailable(f"{name} is missing: install the package {package}")


def unavailable(reason: str) -> NoReturn:
    """
    Skip the running test for *reason*, or fail it where CI=true: CI has everything.
    """
    if is_ci():
        pytest.fail(f"{reason} (skipped elsewhere, but CI=true)", pytrace=False)
    pytest.skip(reason)


def is_ci() -> bool:
    """
    Tell whether a missing server is a failure.
    """
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


def _which(name: str) -> str | None:
    # Debian puts daemons where a user's PATH does not look.
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


def _install(name: str, package: str) -> str | None:
    lock = Path(tempfile.gettempdir()) / "fasten-apt.lock"
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # the other xdist worker may be at it
        if _which(name) is None:
            subprocess.run(
                [ROOT / ".ci" / "packages", f"{name}={package}"],
                stdin=subprocess.DEVNULL,
                check=False,
                timeout=600,
            )
    return _which(name)
