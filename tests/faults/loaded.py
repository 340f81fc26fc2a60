# SPDX-License-Identifier: Apache-2.0
"""
What a fork server loads once, so that the services forked off it begin at once.
"""

from __future__ import annotations

import psycopg  # noqa: F401

import fasten.repository  # noqa: F401
from fasten import codes

codes.registry.ensure()
