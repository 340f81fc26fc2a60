# SPDX-License-Identifier: Apache-2.0
"""
The reader against its own OpenAPI document, in this process, by ASGI and by WSGI.
"""

from __future__ import annotations

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import (
    negative_data_rejection,
    positive_data_acceptance,
)

import fasten
from fasten import reader
from fasten.reader import ALL_TENANTS, Principal
from fasten.reader.openapi import document
from fasten.reader.parameters import PARAMETERS
from fasten.rows import SHORT_FORMS

TOKEN = "s3cret-token"
OPEN = reader.router("none")
CLOSED = reader.router({TOKEN: Principal("ann", ALL_TENANTS)})
HEADERS = {"Authorization": f"Bearer {TOKEN}"}

by_asgi = schemathesis.openapi.from_asgi("/openapi.json", OPEN)
by_wsgi = schemathesis.openapi.from_wsgi("/openapi.json", OPEN.wsgi)
with_token = schemathesis.openapi.from_wsgi(
    "/openapi.json", CLOSED.wsgi, headers=HEADERS
)

some = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def _rows(sqlite_dsn, tmp_path):
    fasten.init(
        service_id="shop",
        stdout="",
        audit_dsn=sqlite_dsn,
        sys_dsn=f"sqlite:///{tmp_path}/sys.db",
    )
    for number in range(20):
        with fasten.bind(f"req-{number}", tenant_id="acme", actor="ann"):
            fasten.emit("USER_CREATED", f"u-{number}", detail={"n": number})
            fasten.log.info("hello", n=number)
            fasten.record_api(method="GET", path="/x", status=200)
    assert fasten.flush(20)


def validate(case, **options):
    """
    Call, and hold the answer against the document.

    What a cursor may be is between one page and the next; a schema cannot tell.
    """
    unknowable = [positive_data_acceptance] if "cursor" in (case.query or {}) else []
    # Headers that are given stand in the place of a case's own, wrong ones too.
    header = case.meta.components.get(ParameterLocation.HEADER)
    is_mended = "headers" in options and header and header.mode.is_negative
    mended = [negative_data_rejection] if is_mended else []
    case.call_and_validate(excluded_checks=[*unknowable, *mended], **options)


@by_asgi.parametrize()
@some
def test_asgi(case):
    """
    By ASGI: no 500, no answer that the document does not describe.
    """
    validate(case)


@by_wsgi.parametrize()
@some
def test_wsgi(case):
    """
    By WSGI: no 500, no answer that the document does not describe.
    """
    validate(case)


@with_token.parametrize()
@some
def test_behind_a_token(case):
    """
    With a token: the same, and nothing without it.
    """
    validate(case, headers=HEADERS)


def test_describes_each_parameter():
    """
    What a route takes stands in the document, and nothing else; a short form is said
    at its long one.
    """
    paths = document()["paths"]
    said = {r: [p["name"] for p in paths[r]["get"]["parameters"]] for r in paths}
    expected = {
        route: [n for n in names if route != "/audit" or n not in SHORT_FORMS]
        for route, names in PARAMETERS.items()
    }

    assert expected == said
    assert "`tenant`" in json.dumps(paths["/audit"])


def test_says_whether_it_is_open():
    """
    Where everybody gets in the document asks for no credentials.
    """

    assert [] == json.loads(OPEN.handle("GET", "/openapi.json").body)["security"]
    assert [{"bearer": []}] == json.loads(
        CLOSED.handle("GET", "/openapi.json", "", HEADERS).body
    )["security"]


def test_is_found_from_where_it_is_served():
    """
    The server is relative: the document holds wherever the reader is mounted.
    """

    assert [{"url": "."}] == document()["servers"]
