# SPDX-License-Identifier: Apache-2.0
"""
Sorting more than memory holds: runs in a temporary file, merged when they are read.

What comes in order already, as the rows of an export do, is one run.
"""

from __future__ import annotations

import heapq
import pickle
from collections.abc import Callable, Iterator
from tempfile import TemporaryFile
from typing import IO, Any, Final

__all__ = ["Spill"]

HELD: Final = 20_000
"""How many items are held in memory; with more, they go to the file."""

PIECE: Final = 100
"""How many items of a run are read at a time."""

Item = tuple[Any, ...]


class Spill:
    """
    Tuples of plain values that are added in any order, and read by *key* once.
    """

    def __init__(self, key: Callable[[Item], Any]) -> None:
        self._key = key
        self._held: list[Item] = []
        self._runs: list[list[int]] = []
        self._last: Any = None
        self._file: IO[bytes] | None = None

    def add(self, item: Item) -> None:
        """
        Take an item.
        """
        self._held.append(item)
        if len(self._held) >= HELD:
            self._write()

    def __iter__(self) -> Iterator[Item]:
        self._held.sort(key=self._key)
        runs = [self._read(run) for run in self._runs]
        yield from heapq.merge(*runs, self._held, key=self._key)
        self.close()

    def close(self) -> None:
        """
        Let go of everything.
        """
        self._held, self._runs = [], []
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        """
        Write what is held: behind the last run if it goes on from there.
        """
        self._held.sort(key=self._key)
        if not self._runs or self._key(self._held[0]) < self._last:
            self._runs.append([])
        self._last = self._key(self._held[-1])
        file = self._file = self._file or TemporaryFile()  # noqa: SIM115  (see close)
        for start in range(0, len(self._held), PIECE):
            self._runs[-1].append(file.seek(0, 2))
            pickle.dump(self._held[start : start + PIECE], file)
        self._held = []

    def _read(self, run: list[int]) -> Iterator[Item]:
        for offset in run:
            if self._file is not None:
                self._file.seek(offset)
                yield from pickle.load(self._file)  # noqa: S301  (we wrote it)
