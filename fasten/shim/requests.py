# SPDX-License-Identifier: Apache-2.0
"""
The requests shim, as users spell it: see `fasten_shims.requests`.
"""

from fasten_shims.requests import *
