# SPDX-License-Identifier: Apache-2.0
"""
The current request id for a child process, in its environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Final

from fasten.context import Context, current_request_id, scope

__all__ = ["VARIABLE", "env", "inherited"]

VARIABLE: Final = "FASTEN_REQUEST_ID"
"""The environment variable that carries the id; not a setting."""


def env(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """
    Return *base*, or this process's environment, with the current request id in it.
    """
    made = dict(os.environ if base is None else base)
    made.pop(VARIABLE, None)
    rid = current_request_id()
    return made if rid is None else {**made, VARIABLE: rid}


def inherited() -> AbstractContextManager[Context]:
    """
    Open, in the child, the scope whose id its parent passed on; else a new one.
    """
    return scope(os.environ.get(VARIABLE), method="cli")
