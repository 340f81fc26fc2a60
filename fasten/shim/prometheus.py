# SPDX-License-Identifier: Apache-2.0
"""
The prometheus shim, as users spell it: see `fasten_shims.prometheus`.
"""

from fasten_shims.prometheus import *
