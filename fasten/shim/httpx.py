# SPDX-License-Identifier: Apache-2.0
"""
The httpx shim, as users spell it: see `fasten_shims.httpx`.
"""

from fasten_shims.httpx import *
