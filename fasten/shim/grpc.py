# SPDX-License-Identifier: Apache-2.0
"""
The grpc shim, as users spell it: see `fasten_shims.grpc`.
"""

from fasten_shims.grpc import *
