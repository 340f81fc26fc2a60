# SPDX-License-Identifier: Apache-2.0
"""
The celery shim, as users spell it: see `fasten_shims.celery`.
"""

from fasten_shims.celery import *
