# SPDX-License-Identifier: Apache-2.0
"""
The Django application: `INSTALLED_APPS += ["fasten.shim.django"]` calls `init()`.

Django imports this module; nothing else does, so it may import Django.
"""

from __future__ import annotations

import os

from django.apps import AppConfig

import fasten
from fasten_shims.django import options

__all__ = ["FastenConfig"]

_OF_MIDDLEWARES = ("actor", "client", "skip", "tenant")


class FastenConfig(AppConfig):  # type: ignore[misc]  # Django ships no types
    """
    Initialise fasten from `settings.FASTEN`, where the environment says nothing.
    """

    name = "fasten.shim.django"
    label = "fasten"
    verbose_name = "fasten"

    def ready(self) -> None:
        """
        Call `fasten.init()`.

        Raises:
            SettingsError: settings and environment together are not usable.
        """
        given = {
            name: value
            for name, value in options().items()
            if name not in _OF_MIDDLEWARES and not _is_in_environment(name)
        }
        fasten.init(**given)


def _is_in_environment(name: str) -> bool:
    variable = f"FASTEN_{name.upper()}"
    return variable in os.environ or f"{variable}_FILE" in os.environ
