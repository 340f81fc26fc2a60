# SPDX-License-Identifier: Apache-2.0
"""
The nats shim, as users spell it: see `fasten_shims.nats`.
"""

from fasten_shims.nats import *
