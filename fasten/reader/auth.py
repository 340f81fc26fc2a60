# SPDX-License-Identifier: Apache-2.0
"""
Who asks the reader, and what they may see: principals, and how they are known.

Which rows a principal gets is enforced where rows are read, by `Query.scope`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from hmac import compare_digest
from typing import Final

import attrs

from fasten import engine
from fasten.context import is_async
from fasten.engine import Engine
from fasten.rows import ALL_TENANTS, Everyone
from fasten.settings import Settings

__all__ = [
    "STREAMS",
    "Auth",
    "Authenticate",
    "Bearer",
    "Principal",
    "authenticator",
    "bearer",
]

STREAMS: Final = ("audit", "sys", "api")
"""The streams a principal may have in its scopes."""


def _scopes(given: Iterable[str]) -> frozenset[str]:
    if isinstance(given, str):
        raise TypeError(
            f"scopes is the str {given[:80]!r}; give a set, as in {{'audit'}}"
        )
    scopes = frozenset(given)
    if strange := scopes.difference(STREAMS):
        raise ValueError(
            f"scopes holds {min(map(repr, strange))[:80]}; "
            f"a scope is one of {' '.join(STREAMS)}"
        )
    return scopes


@attrs.frozen
class Principal:
    """
    A caller of the reader: a name for the record, a tenant, and the streams it reads.

    *tenant* is a string: that tenant's rows only; None: only rows without a tenant;
    `ALL_TENANTS`: everything, and the only way to it.

    Raises:
        TypeError: *name* or *tenant* is of another type.
        ValueError: one of them is empty, or a scope is no stream.
    """

    name: str = attrs.field()
    tenant: str | Everyone | None = attrs.field()
    scopes: frozenset[str] = attrs.field(default=frozenset(STREAMS), converter=_scopes)

    @name.validator
    def _check_name(self, _: object, name: object) -> None:
        if not isinstance(name, str):
            raise TypeError(
                f"name is a {type(name).__name__}; name the principal by a str"
            )
        if not name:
            raise ValueError("name is empty; reads are recorded under it, so give one")

    @tenant.validator
    def _check_tenant(self, _: object, tenant: object) -> None:
        if tenant is None or tenant is ALL_TENANTS:
            return
        if not isinstance(tenant, str):
            raise TypeError(
                f"tenant is a {type(tenant).__name__}; give the tenant's id as a str, "
                "None for rows without a tenant, or fasten.reader.ALL_TENANTS for "
                "everything"
            )
        if not tenant:
            raise ValueError(
                "tenant is empty; None means rows without a tenant, and only "
                "fasten.reader.ALL_TENANTS means everything"
            )

    @property
    def sees_everything(self) -> bool:
        """
        Tell whether no tenant bounds this principal: it runs the place.
        """
        return self.tenant is ALL_TENANTS


Authenticate = Callable[[Mapping[str, str]], Principal | None]
"""Tells who sent a request from its headers (lower-case names), or None."""

Auth = Authenticate | Mapping[str, Principal] | str | None
"""What `router(auth=...)` takes; the only string is "none"."""


# --- bearer tokens ------------------------------------------------------------------

_TOKEN: Final = re.compile(r"[\x21-\x7e]+")
_CREDENTIALS: Final = re.compile(r"bearer +([\x21-\x7e]+) *", re.IGNORECASE)


class Bearer:
    """
    Knows principals by the token in `Authorization: Bearer ...`; made by `bearer`.

    Only hashes of the tokens are kept.
    """

    def __init__(self, tokens: Mapping[str, Principal]) -> None:
        for token, principal in tokens.items():
            if not isinstance(token, str) or not _TOKEN.fullmatch(token):
                # What was given is not shown: it is a secret, or meant to be one.
                raise ValueError(
                    "a token is empty or holds something else than visible ASCII, "
                    "which no Authorization header carries; use what "
                    "`openssl rand -hex 32` prints"
                )
            if not isinstance(principal, Principal):
                raise TypeError(
                    f"a token leads to a {type(principal).__name__}; "
                    "give fasten.reader.Principal(name, tenant)"
                )
        self._known = tuple((_digest(t), who) for t, who in tokens.items())

    def __call__(self, headers: Mapping[str, str]) -> Principal | None:
        """
        Return whose token the request carries, or None.
        """
        credentials = _CREDENTIALS.fullmatch(headers.get("authorization", ""))
        if credentials is None:
            return None
        given = _digest(credentials[1])
        found = None
        # Every entry is compared: how long that takes tells nothing about them.
        for known, principal in self._known:
            if compare_digest(known, given):
                found = principal
        return found

    def __repr__(self) -> str:
        return f"<Bearer of {len(self._known)} tokens>"


def _digest(token: str) -> bytes:
    return sha256(token.encode()).digest()


def bearer(tokens: Mapping[str, Principal]) -> Bearer:
    """
    Know callers by their bearer tokens, of which only hashes are kept.

    Raises:
        ValueError: a token is one that no header can carry.
        TypeError: a value is no Principal.
    """
    return Bearer(tokens)


# --- what auth= means ---------------------------------------------------------------


class OwnTokens:
    """
    Knows whoever carries a FASTEN_READER_TOKEN of the running engine.

    They see everything, or the service's own tenant where FASTEN_TENANT_ID names it.
    """

    def __init__(self, running: Callable[[], Engine | None]) -> None:
        self._running = running
        self._settings: Settings | None = None
        self._bearer = Bearer({})

    def __call__(self, headers: Mapping[str, str]) -> Principal | None:
        """
        Return the principal of the service's own token, or None.
        """
        return self._current()(headers)

    @property
    def is_closed(self) -> bool:
        """
        Tell whether there is no token at all, so that nobody can get in.
        """
        self._current()
        return self._settings is None or not self._settings.reader_token

    def _current(self) -> Bearer:
        running = self._running()
        settings = None if running is None else running.settings
        if settings is not self._settings:
            self._bearer = _own_bearer(settings)
            self._settings = settings
        return self._bearer


def _own_bearer(settings: Settings | None) -> Bearer:
    if settings is None:
        return Bearer({})
    who = Principal("reader", settings.tenant_id or ALL_TENANTS)
    return Bearer({token.reveal(): who for token in settings.reader_token})


def _anybody(_: Mapping[str, str]) -> Principal:
    return Principal("anonymous", ALL_TENANTS)


def authenticator(
    auth: Auth, running: Callable[[], Engine | None] = engine.current
) -> Authenticate:
    """
    Return what tells who sent a request; None means FASTEN_READER_TOKEN.

    Raises:
        TypeError: *auth* is nothing that could tell.
    """
    if auth is None:
        return OwnTokens(running)
    if isinstance(auth, str):
        if auth == "none":
            return _anybody
        # Not shown: whoever put a string here may have put a token here.
        raise TypeError(
            'auth= is a str other than "none"; for a token write '
            "auth=fasten.reader.bearer({token: Principal(name, tenant)})"
        )
    if isinstance(auth, Mapping):
        return Bearer(auth)
    _check_callable(auth)
    return auth


def _check_callable(auth: object) -> None:
    if not callable(auth):
        raise TypeError(
            f"auth= is a {type(auth).__name__}; give fasten.reader.bearer({{...}}), a "
            'function of the headers that returns a Principal or None, or "none"'
        )
    if is_async(auth):
        raise TypeError(
            "auth= is a coroutine function, but the reader asks it in a thread; "
            "give a plain function"
        )
