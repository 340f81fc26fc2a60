# SPDX-License-Identifier: Apache-2.0
"""
The SQLAlchemy adapter, as users spell it: see `fasten_shims.sqlalchemy`.
"""

from fasten_shims.sqlalchemy import *
