# SPDX-License-Identifier: Apache-2.0
"""
The kafka shim, as users spell it: see `fasten_shims.kafka`.
"""

from fasten_shims.kafka import *
