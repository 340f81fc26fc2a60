# SPDX-License-Identifier: Apache-2.0
"""
The Django application, where Django looks for it: see `fasten_shims.django.apps`.
"""

from fasten_shims.django.apps import *
