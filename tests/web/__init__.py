# SPDX-License-Identifier: Apache-2.0
"""
The same small service in four frameworks, for servers to run.

    /work/TOKEN    says under which ids its parts ran, and emits a row for TOKEN
    /thread/TOKEN  the same from a thread, with the caller named by `identify`
    /stream/TOKEN  says it piece by piece, and emits when the last piece is made
    /boom/TOKEN    emits a row, then raises

Each part that asks for the id stands on a line of its own in the answer.
"""

from __future__ import annotations

import fasten

__all__ = ["emit", "here"]


def here() -> str:
    """
    Return a line with the id under which this code runs.
    """
    return f"{fasten.current_request_id()}\n"


def emit(token: str) -> None:
    """
    Emit the row of *token*, and a log line.
    """
    fasten.emit(code="USER_CREATED", target=token)
    fasten.log.info("user_created", token=token)
