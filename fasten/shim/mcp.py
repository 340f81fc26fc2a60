# SPDX-License-Identifier: Apache-2.0
"""
The mcp shim, as users spell it: see `fasten_shims.mcp`.
"""

from fasten_shims.mcp import *
