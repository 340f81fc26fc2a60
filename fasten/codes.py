# SPDX-License-Identifier: Apache-2.0
"""
Codes: what a row may be called, and what each name stands for.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["ActorKind", "Method", "Outcome", "RetentionClass", "Severity"]


class Severity(StrEnum):
    """
    How loud a row is.
    """

    DEBUG = "debug"
    INFO = "info"
    WARN = "warn"
    ERROR = "error"
    CRITICAL = "critical"


class RetentionClass(StrEnum):
    """
    How long a row stays: the settings say what each class is worth.
    """

    SHORT = "short"
    MEDIUM = "medium"
    LONG = "long"


class ActorKind(StrEnum):
    """
    What kind of WHO did it; `schedule` is read as `scheduler`.
    """

    USER = "user"
    ADMIN = "admin"
    SERVICE = "service"
    SYSTEM = "system"
    SCHEDULER = "scheduler"
    AGENT = "agent"

    @classmethod
    def _missing_(cls, value: object) -> ActorKind | None:
        return cls.SCHEDULER if value == "schedule" else None


class Method(StrEnum):
    """
    HOW it came about: the transport or face it came through.
    """

    HTTP = "http"
    MQTT = "mqtt"
    CLI = "cli"
    SCHEDULER = "scheduler"
    UI = "ui"
    AGENT_TOOL = "agent_tool"
    SDK = "sdk"
    TASK = "task"
    GRPC = "grpc"
    KAFKA = "kafka"
    NATS = "nats"
    AMQP = "amqp"


class Outcome(StrEnum):
    """
    How it ended, as far as the emitter knows.
    """

    SUCCESS = "success"
    FAILURE = "failure"
    DENIED = "denied"
    UNKNOWN = "unknown"
