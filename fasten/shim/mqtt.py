# SPDX-License-Identifier: Apache-2.0
"""
The mqtt shim, as users spell it: see `fasten_shims.mqtt`.
"""

from fasten_shims.mqtt import *
