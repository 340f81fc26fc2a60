# SPDX-License-Identifier: Apache-2.0
"""
The huey shim, as users spell it: see `fasten_shims.huey`.
"""

from fasten_shims.huey import *
