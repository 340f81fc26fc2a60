# SPDX-License-Identifier: Apache-2.0
"""
The reader's OpenAPI 3.1 document, made from the tables that the reader itself uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, get_args

from fasten.codes import ActorKind, Method, Outcome, RetentionClass, Severity
from fasten.reader.answers import JSON, NDJSON, PROBLEM
from fasten.reader.parameters import PARAMETERS
from fasten.rows import (
    API_COLUMNS,
    AUDIT_COLUMNS,
    MAX_LIMIT,
    SHORT_FORMS,
    SYS_COLUMNS,
    ReadingOrder,
)

__all__ = ["document"]

Schema = dict[str, Any]

_MAX_INT: Final = 2**63 - 1
_TEXT: Final[Schema] = {
    "type": "string",
    "minLength": 1,
    "maxLength": 4096,
    "pattern": "^[^\\u0000]+$",
}
_TIME: Final[Schema] = {"type": "string", "format": "date-time"}
_ENUMS: Final[Mapping[str, type[Enum]]] = {
    "severity": Severity,
    "outcome": Outcome,
    "actor_kind": ActorKind,
    "method": Method,
    "retention_class": RetentionClass,
}
_WINDOW: Final[Schema] = {
    "type": "string",
    "anyOf": [
        {"pattern": "^([0-9]{1,2}[smhdwy]){1,6}$"},
        {"format": "date"},
        {"format": "date-time"},
    ],
}
_BOUNDS: Final[Mapping[str, tuple[str, Schema]]] = {
    "since": ("From then: a time, or a duration back from now (2h, 7d).", _WINDOW),
    "until": ("Up to then, exclusive: a time, or a duration back from now.", _WINDOW),
    "limit": (
        "How many rows. NDJSON without it has all rows.",
        {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": 100},
    ),
    "offset": (
        "How many rows to skip; `cursor` is the fast way.",
        {"type": "integer", "minimum": 0, "maximum": 2**31 - 1, "default": 0},
    ),
    "cursor": (
        "The `next` of the page before; or with order=stored `end`: what comes now.",
        {"type": "string", "pattern": "^[A-Za-z0-9_-]+$"},
    ),
    "order": (
        "Newest or oldest first; or as a store took them, with a `next` in any case.",
        {"type": "string", "enum": [*get_args(ReadingOrder)], "default": "desc"},
    ),
    "count": (
        "Whether to count what matches; costs a scan.",
        {"type": "string", "enum": ["true", "false"], "default": "false"},
    ),
    "q": ("Text anywhere in a line, in any case.", _TEXT),
}
_TIMES: Final = ("timestamp", "stored_at", "shipped_at")
_INTEGERS: Final = ("monotonic_seq", "status")


def document(*, is_open: bool = False) -> dict[str, Any]:
    """
    Return the document; *is_open* when nobody is asked who they are.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fasten reader",
            "version": "1",
            "description": "Audit rows, log lines and HTTP requests, under one "
            "request id.",
        },
        # Relative to where this document is served: wherever the reader is mounted.
        "servers": [{"url": "."}],
        "security": [] if is_open else [{"bearer": []}],
        "paths": {route: {"get": _operation(route)} for route in PARAMETERS},
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(),
            "responses": {name: _problem(text) for name, text in _PROBLEMS.items()},
        },
    }


# --- routes -------------------------------------------------------------------------

_SUMMARIES: Final = {
    "/audit": "Who changed what, newest first",
    "/sys": "Structured log lines, newest first",
    "/api": "HTTP requests, newest first",
    "/correlate": "The three streams of one request id, oldest first",
    "/health": "Whether rows are being delivered",
    "/openapi.json": "This document",
}
_ANSWERS: Final = {
    "/audit": "AuditPage",
    "/sys": "SysPage",
    "/api": "ApiPage",
    "/correlate": "CorrelatedPage",
    "/health": "Health",
    "/openapi.json": "Document",
}
_PROBLEMS: Final = {
    "400": "A parameter is unknown, repeated or unusable; `parameter` names it",
    "401": "Nobody known sent this request",
    "403": "The principal's scopes do not hold this stream",
    "414": "The query string is too long",
    "503": "The store cannot be read now",
}


def _operation(route: str) -> dict[str, Any]:
    name = route[1:].partition(".")[0]
    return {
        "operationId": name,
        "summary": _SUMMARIES[route],
        "parameters": [
            _parameter(route, given)
            for given in PARAMETERS[route]
            if route != "/audit" or given not in SHORT_FORMS
        ],
        "responses": {
            "200": _answer(route),
            **{s: {"$ref": f"#/components/responses/{s}"} for s in _PROBLEMS},
        },
    }


def _answer(route: str) -> dict[str, Any]:
    name = _ANSWERS[route]
    content: dict[str, Any] = {
        JSON: {"schema": {"$ref": f"#/components/schemas/{name}"}}
    }
    if name.endswith("Page"):
        content[NDJSON] = {"schema": {"type": "string"}}
    return {"description": _SUMMARIES[route], "content": content}


def _problem(text: str) -> dict[str, Any]:
    return {
        "description": text,
        "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }


def _parameter(route: str, name: str) -> dict[str, Any]:
    if name in _BOUNDS:
        description, schema = _BOUNDS[name]
        if route == "/correlate" and name == "limit":
            schema = {**schema, "default": MAX_LIMIT}
    else:
        description, schema = _description(route, name), _filter(route, name)
    return {
        "name": name,
        "in": "query",
        "required": route == "/correlate" and name == "request_id",
        "description": description,
        "schema": schema,
    }


def _description(route: str, name: str) -> str:
    """
    Say what a filter does; its short form is the same parameter, not another one.
    """
    short = [k for k, long in SHORT_FORMS.items() if long == name and route == "/audit"]
    also = f" Also spelled `{short[0]}`." if short else ""
    return f"Rows with this {SHORT_FORMS.get(name, name)}.{also}"


def _filter(route: str, key: str) -> Schema:
    if key in _INTEGERS:
        return {"type": "integer", "minimum": 0, "maximum": _MAX_INT}
    if route == "/audit" and key in _TIMES:
        return _TIME
    if route == "/audit" and key in _ENUMS:
        return _enumerated(key)
    return _TEXT


def _enumerated(key: str) -> Schema:
    return {"type": "string", "enum": [str(member.value) for member in _ENUMS[key]]}


# --- rows ---------------------------------------------------------------------------

_STRING: Final[Schema] = {"type": "string"}
_MAYBE: Final[Schema] = {"type": ["string", "null"]}
_NUMBER: Final[Schema] = {"type": ["number", "null"]}
_INTEGER: Final[Schema] = {"type": ["integer", "null"]}
# An erased field is null: of the six that can be, none is a plain string.
_ALWAYS_TEXT: Final = (
    *("wire_version", "id", "origin_id", "timestamp", "code", "action", "severity"),
    *("outcome", "actor_kind", "service_id", "source_node_id", "category", "domain"),
    *("method", "request_id", "retention_class", "level", "event", "path"),
)
_OTHERS: Final[Mapping[str, Schema]] = {
    "monotonic_seq": _INTEGER,
    "detail": {"type": ["object", "null"]},
    "status": _INTEGER,
    "bytes": _INTEGER,
    "duration_ms": _NUMBER,
    "complete": {"type": "boolean"},
}


def _schemas() -> dict[str, Schema]:
    rows = {
        "Audit": _row(AUDIT_COLUMNS),
        "Sys": _row(SYS_COLUMNS, shape="sys"),
        "Api": _row(API_COLUMNS, shape="api"),
        "Correlated": {
            "type": "object",
            "properties": {"shape": {"enum": ["audit", "sys", "api"]}},
            "required": ["shape", "request_id", "timestamp"],
        },
    }
    return {
        **{f"{name}Row": schema for name, schema in rows.items()},
        **{f"{name}Page": _page(f"{name}Row") for name in rows},
        "Health": {
            "type": "object",
            "properties": {
                "state": {"enum": ["ok", "degraded", "spool_only", "failing"]}
            },
            "required": ["state"],
        },
        "Document": {"type": "object", "required": ["openapi", "paths"]},
        "Problem": _problem_schema(),
    }


def _row(columns: tuple[str, ...], *, shape: str | None = None) -> Schema:
    properties = {name: _column(name) for name in columns}
    if shape is not None:
        properties = {"shape": {"const": shape}, **properties}
    return {"type": "object", "properties": properties, "required": list(properties)}


def _column(name: str) -> Schema:
    if name in _OTHERS:
        return _OTHERS[name]
    return _STRING if name in _ALWAYS_TEXT else _MAYBE


def _page(row: str) -> Schema:
    properties: dict[str, Schema] = {
        "rows": {"type": "array", "items": {"$ref": f"#/components/schemas/{row}"}},
        "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT},
        "offset": {"type": "integer", "minimum": 0},
        "next": {"description": "The cursor of the page behind this one.", **_MAYBE},
        "total": {"description": "Only with count=true.", **_INTEGER},
        "completeness": {"enum": ["store", "ring", "store-degraded"]},
    }
    source = {
        "description": "`<node>/<pid>`: a ring answers for its own process only.",
        **_STRING,
    }
    return {
        "type": "object",
        "properties": {**properties, "source": source},
        "required": list(properties),
        "additionalProperties": False,
    }


def _problem_schema() -> Schema:
    return {
        "type": "object",
        "properties": {
            "type": _STRING,
            "title": _STRING,
            "status": {"type": "integer"},
            "detail": _STRING,
            "parameter": _STRING,
        },
        "required": ["type", "title", "status", "detail"],
    }
