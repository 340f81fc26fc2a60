# SPDX-License-Identifier: Apache-2.0
"""
Workers of task queues: each a program of its own, over a Redis of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from tests import brokers
from tests.outside import ROOT

__all__ = ["worker"]


@contextmanager
def worker(tmp_path, monkeypatch, dsn: str, tasks: str, *command: str) -> Iterator:
    """
    Run `python -m COMMAND` on the module *tasks*; yield this process's copy of it.

    `{port}` in the command is the port of Redis.
    """
    with brokers.redis(tmp_path) as port:
        monkeypatch.setenv("TEST_REDIS_PORT", str(port))
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {
            **os.environ,
            "FASTEN_SERVICE_ID": "worker",
            "FASTEN_AUDIT_DSN": dsn,
            "FASTEN_STDOUT": "",
            "PYTHONPATH": path,
            "TEST_WORKER": "1",
        }
        given = [part.format(port=port) for part in command]
        with subprocess.Popen([sys.executable, "-m", *given], env=env) as running:
            try:
                yield _fresh(tasks)
            finally:
                running.send_signal(signal.SIGINT)
                running.wait(30)


def _fresh(name: str) -> ModuleType:
    # It reads the port when it is imported.
    sys.modules.pop(name, None)
    return import_module(name)
