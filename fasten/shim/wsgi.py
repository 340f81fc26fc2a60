# SPDX-License-Identifier: Apache-2.0
"""
The WSGI middlewares, as users spell them: see `fasten_shims.wsgi`.
"""

from fasten_shims.wsgi import *
