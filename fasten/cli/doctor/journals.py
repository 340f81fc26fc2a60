# SPDX-License-Identifier: Apache-2.0
"""
The spool: where rows wait for the store. Can it be written, will it last, is it full?
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fasten import spool
from fasten.cli.doctor.finding import Finding, Host, fail, ok, warn
from fasten.delivery import spool_directory
from fasten.settings import Settings

__all__ = ["check_spool"]

_VOLATILE: Final = ("tmpfs", "ramfs", "devtmpfs")
_REMOTE: Final = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "fuse.sshfs",
    "ceph",
    "glusterfs",
)
_LEAST_FREE: Final = 16 * 1024 * 1024
_MOST_NAMED: Final = 5
_LATE_S: Final = 60.0


def check_spool(settings: Settings, host: Host) -> tuple[Path, list[Finding]]:
    """
    Look at the directory of the journals: can it be written, will it last, is it full.
    """
    directory = spool_directory(settings)
    if settings.audit_dsn is None:
        return directory, []
    if not settings.spool:
        message = "spool off: rows that wait for the store are lost with their process"
        return directory, [warn("spool", message, "leave FASTEN_SPOOL on")]
    try:
        findings = list(_spool(settings, host, directory))
    except PermissionError as error:
        message = f"spool {error.filename or directory} cannot be looked at"
        findings = [warn("spool", message, "run this as the service's user")]
    return directory, findings


def _spool(settings: Settings, host: Host, directory: Path) -> Iterator[Finding]:
    there = next(path for path in (directory, *directory.parents) if path.exists())
    fault = _writable(there, host)
    if fault is not None:
        yield warn(
            "spool",
            f"spool {directory}: {fault}; rows wait in memory only",
            "make it writable for the service, or set FASTEN_SPOOL_DIR elsewhere",
        )
        return
    yield from _room(settings, directory, there)
    yield from _lasting(directory, there, host)
    if directory.is_dir() and directory.stat().st_uid != os.geteuid():
        message = f"what waits in spool {directory} is not ours to look at"
        yield warn("spool", message, "run this as the service's user")
        return
    yield from _waiting(settings, directory, host)
    yield from _left(settings, directory)
    yield from _put_aside(directory)


def _writable(there: Path, host: Host) -> str | None:
    """
    Try to write where the journals are; None if that works.
    """
    if not there.is_dir():
        return f"{there} is no directory"
    if host.is_root and there.stat().st_uid != 0:
        return None  # root may always, and what it makes is in the service's way
    probe = there / f".doctor-{os.getpid()}"
    try:
        with probe.open("xb") as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        return error.strerror or type(error).__name__
    finally:
        probe.unlink(missing_ok=True)
    return None


def _room(settings: Settings, directory: Path, there: Path) -> Iterator[Finding]:
    used = sum(
        path.stat(follow_symlinks=False).st_size
        for path in (directory.iterdir() if directory.is_dir() else ())
    )
    status = os.statvfs(there)
    free = status.f_bavail * status.f_frsize
    limit = settings.spool_max_bytes
    told = (
        f"spool {directory}: {_size(used)} of {_size(limit)} used, {_size(free)} free"
    )
    if free < _LEAST_FREE or used >= limit:
        yield fail(
            "spool",
            told,
            "free space there, raise FASTEN_SPOOL_MAX_BYTES, and see what keeps the "
            "store from taking rows",
        )
    elif free < limit - used:
        cure = "less room than FASTEN_SPOOL_MAX_BYTES allows: free some, or lower it"
        yield warn("spool", told, cure)
    elif used > limit * 0.8:
        yield warn("spool", told, "see what keeps the store from taking rows")
    else:
        yield ok("spool", told)


def _size(number: int) -> str:
    if number < 10 * 1024**3:
        return f"{number / 1024**2:.1f} MiB"
    return f"{number / 1024**3:.0f} GiB"


def _lasting(directory: Path, there: Path, host: Host) -> Iterator[Finding]:
    kind = _filesystem(there, host.mounts)
    if kind in _VOLATILE:
        yield warn(
            "spool",
            f"spool {directory} is in memory ({kind}): it outlives the process, not "
            "the machine",
            "set FASTEN_SPOOL_DIR to a directory on a disk",
        )
    elif kind == "overlay":
        yield warn(
            "spool",
            f"spool {directory} is in the container's own files, and goes with it",
            "mount a volume there, or set FASTEN_SPOOL_DIR to one",
        )
    elif kind in _REMOTE:
        yield warn(
            "spool",
            f"spool {directory} is on a network file system ({kind})",
            "set FASTEN_SPOOL_DIR to a local disk",
        )


def _filesystem(path: Path, mounts: Path) -> str:
    """
    Return the kind of the file system that *path* is on, "" if that is not told.
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    best, kind = -1, ""
    resolved = path.resolve()
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[1]))
        # The last of several mounts on one point is the one that is seen.
        if resolved.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[2]
    return kind


def _waiting(settings: Settings, directory: Path, host: Host) -> Iterator[Finding]:
    dsn = settings.audit_dsn
    waiting = spool.backlog(
        directory,
        service=settings.service_id,
        store=dsn.fingerprint if dsn is not None else "",
    )
    if waiting is None:
        return
    age_s = max(0.0, host.clock_ns() / 1e9 - waiting.oldest_us / 1e6)
    told = f"{waiting.rows} rows wait in the spool, the oldest for {_age(age_s)}"
    if age_s < _LATE_S:
        yield ok("backlog", told)
    else:
        cure = "see what keeps the store from taking rows; `fasten drain` delivers them"
        yield warn("backlog", told, cure)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _left(settings: Settings, directory: Path) -> Iterator[Finding]:
    dsn = settings.audit_dsn
    left = spool.survey(
        directory,
        service=settings.service_id,
        store=dsn.fingerprint if dsn is not None else "",
    )
    for leftover in left[:_MOST_NAMED]:
        yield warn("spool", f"{leftover.path}: {leftover.reason}")
    if len(left) > _MOST_NAMED:
        yield warn("spool", f"... and {len(left) - _MOST_NAMED} more such files")


def _put_aside(directory: Path) -> Iterator[Finding]:
    rows = list(spool.quarantined(directory))
    if rows:
        yield fail(
            "quarantine",
            f"{len(rows)} rows in quarantine, the store refused them: "
            f"{rows[-1].reason} ({rows[-1].path})",
            "mend what it names, then run `fasten drain --quarantine`",
        )
