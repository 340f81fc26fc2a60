# SPDX-License-Identifier: Apache-2.0
"""
The pytest plugin under the name of its package: see `fasten_shims.pytest`.
"""

from fasten_shims.pytest import *
