# SPDX-License-Identifier: Apache-2.0
"""
`sweep`, `hold` and `erase`: what operators do to a store, and what they are told.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fasten
from fasten import engine
from fasten.settings import Settings
from tests.cli_runs import fasten_on, in_terminal, run
from tests.stores import Kept

DAY_NS = 86_400 * 10**9


@pytest.fixture
def kept(store_dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    """
    Give a store with rows of 40 days ago and of now, and an environment for it.
    """
    monkeypatch.setenv("FASTEN_AUDIT_DSN", store_dsn)
    monkeypatch.setenv("FASTEN_SERVICE_ID", "api-server")
    monkeypatch.setenv("FASTEN_NODE_ID", "host-01")
    monkeypatch.setenv("FASTEN_SPOOL_DIR", str(Path.cwd() / "spool"))
    then = time.time_ns() - 40 * DAY_NS
    with _unswept(store_dsn, lambda: then) as past:
        for number in range(3):
            past.emit("TRIGGER_FIRED", f"t-{number}", actor="ann")
        past.emit("USER_CREATED", "u-1", actor="ann", detail={"mail": "ann@x"})
    with _unswept(store_dsn, time.time_ns) as present:
        present.emit("TRIGGER_FIRED", "now", actor="ann")
    made = Kept(store_dsn)
    yield made
    made.close()


@contextmanager
def _unswept(dsn: str, clock_ns: Callable[[], int]) -> Iterator[engine.Engine]:
    """
    Run an engine by *clock_ns* that sweeps nothing.
    """
    settings = Settings.from_env(
        {},
        {
            "service_id": "api-server",
            "node_id": "host-01",
            "stdout": "",
            "audit_dsn": dsn,
            "spool_dir": "spool",
        },
        hostname="h",
        cwd=Path.cwd(),
    )
    engine.prepare(settings)
    made = engine.Engine(settings, clock_ns=clock_ns)
    made.delivery.upkeep._sweeping.chore.due = float("inf")
    yield made
    assert made.flush(10)
    made.close()


class TestSweep:
    def test_expired_rows_go(self, kept):
        """
        It tells how many, by class.
        """
        done = run("sweep")

        assert 0 == done.exit_code
        assert "deleted 3 audit rows: 3 short\n" == done.stdout
        assert 0 == run("verify").exit_code

    def test_a_dry_run_counts(self, kept):
        """
        And changes nothing.
        """
        done = run("sweep", "--dry-run", "-o", "json")
        told = json.loads(done.stdout)

        assert (3, {"short": 3}, True) == (
            told["deleted"],
            told["by_class"],
            told["dry_run"],
        )
        assert 5 == len(kept.columns("id"))

    def test_shorter_periods_hold_now_if_asked(self, kept):
        """
        Otherwise they wait for the grace.
        """
        run("sweep")
        env = {"FASTEN_AUDIT_RETENTION_CLASS_LONG": "10"}
        waiting = run("sweep", **env).stdout
        forced = run("sweep", "--now", **env).stdout

        assert "deleted 0" in waiting
        assert "deleted 1 audit row: 1 long" in forced

    def test_overrides_of_the_page(self, kept):
        """
        `long=7y,medium=1y` names some classes; the others keep theirs.
        """
        env = {"FASTEN_AUDIT_RETENTION_OVERRIDE": "short=60d,medium=1y"}

        assert "deleted 0" in run("sweep", **env).stdout

    def test_other_streams_expire_too(self, kept, tmp_path):
        """
        Durable sys and api rows, each by its own days.
        """
        sys_dsn = f"sqlite:///{tmp_path}/sys.db"
        env = {"FASTEN_SYS_DSN": sys_dsn, "FASTEN_SYS_RETENTION_DAYS": "1"}
        with fasten_on(None, sys_dsn=sys_dsn):
            fasten.log.info("hello")
        log = Kept(sys_dsn)
        log.sql("UPDATE sys_log SET timestamp = '2020-01-01T00:00:00.000000Z'")
        dry = run("sweep", "--dry-run", **env).stdout
        done = run("sweep", **env).stdout

        assert "would delete 1 sys row" in dry
        assert "deleted 1 sys row" in done
        assert [] == log.sql("SELECT event FROM sys_log")
        record = json.loads(kept.details("RETENTION_SWEEP_RAN")[-1])
        assert {"sys": 1} == record["streams"]

    def test_a_service_is_asked_for(self, kept):
        """
        A sweep is of one service's chains.
        """
        done = run("sweep", FASTEN_SERVICE_ID="")

        assert 2 == done.exit_code
        assert "FASTEN_SERVICE_ID" in done.stderr

    def test_a_typo_makes_no_store(self, tmp_path):
        """
        There is nothing to sweep where there is no store.
        """
        done = run(
            "sweep", "--dsn", f"sqlite:///{tmp_path}/none.db", FASTEN_SERVICE_ID="s"
        )

        assert 3 == done.exit_code
        assert [] == list(tmp_path.glob("none.db*"))


class TestHold:
    def test_add_list_remove(self, kept):
        """
        A hold is listed as long as it is in force, and keeps its rows.
        """
        added = run("hold", "add", "--target", "t-0", "--reason", "case 7")
        id_ = added.stdout.strip()
        listed = run("hold", "list").stdout
        held = run("sweep").stdout
        removed = run("hold", "remove", id_)
        swept = run("sweep").stdout

        assert f"{id_}  " in listed
        assert 'target=t-0  by=root  reason="case 7"' in listed
        assert "deleted 0 audit rows" in held
        assert "erased 2 expired rows behind it" in held
        assert 0 == removed.exit_code
        assert "deleted 3 audit rows" in swept
        assert "[]\n" == run("hold", "list", "-o", "json").stdout
        assert 0 == run("verify").exit_code

    def test_what_cannot_be(self, kept):
        """
        Several fields, none, or a hold that is not there.
        """
        reason = ("--reason", "r")
        both = run("hold", "add", "--target", "t", "--code", "C", *reason)

        assert 2 == both.exit_code
        assert 2 == run("hold", "add", *reason).exit_code
        assert 1 == run("hold", "remove", "none").exit_code

    def test_it_is_on_record(self, kept):
        """
        Who put it, and who lifted it, stands in the log.
        """
        id_ = run("hold", "add", "--actor", "ann", "--reason", "r").stdout.strip()
        run("hold", "remove", id_)
        told = [json.loads(d)["hold"] for d in kept.details("RETENTION_POLICY_CHANGED")]
        kinds = kept.columns(
            "actor_kind", "method", where="code = 'RETENTION_POLICY_CHANGED'"
        )

        assert ["added", "removed"] == told
        assert [("admin", "cli")] * 2 == kinds


class TestErase:
    def test_a_subject_is_gone(self, kept):
        """
        From its rows; a second run finds nothing, and both end well.
        """
        words = ("erase", "--actor", "ann", "--reason", "asked for", "--yes")
        first, second = run(*words), run(*words)

        assert (0, 0) == (first.exit_code, second.exit_code)
        assert "erased 5 rows: 1 long, 4 short" in first.stdout
        assert "erased 0 rows" in second.stdout
        assert [None] * 5 == kept.columns("actor", where="domain <> 'fasten'")
        assert [None] * 5 == kept.columns("detail", where="domain <> 'fasten'")
        assert None not in kept.columns("target")
        assert "backups" in first.stderr
        assert 0 == run("verify").exit_code

    @pytest.mark.parametrize(("key", "code", "left"), [("n", 1, 5), ("y", 0, 0)])
    def test_somebody_is_asked(self, kept, key, code, left):
        """
        On a terminal, where --yes is not given; elsewhere it is wrong usage.
        """
        words = ("erase", "--actor", "ann", "--reason", "asked for")
        nobody = run(*words)
        done, seen = in_terminal(*words, keys=("for good? [y/N]: ", f"{key}\n"))

        assert 2 == nobody.exit_code
        assert code == done
        assert "Erase actor 'ann', for good?" in seen
        assert left == kept.columns("actor").count("ann")

    def test_a_dry_run_counts(self, kept):
        """
        And asks nobody.
        """
        words = ("--actor", "ann", "--reason", "r", "--dry-run", "-o", "json")
        told = json.loads(run("erase", *words).stdout)

        assert (5, True) == (told["rows"], told["dry_run"])
        assert "ann" in kept.columns("actor")

    def test_fields(self, kept):
        """
        Those given; with --id all six, and nothing that the seal needs whole.
        """
        id_ = kept.columns("id", where="code = 'USER_CREATED'")[0]
        words = ("--id", id_, "--reason", "r", "--yes")
        first = run("erase", *words, "--fields", "detail, reason")
        row = kept.columns("actor", "detail", where=f"id = '{id_}'")[0]
        wrong = run("erase", *words, "--fields", "code")
        run("erase", *words)
        after = kept.columns("actor", "target", where=f"id = '{id_}'")[0]

        assert (0, ("ann", None)) == (first.exit_code, row)
        assert 2 == wrong.exit_code
        assert (None, None) == after

    @pytest.mark.parametrize(
        "words",
        [
            ("--reason", "r", "--yes"),
            ("--actor", "a", "--target", "b", "--reason", "r", "--yes"),
            ("--actor", "ann", "--yes"),
            ("--actor", "ann", "--reason", "r"),
        ],
    )
    def test_what_cannot_be(self, kept, words):
        """
        No subject, two, no reason, or nobody to ask.
        """
        assert 2 == run("erase", *words).exit_code
        assert 5 == kept.columns("actor").count("ann")

    def test_a_hold_outweighs(self, kept):
        """
        Who is held is refused; rows held for another reason are left and named.
        """
        id_ = kept.columns("id", where="target = 't-1'")[0]
        run("hold", "add", "--target", "t-1", "--reason", "case 7")
        refused = run("erase", "--target", "t-1", "--reason", "r", "--yes")
        partly = run("erase", "--actor", "ann", "--reason", "r", "--yes")

        assert (1, 1) == (refused.exit_code, partly.exit_code)
        assert "legal hold" in refused.stderr
        assert f"under a legal hold, left as it is: {id_}" in partly.stdout
        assert "erased 4 rows" in partly.stdout

    def test_a_ledger_is_applied_again(self, kept, monkeypatch):
        """
        After a restore the file alone says who was erased.
        """
        monkeypatch.setattr("fasten.forgetting.FOLLOW_S", 0.3)
        backup = kept.dump()
        words = ("--actor", "ann", "--reason", "r", "--yes")
        run("erase", *words, "--ledger", "erased.ndjson")
        kept.load(backup)
        again = run("erase", "--ledger", "erased.ndjson", "--yes")

        assert "erased 5 rows" in again.stdout
        assert "ann" not in kept.columns("actor")
        assert "ann" not in Path("erased.ndjson").read_text()
        assert 0 == run("verify").exit_code

    def test_a_file_that_is_no_ledger(self, kept):
        """
        It is refused, whole.
        """
        Path("x").write_text("{}\n")

        assert 1 == run("erase", "--ledger", "x", "--yes").exit_code
        assert 2 == run("erase", "--ledger", "none", "--yes").exit_code

    def test_a_writer_elsewhere_is_waited_for_and_named(self, kept, monkeypatch):
        """
        It may hold a file on its host: the exit code is 1.
        """
        monkeypatch.setattr("fasten.forgetting.FOLLOW_S", 0.3)
        row = tuple(kept.maker.pending(actor="bob"))
        kept.repository.append(kept.writer("elsewhere"), [(1, row)], 1)
        done = run("erase", "--actor", "ann", "--reason", "r", "--yes")

        assert 1 == done.exit_code
        assert "writer writer o of shop on elsewhere" in done.stdout
