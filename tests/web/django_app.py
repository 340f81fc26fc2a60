# SPDX-License-Identifier: Apache-2.0
"""
The service in Django, for WSGI (`wsgi`) and for ASGI (`asgi`), in one file.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import django
from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path

settings.configure(
    ROOT_URLCONF=__name__,
    SECRET_KEY="for tests only",
    ALLOWED_HOSTS=["*"],
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
        "fasten.shim.django",
    ],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": os.environ.get("WEB_DATABASE", ":memory:"),
        }
    },
    MIDDLEWARE=[
        "fasten.shim.django.APILogger",
        "fasten.shim.django.RequestIDMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
    ],
    FASTEN={"SERVICE_ID": "from-settings", "SKIP": ["/health"]},
    LOGGING_CONFIG=None,
)
django.setup()

from tests.web import emit, here  # noqa: E402  (its `init` is the application's)


def work(request: HttpRequest, token: str) -> HttpResponse:
    emit(token)
    return HttpResponse(here())


async def awork(request: HttpRequest, token: str) -> HttpResponse:
    lines = here()
    await asyncio.sleep(0)
    emit(token)
    return HttpResponse(lines + await sync_to_async(here)() + here())


def thread(request: HttpRequest, token: str) -> HttpResponse:
    request.user = _Named(f"actor-{token}")  # type: ignore[assignment]
    emit(token)
    return HttpResponse(here())


def stream(request: HttpRequest, token: str) -> StreamingHttpResponse:
    def pieces() -> Iterator[str]:
        yield here()
        yield here()
        emit(token)

    return StreamingHttpResponse(pieces())


async def astream(request: HttpRequest, token: str) -> StreamingHttpResponse:
    async def pieces() -> AsyncIterator[str]:
        yield here()
        await asyncio.sleep(0)
        yield here()
        emit(token)

    return StreamingHttpResponse(pieces())


def boom(request: HttpRequest, token: str) -> HttpResponse:
    emit(token)
    raise ZeroDivisionError


class _Named:
    is_authenticated = True

    def __init__(self, name: str) -> None:
        self.get_username = lambda: name


IS_ASYNC = bool(os.environ.get("WEB_ASYNC"))
urlpatterns: list[Any] = [
    path("work/<token>", awork if IS_ASYNC else work),
    path("thread/<token>", thread),
    path("stream/<token>", astream if IS_ASYNC else stream),
    path("boom/<token>", boom),
]

asgi = ASGIHandler()
wsgi = WSGIHandler()
