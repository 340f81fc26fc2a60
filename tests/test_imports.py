# SPDX-License-Identifier: Apache-2.0
"""
What `import fasten` loads, does and leaves: next to nothing.

Who may import whom is in `test_layers`; what it costs, in `benchmarks/`.
"""

from __future__ import annotations

from pkgutil import iter_modules
from typing import Final

import pytest

from tests.outside import ROOT, run_python

HEAVY: Final = ("sqlalchemy", "psycopg", "cattrs", "yaml", "click", "pytest")
FRAMEWORKS: Final = (
    *("aio_pika", "aiokafka", "aiomqtt", "apscheduler", "celery", "confluent_kafka"),
    *("django", "dramatiq", "fastapi", "flask", "grpc", "huey", "mcp", "nats"),
    *("opentelemetry", "paho", "prometheus_client", "rq", "starlette"),
)


def loaded_by(statement: str, names: tuple[str, ...]) -> list[str]:
    """
    Return which of *names* a fresh interpreter has loaded after *statement*.
    """
    done = run_python(
        f"""
        import sys
        {statement}
        print(*(name for name in {names!r} if name in sys.modules))
        """
    )

    assert "" == done.stderr
    return done.stdout.split()


def test_import_loads_nothing_heavy():
    """
    `import fasten` loads no SQLAlchemy, psycopg, cattrs, yaml, click or pytest.
    """

    assert [] == loaded_by("import fasten", HEAVY)


def test_import_loads_no_framework():
    """
    `import fasten` looks for no framework that a shim would serve.
    """

    assert [] == loaded_by("import fasten", FRAMEWORKS)


def test_import_does_nothing():
    """
    Importing prints nothing, starts no thread and sets up no handler.
    """
    done = run_python(
        """
        import atexit, logging, signal, threading
        before = signal.getsignal(signal.SIGTERM), list(logging.root.handlers)
        import fasten
        assert before == (signal.getsignal(signal.SIGTERM), logging.root.handlers)
        assert [threading.main_thread()] == threading.enumerate()
        import structlog
        assert not structlog.is_configured()
        """
    )

    assert (0, "", "") == (done.returncode, done.stdout, done.stderr)


def test_each_public_name_is_there():
    """
    Each name of `fasten.__all__` can be looked up, and the list is sorted.
    """
    done = run_python(
        """
        import fasten
        missing = [name for name in fasten.__all__ if not hasattr(fasten, name)]
        assert not missing, missing
        assert fasten.__all__ == sorted(fasten.__all__), fasten.__all__
        assert set(fasten.__all__) <= set(dir(fasten))
        """
    )

    assert (0, "") == (done.returncode, done.stderr)


def test_the_test_aid_needs_no_pytest():
    """
    `fasten.testing.capture` serves unittest users: only the plugin knows pytest.
    """

    assert [] == loaded_by("import fasten.testing", ("pytest", "_pytest"))


@pytest.mark.parametrize(
    "name",
    [module.name for module in iter_modules([str(ROOT / "fasten_shims")])],
)
def test_a_shim_imports_without_its_framework(name):
    """
    A shim loads no framework until it is used.
    """

    assert [] == loaded_by(f"import fasten_shims.{name}", FRAMEWORKS)
