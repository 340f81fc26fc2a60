# SPDX-License-Identifier: Apache-2.0
"""
A Django project for tests in this process, which can hold only one.

A test overrides what it needs otherwise: `override_settings(ROOT_URLCONF=__name__)`.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

__all__ = ["configure"]


@cache
def configure() -> None:
    """
    Set Django up with users and sessions in a SQLite file of this process.
    """
    import django
    from django.conf import settings
    from django.core.management import call_command

    folder = tempfile.mkdtemp(prefix="fasten-django-")
    settings.configure(
        SECRET_KEY="for tests only",
        ALLOWED_HOSTS=["*"],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(Path(folder) / "users.db"),
            }
        },
        INSTALLED_APPS=[
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "django.contrib.sessions",
        ],
        PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
        USE_TZ=True,
        LOGGING_CONFIG=None,
    )
    django.setup()
    call_command("migrate", verbosity=0)
