# SPDX-License-Identifier: Apache-2.0
"""
The ASGI middlewares, as users spell them: see `fasten_shims.http`.
"""

from fasten_shims.http import *
