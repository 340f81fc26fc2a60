# SPDX-License-Identifier: Apache-2.0
"""
Assertions over what a test made fasten record.

`capture()` works in any test runner. The fixtures over it are pytest's own to load:
see `fasten_shims.pytest`.
"""

from __future__ import annotations

from fasten.testing.running import Capture, capture
from fasten.testing.trail import Clock, Trail

__all__ = ["Capture", "Clock", "Trail", "capture"]
