# SPDX-License-Identifier: Apache-2.0
"""
The rq shim, as users spell it: see `fasten_shims.rq`.
"""

from typing import TYPE_CHECKING, Any

import fasten_shims.rq

if TYPE_CHECKING:
    from fasten_shims.rq import *


def __getattr__(name: str) -> Any:
    # Its classes are made of RQ's own, when they are first asked for.
    return getattr(fasten_shims.rq, name)
