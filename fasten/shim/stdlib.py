# SPDX-License-Identifier: Apache-2.0
"""
The standard library's logging, as users spell it: see `fasten_shims.stdlib`.
"""

from fasten_shims.stdlib import *
