# SPDX-License-Identifier: Apache-2.0
"""
`python -m benchmarks`: measure everything, print the table, write results.json.

Arguments go to pytest: `-k store`, or `-m "not slow"` for the ten quick minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

NO_HURRY = ("-o", "faulthandler_timeout=0")
"""A row that takes minutes does not hang."""


def main() -> int:
    """
    Run the benchmarks one after the other: side by side they would measure each other.
    """
    here = Path(__file__).parent
    given = sys.argv[1:] or ["-m", "not slow"]
    return int(pytest.main([str(here), "-q", "-p", "no:xdist", *NO_HURRY, *given]))


if __name__ == "__main__":
    raise SystemExit(main())
