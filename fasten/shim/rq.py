# SPDX-License-Identifier: Apache-2.0
"""
The rq shim, as users spell it: see `fasten_shims.rq`.
"""

from fasten_shims.rq import *
