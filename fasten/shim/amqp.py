# SPDX-License-Identifier: Apache-2.0
"""
The amqp shim, as users spell it: see `fasten_shims.amqp`.
"""

from fasten_shims.amqp import *
