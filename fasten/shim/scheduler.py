# SPDX-License-Identifier: Apache-2.0
"""
The scheduler shim, as users spell it: see `fasten_shims.scheduler`.
"""

from fasten_shims.scheduler import *
