# SPDX-License-Identifier: Apache-2.0
"""
The adapter of Django's ORM, as users spell it: see `fasten_shims.django.orm`.
"""

from fasten_shims.django.orm import *
