# SPDX-License-Identifier: Apache-2.0
"""
What a check finds, and the machine that it may look at.

The checks themselves are in the modules beside this one.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import attrs

__all__ = ["Finding", "Host", "fail", "ok", "warn"]

Status = Literal["ok", "warn", "fail"]


@attrs.frozen(kw_only=True)
class Finding:
    """
    What one check found: a sentence, and where it is not ok, the cure.
    """

    check: str
    status: Status
    message: str
    cure: str = ""


@attrs.frozen(kw_only=True)
class Host:
    """
    The machine as a check may see it; tests give another.
    """

    environ: Mapping[str, str] = attrs.field(factory=lambda: os.environ, repr=False)
    cwd: Path = attrs.field(factory=Path.cwd)
    hostname: str = attrs.field(factory=socket.gethostname)
    clock_ns: Callable[[], int] = time.time_ns
    mounts: Path = Path("/proc/self/mounts")

    @property
    def is_root(self) -> bool:
        """
        Tell whether files that are made here belong to root.
        """
        return hasattr(os, "geteuid") and os.geteuid() == 0


def ok(check: str, message: str) -> Finding:
    """
    Make the finding that all is well.
    """
    return Finding(check=check, status="ok", message=message)


def warn(check: str, message: str, cure: str = "") -> Finding:
    """
    Make a finding to think about.
    """
    return Finding(check=check, status="warn", message=message, cure=cure)


def fail(check: str, message: str, cure: str = "") -> Finding:
    """
    Make a finding that must be mended.
    """
    return Finding(check=check, status="fail", message=message, cure=cure)
