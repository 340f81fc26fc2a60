# SPDX-License-Identifier: Apache-2.0
"""
No row of another tenant, on any route, by any parameter: asked for in every way.

The rows of each tenant carry its name in every field that may hold one, and all of them
share one request id, so that each question has a wrong answer.
"""

from __future__ import annotations

import json
from itertools import product
from urllib.parse import urlencode

import pytest

import fasten
from fasten import reader
from fasten.reader import ALL_TENANTS, Principal
from fasten.reader.parameters import PARAMETERS

TENANTS = ("acme", "umbrella", "acm", "ALL_TENANTS", "None", None)
SHARED = "req-shared"
NUMBER = 2
ROUTES = ("/audit", "/sys", "/api", "/correlate")
PRINCIPALS = {
    **{f"t-{n}": Principal(f"p-{n}", tenant) for n, tenant in enumerate(TENANTS)},
    "nobody": Principal("nobody", "tenant-without-rows"),
}
OPERATOR = "operator"


@pytest.fixture(params=["ring", "sqlite", "postgres"])
def opened(request, tmp_path):
    """
    Return a router over rows of all tenants, in rings and in both stores.
    """
    dsns = {}
    if request.param != "ring":
        for stream in ("audit", "sys", "api"):
            base = (
                f"sqlite:///{tmp_path}/rows.db"
                if request.param == "sqlite"
                else request.getfixturevalue("postgres_dsn")
            )
            sign = "&" if "?" in base else "?"
            dsns[f"{stream}_dsn"] = f"{base}{sign}table={stream}_log"
    fasten.init(service_id="shop", node_id="n-1", stdout="", **dsns)
    for number, tenant in product(range(NUMBER), TENANTS):
        record(number, tenant)
    assert fasten.flush(20)
    everybody = {**PRINCIPALS, OPERATOR: Principal("op", ALL_TENANTS)}
    yield reader.router(auth=everybody)
    fasten.close()


def record(number, tenant):
    """
    Record one row of each stream whose every value is the tenant's own.
    """
    own = f"<{tenant!r}>"
    with fasten.bind(SHARED, actor=f"actor{own}", tenant_id=tenant, client=own):
        fasten.emit(
            "USER_CREATED",
            f"target{own}",
            reason=f"reason{own}",
            on_behalf_of=f"behalf{own}",
            detail={"own": own, "number": number},
        )
        fasten.log.info(f"event{own}", own=own)
        fasten.record_api(
            method="GET",
            path=f"/path{own}",
            route=f"/route{own}",
            status=200 + TENANTS.index(tenant),
        )


def ask(router, token, route, headers=(), /, **parameters):
    """
    Send a request; return status and body.
    """
    given = {"Authorization": f"Bearer {token}", **dict(headers)}
    response = router.handle("GET", route, urlencode(parameters), given)
    body = response.body
    return response.status, (body if isinstance(body, bytes) else b"".join(body))


def rows_of(body, headers):
    """
    Return the rows of an answer in either form.
    """
    if headers:
        return [json.loads(line) for line in body.splitlines()]
    return json.loads(body)["rows"]


def questions(router):
    """
    Yield every route with every parameter, by the values of everybody's rows.
    """
    for route in ROUTES:
        fixed = {"request_id": SHARED} if route == "/correlate" else {}
        _, body = ask(router, OPERATOR, route, limit=1000, **fixed)
        rows = json.loads(body)["rows"]
        yield route, fixed
        for name in PARAMETERS[route]:
            for value in sorted(values(name, rows)):
                yield route, {**fixed, name: value}


LONG = {
    "tenant": "tenant_id",
    "node": "source_node_id",
    "service": "service_id",
    "seq": "monotonic_seq",
}
BOUNDS = {
    "since": {"1h"},
    "until": {"9999-01-01"},
    "limit": {"1", "1000"},
    "offset": {"0", "1"},
    "order": {"asc", "desc"},
    "count": {"true"},
    "q": {"event", "<'acme'>", "%", "_"},
}


def values(name, rows):
    """
    Return what to ask for under *name*.
    """
    if name in BOUNDS:
        return BOUNDS[name]
    key = LONG.get(name, name)
    return {str(row[key]) for row in rows if row.get(key) is not None}


def foreign(rows, tenant):
    """
    Return the other tenants whose name stands in *rows*; reads quote what was asked.
    """
    text = json.dumps([row for row in rows if row.get("code") != "AUDIT_READ"])
    return [other for other in TENANTS if other != tenant and f"<{other!r}>" in text]


class TestNobodySeesAnother:
    @pytest.mark.parametrize("headers", [{}, {"Accept": "application/x-ndjson"}])
    def test_by_any_parameter(self, opened, headers):
        """
        Each route, each parameter, each value there is: only rows of one's own.
        """
        asked = 0
        for route, parameters in questions(opened):
            for token, principal in PRINCIPALS.items():
                status, body = ask(opened, token, route, headers, **parameters)
                rows = rows_of(body, headers)
                asked += 1

                assert 200 == status
                assert {row["tenant_id"] for row in rows} <= {principal.tenant}
                assert [] == foreign(rows, principal.tenant), (route, parameters)

        assert asked > 1000

    @pytest.mark.parametrize("route", ROUTES)
    def test_and_everybody_sees_the_own(self, opened, route):
        """
        What is one's own is all there: the others' rows are not hidden by hiding all.
        """
        number = NUMBER * (3 if route == "/correlate" else 1)
        found = {
            principal.tenant: len(
                json.loads(ask(opened, token, route, request_id=SHARED, limit=1000)[1])[
                    "rows"
                ]
            )
            for token, principal in PRINCIPALS.items()
        }

        assert dict.fromkeys(TENANTS, number) | {"tenant-without-rows": 0} == found

    def test_the_operator_sees_all(self, opened):
        """
        ALL_TENANTS is everything, rows without a tenant included.
        """
        _, body = ask(opened, OPERATOR, "/audit", request_id=SHARED, limit=1000)
        tenants = {row["tenant_id"] for row in json.loads(body)["rows"]}

        assert set(TENANTS) == tenants

    @pytest.mark.parametrize("name", ["tenant", "tenant_id"])
    def test_a_filter_widens_nothing(self, opened, name):
        """
        Asking for another tenant's rows finds none.
        """
        _, body = ask(opened, "t-0", "/audit", **{name: "umbrella"}, count="true")

        assert ([], 0) == (json.loads(body)["rows"], json.loads(body)["total"])

    def test_counts_count_ones_own(self, opened):
        """
        `total` tells nothing of how many rows others have.
        """
        for token, principal in PRINCIPALS.items():
            for parameters in ({}, {"code": "USER_CREATED"}, {"since": "1h"}):
                _, body = ask(
                    opened,
                    token,
                    "/audit",
                    request_id=SHARED,
                    count="true",
                    **parameters,
                )
                own = NUMBER if principal.tenant in TENANTS else 0

                assert own == json.loads(body)["total"]

    @pytest.mark.parametrize("route", ROUTES)
    def test_cursors_of_others_lead_to_ones_own(self, opened, route):
        """
        A cursor is a place, not a permission.
        """
        cursors = []
        for token in (*PRINCIPALS, OPERATOR):
            for limit in (1, 2, 5):
                _, body = ask(opened, token, route, request_id=SHARED, limit=limit)
                cursors.append(json.loads(body)["next"])
        for cursor, (token, principal) in product(
            filter(None, cursors), PRINCIPALS.items()
        ):
            _, body = ask(opened, token, route, request_id=SHARED, cursor=cursor)
            tenants = {row["tenant_id"] for row in json.loads(body)["rows"]}

            assert tenants <= {principal.tenant}

    @pytest.mark.parametrize("route", ROUTES)
    def test_a_cursor_names_a_row_of_ones_own(self, opened, route):
        """
        Following `next` meets each row of one's own once, and ends.
        """
        for token, principal in PRINCIPALS.items():
            found, cursor = [], {}
            while cursor is not None:
                _, body = ask(
                    opened, token, route, request_id=SHARED, limit=2, **cursor
                )
                page = json.loads(body)
                found += page["rows"]
                cursor = {"cursor": page["next"]} if page["next"] else None
            own = NUMBER if principal.tenant in TENANTS else 0

            assert own * (3 if route == "/correlate" else 1) == len(found)
            assert {row["tenant_id"] for row in found} <= {principal.tenant}

    def test_what_is_stored_next_is_ones_own(self, opened):
        """
        Read as they were stored, in pages of others' rows: each own row, once.
        """
        if json.loads(ask(opened, OPERATOR, "/audit")[1])["completeness"] == "ring":
            status, body = ask(opened, OPERATOR, "/audit", order="stored")

            assert (400, "order") == (status, json.loads(body)["parameter"])
            return
        for token, principal in PRINCIPALS.items():
            found, cursor, page = [], None, {"next": {}}
            while page["next"] != cursor:
                cursor = page["next"]
                given = {"order": "stored", "limit": 1, "code": "USER_CREATED"}
                given |= {"cursor": cursor} if cursor else {}
                page = json.loads(ask(opened, token, "/audit", **given)[1])
                found += page["rows"]
            own = NUMBER if principal.tenant in TENANTS else 0

            assert own == len({row["id"] for row in found}) == len(found)
            assert {row["tenant_id"] for row in found} <= {principal.tenant}

    def test_reads_are_recorded_with_the_tenant(self, opened):
        """
        A tenant sees that it read; what an operator asked is no tenant's.
        """
        ask(opened, "t-0", "/audit", target="target<'acme'>")
        ask(opened, OPERATOR, "/audit", target="target<'acme'>")
        fasten.flush(20)
        _, body = ask(opened, OPERATOR, "/audit", code="AUDIT_READ", limit=1000)
        reads = {(r["actor"], r["tenant_id"]) for r in json.loads(body)["rows"]}

        assert {("p-0", "acme"), ("op", None)} == reads
