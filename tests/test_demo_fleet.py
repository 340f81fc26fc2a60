# SPDX-License-Identifier: Apache-2.0
"""
`make demo-fleet`: one request's trail through five processes, printed by one command.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.checker import faults, rows_of
from tests.outside import ROOT, require_binary


@pytest.mark.slow
def test_one_trail_crosses_all_of_them(postgres_dsn):
    """
    HTTP, MQTT, Celery, an agent and a cron job: each leaves its row under one id.
    """
    require_binary("mosquitto", "mosquitto")
    require_binary("redis-server", "redis-server")
    done = subprocess.run(
        [sys.executable, "examples/demo_fleet.py"],
        cwd=ROOT,
        env={**os.environ, "FASTEN_AUDIT_DSN": postgres_dsn},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )

    assert 0 == done.returncode, done.stdout + done.stderr
    rid = re.search(r"^\$ fasten trace (.*)$", done.stdout, re.MULTILINE)[1]
    _, _, printed = done.stdout.partition(f"$ fasten trace {rid}\n")
    rows = [row for row in rows_of(postgres_dsn) if row["request_id"] == rid]
    assert {
        ("fleet-http", "http", "ORDER_PLACED", "ann"),
        ("fleet-device", "mqtt", "DEVICE_SETPOINT_UPDATED", "system"),
        ("fleet-worker", "task", "JOB_COMPLETED", "wms"),
        ("fleet-agent", "agent_tool", "TOOL_CALLED", "agent-7"),
        ("fleet-cron", "scheduler", "BATCH_PROCESSED", "system"),
    } == {(row["service_id"], row["method"], row["code"], row["actor"]) for row in rows}
    assert 5 == len(rows)
    for row in rows:
        assert f"{row['service_id']} on {row['source_node_id']}" in printed
        assert row["code"] in printed
    assert [] == faults(rows_of(postgres_dsn))
