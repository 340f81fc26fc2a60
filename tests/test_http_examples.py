# SPDX-License-Identifier: Apache-2.0
"""
The recipes of `examples/`, each run by the server that its first lines name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import httpx
import pytest

from tests.outside import ROOT, run_python, wait_until
from tests.servers import gunicorn, pick, uvicorn_process

RECIPES: Final[dict[str, Callable[..., AbstractContextManager[str]]]] = {
    "fastapi_app:app": uvicorn_process,
    "starlette_app:app": uvicorn_process,
    "flask_app:app": lambda app, env: gunicorn(app, "--threads", "4", env=env),
    "django_app:wsgi": lambda app, env: gunicorn(app, "--threads", "4", env=env),
    "django_app:asgi": uvicorn_process,
}


@pytest.mark.parametrize("app", sorted({app.split(":")[0] for app in RECIPES}))
def test_the_readme_shows_lines_of_it(app):
    """
    Every line of the README's recipe is one of the file that is run.
    """
    example = (ROOT / "examples" / f"{app}.py").read_text().splitlines()
    readme = (ROOT / "README.md").read_text()
    _, _, rest = readme.partition(
        f"<!-- not run: examples/{app}.py is -->\n```python\n"
    )
    recipe = rest.partition("```")[0].splitlines()

    assert recipe
    assert [] == [line for line in recipe if line not in example]


@pytest.mark.parametrize("app", RECIPES)
def test_the_recipe_works(app, tmp_path):
    """
    Ids, the caller, both streams, the reader behind its token, and a healthy drain.
    """
    env = {
        "FASTEN_SERVICE_ID": "shop",
        "FASTEN_AUDIT_DSN": f"sqlite:///{tmp_path}/audit.db",
        "FASTEN_READER_TOKEN": "letmein",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}",
    }
    headers = {"X-Request-ID": "abc-123", "X-User": "ann"}
    token = {"Authorization": "Bearer letmein"}
    with RECIPES[app](app, env) as url, httpx.Client(base_url=url) as client:
        answer = client.post("/users/u-42", headers=headers)
        health = client.get("/health")
        refused = client.get("/api/v1/logs/api").status_code
        found = client.get("/api/v1/logs/api?request_id=abc-123", headers=token)
        audit = wait_until(lambda: _audit(client, token))

    assert (200, "abc-123") == (answer.status_code, answer.headers["x-request-id"])
    assert {"created": "u-42", "request_id": "abc-123"} == answer.json()
    assert ("ok", 401) == (health.text.strip('"'), refused)
    assert [("POST", "/users/u-42", 200, "ann")] == pick(
        found.json()["rows"], "method", "path", "status", "actor"
    )
    assert [("USER_CREATED", "u-42", "ann", "http", {"plan": "free"})] == pick(
        audit, "code", "target", "actor", "method", "detail"
    )


def _audit(client: httpx.Client, token: dict[str, str]) -> list[dict[str, Any]]:
    query = {"request_id": "abc-123", "code": "USER_CREATED"}
    answer = client.get("/api/v1/logs/audit", params=query, headers=token)
    rows: list[dict[str, Any]] = answer.json()["rows"]
    return rows


@pytest.mark.parametrize("app", sorted({app.split(":")[0] for app in RECIPES}))
def test_the_route_is_in_the_row(app, tmp_path):
    """
    The api line on stdout names the route as its framework spells it.
    """
    done = run_python(
        f"""
        import sys
        sys.path.insert(0, {str(ROOT / "examples")!r})
        import {app} as recipe, fasten
        service = getattr(recipe, "wsgi", None) or recipe.app
        if {app!r} in ("fastapi_app", "starlette_app"):
            from starlette.testclient import TestClient
            TestClient(service).post("/users/u-42")
        else:
            from werkzeug.test import Client
            Client(service).post("/users/u-42").close()
        fasten.close()
        """,
        env={"FASTEN_SERVICE_ID": "shop", "FASTEN_STDOUT": "api"},
        cwd=tmp_path,
    )
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]
    spelled = {"flask_app": "/users/<name>", "django_app": "/users/<name>"}

    assert "" == done.stderr
    assert spelled.get(app, "/users/{name}") == row["route"]
