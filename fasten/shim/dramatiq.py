# SPDX-License-Identifier: Apache-2.0
"""
The dramatiq shim, as users spell it: see `fasten_shims.dramatiq`.
"""

from fasten_shims.dramatiq import *
