# SPDX-License-Identifier: Apache-2.0
"""
Django with an audit trail, a whole project in one file.

    FASTEN_AUDIT_DSN=sqlite:///./audit.db gunicorn --threads 4 django_app:wsgi
    FASTEN_AUDIT_DSN=sqlite:///./audit.db uvicorn django_app:asgi
"""

from __future__ import annotations

import os

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

import fasten


def actor(request: HttpRequest) -> str | None:
    """
    Name the caller, for want of users: by default it is `request.user`.
    """
    return request.headers.get("X-User")


settings.configure(
    ROOT_URLCONF=__name__,
    SECRET_KEY=os.environ.get("SECRET_KEY", "only for trying it out"),
    ALLOWED_HOSTS=["*"],
    INSTALLED_APPS=["fasten.shim.django"],  # calls fasten.init()
    MIDDLEWARE=[
        "fasten.shim.django.RequestIDMiddleware",  # mints or honours X-Request-ID
        "fasten.shim.django.APILogger",  # one api row per request
    ],
    FASTEN={  # FASTEN_* variables of the environment win
        "SERVICE_ID": "shop",
        "SKIP": ["/health"],
        "ACTOR": actor,
    },
)
django.setup()


def create(_: HttpRequest, name: str) -> JsonResponse:
    """
    Create a user; audit row, log line and api row share one request id.
    """
    fasten.emit(code="USER_CREATED", target=name, detail={"plan": "free"})
    fasten.log.info("user_created", user=name)
    return JsonResponse({"created": name, "request_id": fasten.current_request_id()})


def health(_: HttpRequest) -> HttpResponse:
    """
    Tell whether rows are being delivered.
    """
    return HttpResponse(fasten.health()["state"])


urlpatterns = [
    path("users/<name>", create),
    path("health", health),
    path("api/v1/logs/<path:path>", fasten.reader.django_view),  # FASTEN_READER_TOKEN
]

asgi = get_asgi_application()
wsgi = get_wsgi_application()
