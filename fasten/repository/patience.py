# SPDX-License-Identifier: Apache-2.0
"""
A Postgres connection that gives up when its server has not answered in time.

The server's own timeouts do not help where the server itself is stopped.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg

__all__ = ["PATIENCE_S", "BoundedConnection"]

PATIENCE_S: Final = 3.0
"""How long anything but a query may take: a look whether the server is there."""


class BoundedConnection(psycopg.Connection[Any]):
    """
    A connection that waits *patience_s* seconds for an answer.
    """

    patience_s: float = PATIENCE_S

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """
        Wait *seconds* for each answer inside a with-block.
        """
        self.patience_s = seconds
        try:
            yield
        finally:
            self.patience_s = PATIENCE_S

    def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        """
        Do what the base class does, within the connection's patience.

        Raises:
            psycopg.OperationalError: it is at an end; the connection is closed.
        """
        return super().wait(self._bounded(gen), *args, **options)

    def _bounded(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        until = time.monotonic() + self.patience_s
        given = None
        while True:
            try:
                wanted = gen.send(given)
            except StopIteration as stop:
                return stop.value
            # Nothing is given where nothing arrived: ten times a second.
            given = yield wanted
            if not given and time.monotonic() > until:
                self.close()
                raise psycopg.OperationalError("the server has not answered in time")
