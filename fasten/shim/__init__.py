# SPDX-License-Identifier: Apache-2.0
"""
The shims, each loaded when it is named; and what a shim of one's own is made of.

A custom transport: `extract` the id from the message, open a `scope`, call on; when
sending, `inject`. A Carrier is the message's headers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fasten.context import Carrier, extract, inject, scope

if TYPE_CHECKING:
    from fasten.shim import (
        agent,
        amqp,
        celery,
        django,
        dramatiq,
        flask,
        grpc,
        http,
        httpx,
        huey,
        kafka,
        mcp,
        mqtt,
        nats,
        otel,
        prometheus,
        requests,
        rq,
        scheduler,
        sqlalchemy,
        stdlib,
        subprocess,
        wsgi,
    )

__all__ = [
    "Carrier",
    "agent",
    "amqp",
    "celery",
    "django",
    "dramatiq",
    "extract",
    "flask",
    "grpc",
    "http",
    "httpx",
    "huey",
    "inject",
    "kafka",
    "mcp",
    "mqtt",
    "nats",
    "otel",
    "prometheus",
    "requests",
    "rq",
    "scheduler",
    "scope",
    "sqlalchemy",
    "stdlib",
    "subprocess",
    "wsgi",
]


def __getattr__(name: str) -> Any:
    if name.startswith("_") or find_spec(f"fasten.shim.{name}") is None:
        raise AttributeError(f"module 'fasten.shim' has no attribute {name!r}")
    return import_module(f"fasten.shim.{name}")
