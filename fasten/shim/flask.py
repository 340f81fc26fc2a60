# SPDX-License-Identifier: Apache-2.0
"""
The Flask application's hook, as users spell it: see `fasten_shims.flask`.
"""

from fasten_shims.flask import *
