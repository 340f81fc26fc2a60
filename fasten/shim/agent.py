# SPDX-License-Identifier: Apache-2.0
"""
The agent shim, as users spell it: see `fasten_shims.agent`.
"""

from fasten_shims.agent import *
