# SPDX-License-Identifier: Apache-2.0
"""
The otel shim, as users spell it: see `fasten_shims.otel`.
"""

from fasten_shims.otel import *
