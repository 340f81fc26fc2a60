# SPDX-License-Identifier: Apache-2.0
"""
Fixtures of the whole suite: a clean environment, the two stores, the world outside.

FASTEN_TEST_POSTGRES_DSN names a server to use instead of a started one (its user
may create databases); FASTEN_TEST_POSTGRES=wheel|system chooses which to start.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
from hypothesis import HealthCheck, configuration
from hypothesis import settings as hypothesis_settings

from tests import brokers, outside, postgres

_DSN: Final = pytest.StashKey[str | None]()
_FOLDER: Final = pytest.StashKey[Path]()
_KIND: Final = pytest.StashKey[str | None]()
_SERVER: Final = pytest.StashKey[postgres.PostgresServer]()

# Two shared cores: how long an example takes says nothing.
hypothesis_settings.register_profile("default", deadline=None)
hypothesis_settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# Tests run in folders of their own: examples that failed stay in the checkout.
configuration.set_hypothesis_home_dir(outside.ROOT / ".hypothesis")


def pytest_configure(config: pytest.Config) -> None:
    """
    Read what the environment says of Postgres, before each test is cleaned of it.
    """
    hypothesis_settings.load_profile("ci" if outside.is_ci() else "default")
    config.stash[_DSN] = os.environ.get("FASTEN_TEST_POSTGRES_DSN") or None
    config.stash[_KIND] = os.environ.get("FASTEN_TEST_POSTGRES") or None
    given = getattr(config, "workerinput", {}).get("postgres_folder")
    config.stash[_FOLDER] = Path(given) if given else postgres.open_folder()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """
    Tell an xdist worker which folder the workers' shared server has.
    """
    node.workerinput["postgres_folder"] = str(node.config.stash[_FOLDER])


def pytest_collection_finish() -> None:
    """
    Have the garbage collector leave alone what stays to the end: thousands of tests.

    Of two million objects it would look at each again and again, for seconds.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """
    End the shared server, from the process that outlives all workers.
    """
    if _FOLDER in config.stash and not hasattr(config, "workerinput"):
        postgres.close_folder(config.stash[_FOLDER], config.stash.get(_SERVER, None))


# --- around every test ------------------------------------------------------------


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("FASTEN_")]:
        monkeypatch.delenv(name)
    # Spools without a directory of their own go below the user's state: not here.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _no_engine_is_left() -> Iterator[None]:
    yield
    _end_default_engine()


def _end_default_engine() -> None:
    # Looked up, not imported: a test of one module shall load that module only.
    engine = sys.modules.get("fasten.engine")
    if engine is not None and (left := engine.install(None)) is not None:
        left.close()


# --- stores -----------------------------------------------------------------------


@pytest.fixture
def sqlite_dsn(tmp_path: Path) -> str:
    """
    Return the DSN of a SQLite file that does not exist yet.
    """
    return f"sqlite:///{tmp_path / 'audit.db'}"


@pytest.fixture(scope="session")
def postgres_admin_dsn(request: pytest.FixtureRequest) -> str:
    """
    Return a DSN of the session's server whose user may create databases.
    """
    config = request.config
    if dsn := config.stash[_DSN]:
        # `?table=` is fasten's own, and libpq refuses it.
        parts = urlsplit(dsn)
        options = [pair for pair in parse_qsl(parts.query) if pair[0] != "table"]
        return parts._replace(query=urlencode(options)).geturl()
    try:
        server = postgres.shared_server(config.stash[_FOLDER], config.stash[_KIND])
    except postgres.PostgresMissing as missing:
        outside.unavailable(str(missing))
    config.stash[_SERVER] = server  # kept: it owns the process that it started
    return server.dsn()


@pytest.fixture(scope="session")
def _databases(postgres_admin_dsn: str) -> Iterator[postgres.Databases]:
    known = postgres.Databases(postgres_admin_dsn, f"fasten_test_{os.getpid()}")
    yield known
    known.end()


@pytest.fixture
def postgres_dsn(_databases: postgres.Databases) -> Iterator[str]:
    """
    Return the DSN of an empty Postgres database of this test's own.
    """
    with _databases.lend() as dsn:
        yield dsn
        _end_default_engine()  # which would try to reach the store that goes now


@pytest.fixture(params=["sqlite", "postgres"])
def store_dsn(request: pytest.FixtureRequest) -> str:
    """
    Return the DSN of an empty store of this test's own, one kind after the other.
    """
    dsn: str = request.getfixturevalue(f"{request.param}_dsn")
    return dsn


@pytest.fixture
def private_postgres(
    request: pytest.FixtureRequest,
) -> Iterator[postgres.PostgresServer]:
    """
    Return a running server of this test's own, to stop, kill, pause and restart.
    """
    config = request.config
    template = config.stash[_FOLDER] / "template"
    try:
        with postgres.private_server(config.stash[_KIND], template=template) as server:
            yield server
    except postgres.PostgresMissing as missing:
        outside.unavailable(str(missing))


# --- the world outside ------------------------------------------------------------


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    """
    Return `outside.wait_until`: poll a predicate until it is true.
    """
    return outside.wait_until


@pytest.fixture(scope="session")
def run_python() -> Callable[..., Any]:
    """
    Return `outside.run_python`: run a snippet in a fresh interpreter.
    """
    return outside.run_python


@pytest.fixture(scope="session")
def require_binary() -> Callable[[str, str], str]:
    """
    Return `outside.require_binary`: find a program, or install it where we may.
    """
    return outside.require_binary


@pytest.fixture(scope="session")
def rabbitmq_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """
    Return the URL of a RabbitMQ, which takes seconds to start: once a session.

    Its tests stay on one xdist worker by `xdist_group("rabbitmq")`.
    """
    with brokers.rabbitmq(tmp_path_factory.mktemp("rabbitmq")) as port:
        yield f"amqp://guest:guest@127.0.0.1:{port}/"
