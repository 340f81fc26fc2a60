# SPDX-License-Identifier: Apache-2.0
"""
The Django middlewares, as users spell them: see `fasten_shims.django`.
"""

from fasten_shims.django import *
