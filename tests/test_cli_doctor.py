# SPDX-License-Identifier: Apache-2.0
"""
`doctor` proves that all is well, and finds each thing that is not, with its cure.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sqlite3
import tempfile
import textwrap
import time
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

import fasten
from fasten import spool
from fasten.cli.doctor.finding import Host
from fasten.cli.doctor.journals import check_spool
from fasten.cli.doctor.stores import check_clock, check_store
from fasten.engine import Engine
from fasten.repository import Database
from fasten.rows import UlidMinter
from fasten.settings import Settings, parse_dsn
from tests.checker import faults, rows_of
from tests.cli_runs import emit_sample, fasten_on, in_terminal, run, run_program, write
from tests.outside import run_python, unavailable

SERVICE = {"FASTEN_SERVICE_ID": "api-server", "FASTEN_NODE_ID": "host-01"}


def doctor(dsn: str | None = None, *words: str, **environ: str):
    """
    Run doctor for a service on *dsn*.
    """
    given = SERVICE | ({} if dsn is None else {"FASTEN_AUDIT_DSN": dsn})
    return run("doctor", *words, **{**given, **environ})


def findings(done) -> dict[str, list[dict]]:
    """
    Return what `--json` says, by check.
    """
    assert done.stdout, getattr(done, "exception", None) or done.stderr
    told: dict[str, list[dict]] = {}
    for finding in json.loads(done.stdout)["checks"]:
        told.setdefault(finding["check"], []).append(finding)
    return told


def status(done, check: str) -> set[str]:
    """
    Return the states of one check.
    """
    return {finding["status"] for finding in findings(done)[check]}


class TestHealthy:
    def test_the_page_s_lines(self, tmp_path):
        """
        On a fresh service doctor prints the page's lines, in the page's order.
        """
        write(tmp_path / "shop.py", WIRED)
        done = doctor("sqlite:///./logs.db", "--app", "shop:app")
        lines = done.stdout.splitlines()

        assert 0 == done.exit_code, done.stdout
        assert [
            "✓ FASTEN_SERVICE_ID=api-server",
            "✓ FASTEN_NODE_ID=host-01",
            "✓ audit store reachable (sqlite:///./logs.db)",
            "✓ http shim wired",
        ] == lines[:4]
        assert re.fullmatch(r"✓ emit roundtrip OK \(id=evt-[0-9A-Z]{26}\)", lines[4])
        assert f"✓ audit_log in {tmp_path}/logs.db: tables up to date" in lines
        assert {"✓", "⚠"} >= {line[0] for line in lines}

    def test_the_sample_is_a_sealed_row(self, store_dsn):
        """
        The row that doctor stores is one of the chain, whatever else writes to it.
        """
        with fasten_on(store_dsn):
            emit_sample()
        for _ in range(2):
            done = doctor(store_dsn, "--json")

            assert {"ok"} == status(done, "round trip") | status(done, "evidence")
        with fasten_on(store_dsn):
            emit_sample()
        rows = rows_of(store_dsn)
        samples = [row for row in rows if row["code"] == "AUDIT_SELF_TEST"]

        assert [] == faults(rows)
        assert 8 == len(rows)
        assert ["fasten", "fasten"] == [row["domain"] for row in samples]
        assert {"long"} == {row["retention_class"] for row in samples}

    def test_json(self, store_dsn):
        """
        Programs get one object, and the exit code says the same.
        """
        done = doctor(store_dsn, "--json")
        told = json.loads(done.stdout)

        assert (0, True) == (done.exit_code, told["ok"])
        assert {"check", "status", "message", "cure"} == set(told["checks"][0])

    def test_without_app_the_shim_is_a_warning(self, sqlite_dsn):
        """
        What cannot be looked at is not called well, and costs no exit code.
        """
        done = doctor(sqlite_dsn)

        assert 0 == done.exit_code
        assert "⚠ http shim not looked at; give --app module:app" in done.stdout

    def test_colours_on_a_terminal(self, sqlite_dsn):
        """
        Marks are green, yellow and red on a terminal.
        """
        code, seen = in_terminal("doctor", FASTEN_AUDIT_DSN=sqlite_dsn, **SERVICE)

        assert 0 == code
        assert "\x1b[32m✓\x1b[0m FASTEN_SERVICE_ID=api-server" in seen
        assert "\x1b[33m⚠\x1b[0m http shim" in seen

    def test_another_encoding_than_utf_8(self, sqlite_dsn):
        """
        A terminal without check marks still gets an answer.
        """
        done = run_program(
            "doctor",
            encoding="latin-1",
            env={
                "PYTHONIOENCODING": "latin-1",
                "FASTEN_AUDIT_DSN": sqlite_dsn,
                **SERVICE,
            },
        )

        assert (0, "") == (done.returncode, done.stderr)
        assert "\\u2713 FASTEN_SERVICE_ID=api-server" in done.stdout


class TestEnvironment:
    def test_every_fault_is_a_line(self, sqlite_dsn):
        """
        All unusable variables are named at once, and the rest is looked at.
        """
        done = run(
            "doctor",
            FASTEN_AUDIT_DSN=sqlite_dsn,
            FASTEN_QUEUE_CAPACITY="many",
            FASTEN_STRICT="perhaps",
        )

        assert 1 == done.exit_code
        assert "✗ FASTEN_SERVICE_ID: not set" in done.stdout
        assert "✗ FASTEN_QUEUE_CAPACITY: 'many'" in done.stdout
        assert "✗ FASTEN_STRICT: 'perhaps'" in done.stdout
        assert "✓ audit store reachable" in done.stdout

    def test_a_misspelt_variable(self, sqlite_dsn):
        """
        An unknown FASTEN_* name is a warning with the nearest real one.
        """
        done = doctor(sqlite_dsn, FASTEN_AUDIT_DNS="x")

        assert "⚠ FASTEN_AUDIT_DNS is no setting" in done.stdout
        assert "did you mean FASTEN_AUDIT_DSN?" in done.stdout

    def test_no_secret_is_shown(self, tmp_path):
        """
        Passwords and tokens stay out of every line, broken values included.
        """
        for variable, value in (
            ("FASTEN_AUDIT_DSN", "postgres://u:hunter2@127.0.0.1:1/db"),
            ("FASTEN_AUDIT_DSN", "postgres://u:hunter2@h/a b"),
            ("FASTEN_READER_TOKEN", "hunter2 hunter2"),
            ("FASTEN_SIGNING_KEY", "hunter2"),
        ):
            for words in ((), ("--json",)):
                done = doctor(None, *words, **{variable: value})

                assert 1 == done.exit_code
                assert "hunter2" not in done.output

    def test_broken_codes(self, sqlite_dsn, tmp_path):
        """
        Each mistake of a codes file is a line.
        """
        write(tmp_path / "codes.yaml", "domain: shop\ncodes: {lower: {}, X: {a: 1}}\n")
        done = doctor(sqlite_dsn)

        assert 1 == done.exit_code
        assert "✗ " in done.stdout
        assert "'lower' is not a code" in done.stdout
        assert "unknown key 'a'" in done.stdout

    def test_a_container_s_name(self, sqlite_dsn):
        """
        A node named by its container id begins new chains at each deployment.
        """
        settings, told = _environment(Host(hostname="0123456789ab"))

        assert "0123456789ab" == settings.node_id
        assert ["warn"] == [f.status for f in told if "NODE_ID" in f.message]


def _environment(host: Host):
    from fasten.cli.doctor.environment import check_environment

    environ = {"FASTEN_SERVICE_ID": "svc"}
    return check_environment(
        Host(environ=environ, hostname=host.hostname, cwd=Path.cwd())
    )


class TestStore:
    def test_nothing_listens(self):
        """
        A wrong host or port is named with its cure, without the password.
        """
        done = doctor("postgres://u:hunter2@127.0.0.1:1/db")

        assert 1 == done.exit_code
        assert (
            "✗ audit store not reachable (postgres://u:***@127.0.0.1:1/db): "
            "Postgres is not reachable"
        ) in done.stdout

    def test_a_database_that_is_not_there(self, postgres_dsn):
        """
        A wrong database name is told apart from a server that is down.
        """
        done = doctor(f"{postgres_dsn}_not")

        assert 1 == done.exit_code
        assert "3D000: the database does not exist" in done.stdout

    def test_a_directory_that_is_not_there(self, tmp_path):
        """
        SQLite needs its directory, and doctor makes none.
        """
        done = doctor("sqlite:///./nowhere/audit.db")

        assert 1 == done.exit_code
        assert f"the directory {tmp_path}/nowhere does not exist" in done.stdout
        assert not (tmp_path / "nowhere").exists()

    def test_a_file_that_is_no_database(self, tmp_path, sqlite_dsn):
        """
        Another file under that name is not written to.
        """
        write(tmp_path / "audit.db", "hello " * 1_000)
        done = doctor(sqlite_dsn)

        assert 1 == done.exit_code
        assert "is not a database" in done.stdout
        assert "hello " * 1_000 == (tmp_path / "audit.db").read_text()

    def test_a_server_that_only_reads(self, postgres_dsn):
        """
        A read-only server, as after a failover, does not take the sample.
        """
        with fasten_on(postgres_dsn):
            emit_sample()
        with psycopg.connect(postgres_dsn, autocommit=True) as admin:
            name = admin.info.dbname
            admin.execute(
                f"ALTER DATABASE {name} SET default_transaction_read_only = on"
            )
        done = doctor(postgres_dsn)

        assert 1 == done.exit_code
        assert "read-only" in done.stdout

    def test_a_file_that_may_only_be_read(self, sqlite_dsn, tmp_path):
        """
        A file of another user's is readable, and the sample does not go in.
        """
        if os.geteuid() != 0:
            unavailable("only root can become somebody else")
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            dsn = f"sqlite:///{folder}/audit.db"
            with fasten_on(dsn):
                emit_sample()
            done = as_nobody(["doctor"], {"FASTEN_AUDIT_DSN": dsn, **SERVICE})

        assert 1 == done.returncode, done.stderr
        assert "read-only" in done.stdout or "cannot be opened" in done.stdout

    def test_a_role_without_rights(self, postgres_dsn):
        """
        A missing grant is named; so is a schema that the role may not make.
        """
        role = _role(postgres_dsn, "fasten_poor")
        bare = doctor(role)
        with fasten_on(postgres_dsn):
            emit_sample()
        with psycopg.connect(postgres_dsn, autocommit=True) as admin:
            admin.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO fasten_poor")
        granted = doctor(role)
        with psycopg.connect(postgres_dsn, autocommit=True) as admin:
            admin.execute("DROP OWNED BY fasten_poor")
            admin.execute("DROP ROLE fasten_poor")

        assert 1 == bare.exit_code
        assert "✗ tables not usable: Postgres 42501: a right is missing" in bare.stdout
        assert 1 == granted.exit_code
        assert "✗ emit roundtrip failed: Postgres 42501: a right" in granted.stdout

    def test_root_makes_no_file_in_a_service_s_directory(self, tmp_path):
        """
        `sudo fasten doctor` before the first start does not lock the service out.
        """
        if os.geteuid() != 0:
            unavailable("only root can leave files that are root's")
        place = tmp_path / "service"
        place.mkdir()
        os.chown(place, 65534, 65534)
        done = doctor(f"sqlite:///{place}/audit.db")

        assert "run this as the user that the service runs as" in done.stdout
        assert [] == list(place.iterdir())

    def test_no_store_at_all(self):
        """
        Stdout only is allowed, and said.
        """
        done = doctor()

        assert 0 == done.exit_code
        assert "⚠ no audit store: rows go to stdout only" in done.stdout

    def test_the_other_streams(self, store_dsn):
        """
        Sys and api stores are connected to as well.
        """
        done = doctor(
            store_dsn,
            "--json",
            FASTEN_SYS_DSN=f"{store_dsn}?table=sys_log",
            FASTEN_API_DSN="postgres://u:hunter2@127.0.0.1:1/db",
        )

        assert 1 == done.exit_code
        assert {"ok"} == status(done, "sys store")
        assert {"fail"} == status(done, "api store")


def _role(dsn: str, name: str) -> str:
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'hunter2'")
        admin.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    head, _, tail = dsn.partition("@")
    scheme = head.partition("://")[0]
    return f"{scheme}://{name}:hunter2@{tail}"


def as_nobody(words: list[str], environ: dict[str, str]):
    """
    Run the CLI as the user nobody; its modules are loaded beforehand, as root.
    """
    code = """
        import os, sys, tempfile
        from pathlib import Path
        from click.testing import CliRunner
        from fasten.cli import main
        with tempfile.TemporaryDirectory() as folder:
            warm = {"FASTEN_AUDIT_DSN": f"sqlite:///{folder}/a.db"}
            CliRunner().invoke(main, sys.argv[1:], env=warm)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        main(sys.argv[1:], prog_name="fasten")
    """
    return run_python(code, *words, env=environ, cwd="/")


@pytest.fixture(params=["whole", "newest"])
def extent(request, monkeypatch) -> str:
    """
    Have doctor verify the whole store, as it does, or the newest rows of a large one.
    """
    if request.param == "newest":
        monkeypatch.setattr("fasten.cli.doctor.evidence._WHOLE", 0)
    return request.param


class TestOutbox:
    """
    FASTEN_OUTBOX_DSN: transactions in one database, rows in another.
    """

    def test_a_business_of_its_own(self, sqlite_dsn, postgres_dsn):
        """
        Both are reached, and the outbox is made as the service would make it.
        """
        for outbox, audit in ((sqlite_dsn, postgres_dsn), (postgres_dsn, sqlite_dsn)):
            Path(sqlite_dsn.removeprefix("sqlite:///")).touch()
            done = doctor(audit, "--json", FASTEN_OUTBOX_DSN=outbox)

            assert (0, {"ok"}) == (done.exit_code, status(done, "outbox"))

    @pytest.mark.parametrize(
        ("dsn", "said"),
        [
            ("sqlite:////nowhere/business.db", "there is no file"),
            ("postgres://app:s3cret@127.0.0.1:1/shop", "Postgres is not reachable"),
        ],
    )
    def test_nobody_there(self, sqlite_dsn, dsn, said):
        """
        A business database that cannot be reached is a failure, without its password.
        """
        done = doctor(sqlite_dsn, "--json", FASTEN_OUTBOX_DSN=dsn)
        (found,) = findings(done)["outbox"]

        assert (1, "fail") == (done.exit_code, found["status"])
        assert said in found["message"]
        assert "s3cret" not in done.stdout

    def test_a_role_that_may_not_empty_it(self, sqlite_dsn, postgres_dsn):
        """
        The missing grant is named; with it all is well.
        """
        outbox = "audit_log_outbox"
        mover = _role(postgres_dsn, "fasten_mover")
        doctor(postgres_dsn)  # makes the tables
        grants = (
            f"GRANT SELECT, INSERT ON {outbox} TO fasten_mover",
            f"GRANT DELETE ON {outbox} TO fasten_mover",
            f"REVOKE INSERT ON {outbox} FROM fasten_mover",
        )
        done = []
        with psycopg.connect(postgres_dsn, autocommit=True) as admin:
            for grant in grants:
                admin.execute(grant)
                done.append(doctor(sqlite_dsn, "--json", FASTEN_OUTBOX_DSN=mover))
            admin.execute("DROP OWNED BY fasten_mover")
            admin.execute("DROP ROLE fasten_mover")
        (lacking,), _, (moving,) = (findings(each)["outbox"] for each in done)

        assert [1, 0, 0] == [each.exit_code for each in done]
        assert [{"fail"}, {"ok"}, {"warn"}] == [status(d, "outbox") for d in done]
        assert f"GRANT SELECT, INSERT, DELETE ON {outbox}" in lacking["message"]
        assert "fasten init-db --outbox --print-sql" in lacking["cure"]
        assert f"GRANT INSERT ON {outbox}" in moving["cure"]

    def test_a_file_that_may_only_be_read(self):
        """
        Rows could not be moved out of it.
        """
        if os.geteuid() != 0:
            unavailable("only root can become somebody else")
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o777)
            path = Path(folder, "business.db")
            with closing(sqlite3.connect(path)) as business:
                business.execute("CREATE TABLE orders (id integer)")
            environ = {"FASTEN_AUDIT_DSN": f"sqlite:///{folder}/audit.db", **SERVICE}
            environ["FASTEN_OUTBOX_DSN"] = f"sqlite:///{path}"
            done = as_nobody(["doctor", "--json"], environ)
        (found,) = findings(done)["outbox"]

        assert (1, "fail") == (done.returncode, found["status"])
        assert "read-only" in found["message"] or "cannot be opened" in found["message"]

    def test_rows_that_nobody_moves(self, store_dsn):
        """
        Rows that have waited for minutes are told, in the audit store's own outbox too.
        """
        with fasten_on(store_dsn):
            emit_sample()
        late = UlidMinter()(time.time_ns() - 630 * 10**9)
        database = Database(parse_dsn(store_dsn, cwd=Path.cwd()))
        with database.transaction() as connection:
            connection.exec_driver_sql(
                "INSERT INTO audit_log_outbox (id, service_id, source_node_id, payload,"
                f" created_at) VALUES ('{late}', 'shop', 'n', '[]', '2026-04-22')"
            )
        database.release()
        done = doctor(store_dsn, "--json")
        (found,) = findings(done)["outbox"]

        assert (0, "warn") == (done.exit_code, found["status"])
        assert (
            "1 rows of transactions wait in the outbox, the oldest for 10 min"
            == (found["message"])
        )


class TestEvidence:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ("SET target = 'u-43' WHERE code = 'USER_CREATED'", "was edited"),
            ("SET code = 'USER_DELETED' WHERE code = 'USER_CREATED'", "was edited"),
            ("SET salt = NULL WHERE code = 'ORDER_PLACED'", "salt was edited"),
            ("SET salt = 'x' WHERE code = 'ORDER_PLACED'", "salt was edited"),
            ("SET hash = '00' WHERE code = 'ORDER_PLACED'", "was edited"),
            ("SET canonical_form_id = '0' WHERE code = 'ORDER_PLACED'", "form 0"),
            ("", "does not follow"),
        ],
    )
    def test_a_tampered_chain(self, sqlite_dsn, tmp_path, extent, change, said):
        """
        An edited column, salt or hash is found, and a deleted row, by its number.
        """
        with fasten_on(sqlite_dsn):
            emit_sample()
        database = sqlite3.connect(tmp_path / "audit.db")
        if "salt = NULL" in change:
            database.execute("PRAGMA writable_schema = ON")
            database.execute(
                "UPDATE sqlite_schema SET sql = replace(sql, 'salt TEXT NOT NULL', "
                "'salt TEXT') WHERE name = 'audit_log'"
            )
            database.commit()
            database.close()
            database = sqlite3.connect(tmp_path / "audit.db")
        database.execute(
            f"UPDATE audit_log {change}"
            if change
            else "DELETE FROM audit_log WHERE code = 'ORDER_PLACED'"
        )
        database.commit()
        database.close()
        done = doctor(sqlite_dsn)

        assert 1 == done.exit_code
        assert "✗ chain broken: " in done.stdout
        assert "api-server/host-01" in done.stdout
        assert extent == "whole" or said in done.stdout

    def test_late_rows_of_other_classes_are_no_fault(self, store_dsn, extent):
        """
        Chains of all classes interleave; that is how they are.
        """
        with fasten_on(store_dsn):
            for number in range(30):
                for code in ("USER_CREATED", "CONFIG_UPDATED", "TRIGGER_FIRED"):
                    fasten.emit(code, f"t-{number}")
        done = doctor(store_dsn, "--json")

        assert {"ok"} == status(done, "evidence")
        assert "91 rows" in findings(done)["evidence"][0]["message"]

    def test_a_deleted_tail(self, sqlite_dsn, tmp_path, extent):
        """
        The sample links to the head: rows cut off before it are missed.
        """
        with fasten_on(sqlite_dsn):
            emit_sample()
        with closing(sqlite3.connect(tmp_path / "audit.db")) as database, database:
            database.execute("DELETE FROM audit_log WHERE monotonic_seq = 3")
        done = doctor(sqlite_dsn, "--json")

        assert 1 == done.exit_code
        assert {"fail"} == status(done, "evidence")

    def test_keys_are_used_where_there_are_any(self, sqlite_dsn):
        """
        A signing key is no obstacle: its public half checks what it signed.
        """
        key = base64.b64encode(bytes(range(32))).decode()
        with fasten_on(sqlite_dsn):
            emit_sample()
        done = doctor(sqlite_dsn, "--json", FASTEN_SIGNING_KEY=key)

        assert 0 == done.exit_code
        assert "chain verified: 4 rows, ok" in findings(done)["evidence"][0]["message"]


class TestSpool:
    def test_a_spool_in_memory(self, sqlite_dsn):
        """
        A journal on a tmpfs outlives the process, not the machine.
        """
        if not Path("/dev/shm").is_dir():
            unavailable("no tmpfs at /dev/shm")
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            done = doctor(sqlite_dsn, FASTEN_SPOOL_DIR=folder)

        assert f"⚠ spool {folder} is in memory (tmpfs)" in done.stdout

    @pytest.mark.parametrize(
        ("kind", "said"),
        [("overlay", "goes with it"), ("nfs4", "network file system (nfs4)")],
    )
    def test_a_spool_that_does_not_last(self, tmp_path, kind, said):
        """
        A container's own layer and a network file system are told.
        """
        mounts = write(
            tmp_path / "mounts",
            f"/dev/sda1 / ext4 rw 0 0\nx {str(tmp_path).replace(' ', chr(92) + '040')} "
            f"{kind} rw 0 0\nproc /proc proc rw 0 0\n",
        )
        settings = Settings.from_env(
            {"FASTEN_SERVICE_ID": "svc", "FASTEN_AUDIT_DSN": "sqlite:///./a.db"},
            hostname="h",
            cwd=tmp_path,
        )
        _, told = check_spool(settings, Host(mounts=mounts))

        assert any(said in f.message and f.status == "warn" for f in told)

    def test_a_full_spool(self, sqlite_dsn, tmp_path):
        """
        A spool at its limit is a failure: rows are about to be dropped.
        """
        folder = tmp_path / "spool"
        folder.mkdir(mode=0o700)
        (folder / f"{'0' * 32}.1.seg").write_bytes(b"\0" * 600_000)
        done = doctor(
            sqlite_dsn,
            "--json",
            FASTEN_SPOOL_DIR=str(folder),
            FASTEN_SPOOL_MAX_BYTES="512KiB",
        )

        assert 1 == done.exit_code
        assert "fail" in status(done, "spool")

    def test_a_full_disk(self, sqlite_dsn):
        """
        A disk without room is found before rows are lost to it.
        """
        done = doctor(sqlite_dsn, "--json", FASTEN_SPOOL_MAX_BYTES="1000TiB")

        assert "warn" in status(done, "spool")

    def test_a_spool_that_cannot_be_made(self, sqlite_dsn, tmp_path):
        """
        A file where the directory should be leaves rows in memory.
        """
        write(tmp_path / "spool", "")
        done = doctor(sqlite_dsn, FASTEN_SPOOL_DIR=str(tmp_path / "spool"))

        assert "rows wait in memory only" in done.stdout

    def test_doctor_leaves_nothing_behind(self, sqlite_dsn, tmp_path):
        """
        Looking makes no directory and no file of its own.
        """
        doctor(sqlite_dsn)

        assert {"audit.db", "audit.db-shm", "audit.db-wal"} >= {
            path.name for path in tmp_path.iterdir()
        }

    def test_a_spool_that_is_off(self, sqlite_dsn):
        """
        FASTEN_SPOOL=off is a choice, and a warning.
        """

        assert "⚠ spool off" in doctor(sqlite_dsn, FASTEN_SPOOL="off").stdout

    def test_files_of_another_store(self, sqlite_dsn, tmp_path):
        """
        Journals that no process here will deliver are named.
        """
        folder = str(tmp_path / "spool")
        code = """
            import os, sys, fasten
            fasten.init(service_id="other", stdout="", spool_dir=sys.argv[1],
                        audit_dsn="postgres://u:p@127.0.0.1:1/db")
            fasten.emit("USER_CREATED", "u-1")
            os._exit(0)
        """
        run_python(code, folder)
        done = doctor(sqlite_dsn, "--json", FASTEN_SPOOL_DIR=folder)

        assert any("other" in f["message"] for f in findings(done)["spool"])

    def test_rows_that_wait(self, sqlite_dsn, tmp_path):
        """
        How many rows wait, and how long the oldest has, is told of the living, too.
        """
        folder = tmp_path / "spool"
        settings = {"service_id": "svc", "spool_dir": str(folder), "stdout": ""}
        missing = f"sqlite:///{tmp_path / 'no' / 'audit.db'}"
        fasten.init(audit_dsn=missing, node_id="n", **settings)
        for number in range(3):
            fasten.emit("USER_CREATED", str(number))
        given = {"FASTEN_SERVICE_ID": "svc", "FASTEN_AUDIT_DSN": missing}
        parsed = Settings.from_env(
            {**given, "FASTEN_SPOOL_DIR": str(folder)}, hostname="h", cwd=tmp_path
        )
        later = Host(clock_ns=lambda: time.time_ns() + 7200 * 10**9)
        fresh = [f for f in check_spool(parsed, Host())[1] if f.check == "backlog"]
        old = [f for f in check_spool(parsed, later)[1] if f.check == "backlog"]

        assert ["ok", "warn"] == [f.status for f in (*fresh, *old)]
        assert old[0].message == "3 rows wait in the spool, the oldest for 2 h"

    def test_rows_in_quarantine(self, sqlite_dsn, tmp_path):
        """
        Rows that the store refused wait for somebody to look at them.
        """
        with fasten_on(sqlite_dsn):
            emit_sample()
        from tests.test_cli_follow import Feeder

        folder = tmp_path / "audit.db.spool"
        feeder = Feeder(sqlite_dsn)
        row = feeder.row("bad")
        feeder.close()
        assert spool.quarantine(folder, "0" * 32, (1, tuple(row)), "it is poison")
        done = doctor(sqlite_dsn)

        assert 1 == done.exit_code
        assert "✗ 1 rows in quarantine" in done.stdout
        assert "it is poison" in done.stdout
        assert "fasten drain --quarantine" in done.stdout


class TestWorkers:
    def test_several_processes_with_rings(self, sqlite_dsn):
        """
        Two living processes without FASTEN_SYS_DSN answer each for itself.
        """
        code = """
            import sys, fasten
            fasten.init(service_id="api-server", stdout="", audit_dsn=sys.argv[1])
            fasten.emit("USER_CREATED", "u-1")
            assert fasten.flush(20)
            print("ready", flush=True)
            sys.stdin.read()
        """
        import subprocess
        import sys

        from tests.outside import ROOT

        workers = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(code), sqlite_dsn],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for _ in range(2)
        ]
        try:
            for worker in workers:
                assert b"ready\n" == worker.stdout.readline()
            done = doctor(sqlite_dsn)
        finally:
            for worker in workers:
                worker.communicate(timeout=30)

        assert "⚠ 2 processes keep sys and api rows each in its own" in done.stdout
        assert "set FASTEN_SYS_DSN and FASTEN_API_DSN" in done.stdout

    @pytest.mark.parametrize(
        "environ",
        [{"WEB_CONCURRENCY": "4"}, {"GUNICORN_CMD_ARGS": "--bind x --workers=4"}],
    )
    def test_workers_that_the_environment_asks_for(self, sqlite_dsn, environ):
        """
        What a server will start counts before it is started.
        """
        done = doctor(sqlite_dsn, "--json", **environ)

        assert {"warn"} == status(done, "rings")


class TestClock:
    def test_a_clock_that_was_set_back(self, sqlite_dsn):
        """
        Rows from the future, or ids ahead of their rows, tell of a step.
        """
        ahead = [time.time_ns() + 3_600 * 10**9]
        settings = Settings.from_env(
            {**SERVICE, "FASTEN_AUDIT_DSN": sqlite_dsn, "FASTEN_STDOUT": ""},
            hostname="h",
            cwd=Path.cwd(),
        )
        fasten.codes.registry.ensure()
        running = Engine(settings, clock_ns=lambda: ahead[0])
        running.emit("USER_CREATED", "u-1")
        ahead[0] -= 3_600 * 10**9
        running.emit("USER_CREATED", "u-2")
        assert running.flush(20)
        running.close()
        done = doctor(sqlite_dsn)

        assert "⚠ the clock was set back, by 60 min at the most" in done.stdout

    def test_a_clock_that_differs_from_the_store_s(self, store_dsn):
        """
        The store's time is compared with that of the sample.
        """
        with fasten_on(store_dsn):
            emit_sample()
        settings = Settings.from_env(
            {**SERVICE, "FASTEN_AUDIT_DSN": store_dsn}, hostname="h", cwd=Path.cwd()
        )
        host = Host(clock_ns=lambda: time.time_ns() - 120 * 10**9)
        reached, _ = check_store(settings, host)
        from fasten.cli.doctor.stores import check_round_trip

        row, _ = check_round_trip(settings, reached, host)
        told = check_clock(reached, row, host)
        reached.close()

        # A little more where the sample waited for its turn.
        assert re.fullmatch(
            r"the clock is 12\d\.\d s behind the store's", told[0].message
        )


WIRED = """
import fasten
from fastapi import FastAPI
from fasten.shim.http import APILogger, RequestIDMiddleware

print("an application that talks")
fasten.init()
app = FastAPI()
app.add_middleware(RequestIDMiddleware)
app.add_middleware(APILogger)
open_to_all = FastAPI()
open_to_all.mount("/api/v1/logs", fasten.reader.router(auth="none"))
elsewhere = FastAPI()
elsewhere.mount("/secret/logs", fasten.reader.router(auth="none"))
closed = FastAPI()
closed.mount("/api/v1/logs", fasten.reader.router())
bare = FastAPI()
half = FastAPI()
half.add_middleware(RequestIDMiddleware)


async def broken(scope, receive, send):
    raise RuntimeError("no database")


class Foreign:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        given = dict(scope["headers"])[b"x-request-id"]

        async def echo(message):
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-request-id", given))
            await send(message)

        await self.app(scope, receive, echo)


foreign = Foreign(FastAPI())
"""

FLASK = """
import fasten
from flask import Flask
from fasten.shim import flask as shim

fasten.init()
app = Flask(__name__)
shim.init_app(app)
bare = Flask("bare")


def make():
    return app
"""


class TestApplication:
    @pytest.mark.parametrize(
        ("source", "attribute", "state", "said"),
        [
            (WIRED, "app", "ok", "http shim wired"),
            (WIRED, "bare", "fail", "answers without X-Request-ID"),
            (WIRED, "half", "ok", "http shim wired"),
            (WIRED, "broken", "warn", "RuntimeError: no database"),
            (WIRED, "foreign", "warn", "not by fasten's hand"),
            (FLASK, "app", "ok", "http shim wired"),
            (FLASK, "make()", "ok", "http shim wired"),
            (FLASK, "bare", "fail", "answers without X-Request-ID"),
        ],
    )
    def test_a_request_is_sent_through_it(
        self, sqlite_dsn, tmp_path, source, attribute, state, said
    ):
        """
        Whether the shim is wired is seen by a request, in ASGI and WSGI.
        """
        name = f"application_{abs(hash((source, attribute)))}"
        write(tmp_path / f"{name}.py", source)
        done = doctor(sqlite_dsn, "--json", "--app", f"{name}:{attribute}")
        first = findings(done)["http shim"][0]

        assert state == first["status"], first
        assert said in first["message"]
        assert int(state == "fail") == done.exit_code

    def test_an_api_stream_that_nobody_writes(self, sqlite_dsn, tmp_path):
        """
        RequestIDMiddleware without APILogger leaves no api rows.
        """
        write(tmp_path / "half_app.py", WIRED)
        done = doctor(sqlite_dsn, "--app", "half_app:half")

        assert "⚠ requests leave no api row" in done.stdout

    def test_a_django_that_is_only_imported(self, sqlite_dsn, tmp_path):
        """
        A library of the application's may know Django, which nobody has configured.
        """
        write(tmp_path / "half_app.py", f"import django.conf\n{WIRED}")
        environ = {"FASTEN_AUDIT_DSN": sqlite_dsn, **SERVICE}
        done = run_program("doctor", "--app", "half_app:half", env=environ)

        assert 0 == done.returncode, done.stderr
        assert "⚠ requests leave no api row" in done.stdout

    @pytest.mark.parametrize(
        ("attribute", "state", "said"),
        [
            ("open_to_all", "fail", "/api/v1/logs answers everybody"),
            ("elsewhere", "fail", "/secret/logs answers everybody"),
            ("closed", "ok", "asks for a token"),
            ("bare", "ok", "no reader"),
        ],
    )
    def test_who_may_read(self, sqlite_dsn, tmp_path, attribute, state, said):
        """
        A reader that lets everybody in is found, wherever it is mounted.
        """
        write(tmp_path / "readers.py", WIRED)
        done = doctor(sqlite_dsn, "--json", "--app", f"readers:{attribute}")
        (told,) = findings(done)["reader"]

        assert state == told["status"]
        assert said in told["message"]

    def test_a_reader_without_a_token(self, sqlite_dsn):
        """
        Without FASTEN_READER_TOKEN a reader refuses everybody.
        """

        assert {"warn"} == status(doctor(sqlite_dsn, "--json"), "reader")
        assert {"ok"} == status(
            doctor(sqlite_dsn, "--json", FASTEN_READER_TOKEN="a,b"), "reader"
        )

    def test_looking_opens_no_store_and_prints_nothing(self, tmp_path, sqlite_dsn):
        """
        The application's init() and requests leave no row, and its prints no data.
        """
        write(tmp_path / "talks.py", WIRED)
        done = doctor(sqlite_dsn, "--json", "--app", "talks:app")
        rows = rows_of(sqlite_dsn)

        assert json.loads(done.stdout)
        assert "an application that talks" in done.stderr
        assert ["AUDIT_SELF_TEST"] == [row["code"] for row in rows]
        assert fasten.engine.current() is None

    @pytest.mark.parametrize(
        ("spec", "code", "said"),
        [
            ("no_such_module:app", 2, "there is no module 'no_such_module'"),
            ("trouble:app", 1, "importing it raised ZeroDivisionError"),
            ("leaves:app", 1, "importing it raised SystemExit"),
            ("readable:nothing", 2, "no attribute 'nothing'"),
            ("what is this", 2, "is not module:attr"),
        ],
    )
    def test_what_cannot_be_imported(self, sqlite_dsn, tmp_path, spec, code, said):
        """
        An application that does not import is told in one line.
        """
        write(tmp_path / "trouble.py", "1 / 0\n")
        write(tmp_path / "leaves.py", "raise SystemExit(0)\n")
        write(tmp_path / "readable.py", "app = None\n")
        done = doctor(sqlite_dsn, "--app", spec)

        assert code == done.exit_code
        assert said in done.stderr
