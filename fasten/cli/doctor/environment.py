# SPDX-License-Identifier: Apache-2.0
"""
The environment and the codes files, read as a service would.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from fasten import codes
from fasten.cli.doctor.finding import Finding, Host, fail, ok, warn
from fasten.cli.filters import load_codes
from fasten.errors import InvalidCodes, SettingsError
from fasten.settings import Settings

__all__ = ["check_codes", "check_environment"]

_VARIABLE: Final = re.compile(r"FASTEN_[A-Z_]+")
_CONTAINER: Final = re.compile(r"[0-9a-f]{12}")


def check_environment(host: Host) -> tuple[Settings | None, list[Finding]]:
    """
    Read the settings; those that are unusable are left out, so that the rest is seen.
    """
    try:
        settings: Settings | None = _parsed(host, host.environ)
        faults: list[str] = []
    except SettingsError as error:
        first, *others = str(error).split("\n  ")
        faults = others or [first]
        settings = _salvaged(host, faults)
    findings = [fail("environment", fault) for fault in faults]
    if settings is not None:
        findings = [*_names(host, settings, faults), *findings]
        findings += [warn("environment", warning) for warning in settings.warnings]
    return settings, findings


def _parsed(host: Host, environ: Mapping[str, str], **given: object) -> Settings:
    return Settings.from_env(environ, given, hostname=host.hostname, cwd=host.cwd)


def _salvaged(host: Host, faults: list[str]) -> Settings | None:
    wrong = {match[0] for fault in faults if (match := _VARIABLE.match(fault))}
    kept = {name: value for name, value in host.environ.items() if name not in wrong}
    given = {"service_id": "unnamed"} if "FASTEN_SERVICE_ID" in wrong else {}
    try:
        return _parsed(host, kept, **given)
    except SettingsError:
        return None


def _names(host: Host, settings: Settings, faults: list[str]) -> Iterator[Finding]:
    if not any(fault.startswith("FASTEN_SERVICE_ID") for fault in faults):
        yield ok("environment", f"FASTEN_SERVICE_ID={settings.service_id}")
    told = f"FASTEN_NODE_ID={settings.node_id}"
    if "FASTEN_NODE_ID" not in host.environ and _CONTAINER.fullmatch(settings.node_id):
        yield warn(
            "environment",
            f"{told} is the name of a container",
            "set FASTEN_NODE_ID to a name that outlives it: each new one begins "
            "chains of its own",
        )
    elif not any(fault.startswith("FASTEN_NODE_ID") for fault in faults):
        yield ok("environment", told)


def check_codes() -> list[Finding]:
    """
    Read the codes files as a service would.
    """
    try:
        load_codes()
    except InvalidCodes as error:
        first, *others = str(error).split("\n  ")
        return [fail("codes", fault) for fault in others or [first]]
    return [ok("codes", f"{len(codes.registry.entries)} codes registered")]
