# SPDX-License-Identifier: Apache-2.0
"""
The subprocess shim, as users spell it: see `fasten_shims.subprocess`.
"""

from fasten_shims.subprocess import *
