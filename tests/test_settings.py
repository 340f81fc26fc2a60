# SPDX-License-Identifier: Apache-2.0
"""
Settings: the grammars, DSNs, the environment, and what must never be shown.
"""

from __future__ import annotations

import base64
import os
import pickle
import sqlite3
import traceback
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from fasten.errors import FastenError, SettingsError
from fasten.settings import (
    VARIABLES,
    Dsn,
    OnFull,
    Secret,
    Settings,
    parse_bool,
    parse_dsn,
    parse_duration,
    parse_size,
)

CWD = Path("/srv/app")
CANARY = "cAnArY-7f3e9b"
SEED = base64.b64encode(bytes(range(32))).decode()
PEM = "-----BEGIN PRIVATE KEY-----\nMC4CAQ==\n-----END PRIVATE KEY-----"


def dsn(text, **options):
    return parse_dsn(text, cwd=CWD, **options)


def settings(environ=None, *, cwd=CWD, hostname="host-01", **overrides):
    given_environ = {"FASTEN_SERVICE_ID": "api-server", **(environ or {})}
    return Settings.from_env(given_environ, overrides, hostname=hostname, cwd=cwd)


def fault(environ=None, **options):
    with pytest.raises(SettingsError) as caught:
        settings(environ, **options)
    return str(caught.value)


class TestDurations:
    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("0s", 0),
            ("90s", 90),
            ("6h", 21_600),
            ("1w2d", 777_600),
            ("7y", 7 * 365 * 86_400),
            ("1h1h", 7_200),
            ("P7D", 604_800),
            ("P2W", 1_209_600),
            ("P1Y", 31_536_000),
            ("PT1H30M", 5_400),
            ("P1DT12H", 129_600),
            ("PT0.5S", 0.5),
        ],
    )
    def test_reads(self, text, seconds):
        """Both spellings count up to seconds; a year is 365 days."""
        found = parse_duration(text)

        assert (seconds, type(seconds)) == (found, type(found))

    @pytest.mark.parametrize(
        "text",
        [
            *(
                "",
                " ",
                "5",
                "h",
                "1h ",
                "1.5h",
                "-1h",
                "1H",
                "1h 2m",
                "1M",
                "१h",
                "1h\n",
            ),
            *("P", "PT", "P1M", "P1DT", "PT1H1D", "p1d", "P1.5D", "PT.5S", "1hP1D"),
            *("9" * 70 + "s", "1001y", "9" * 60 + "y"),
        ],
    )
    def test_refuses(self, text):
        """Anything else is an error that shows the text and a way to write it."""
        with pytest.raises(ValueError, match="write a"):
            parse_duration(text)

    @given(
        st.lists(st.tuples(st.integers(0, 999), st.sampled_from("smhdw")), min_size=1)
    )
    def test_grammar(self, parts):
        """Parts add up, in any order and number, as long as the text is short."""
        text = "".join(f"{n}{unit}" for n, unit in parts)
        units = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
        if len(text) > 64:
            with pytest.raises(ValueError, match="not a duration"):
                parse_duration(text)
            return

        assert sum(n * units[unit] for n, unit in parts) == parse_duration(text)

    @given(
        st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)
    )
    def test_both_spellings_agree(self, days, hours, minutes, seconds):
        """ISO 8601 and the short form are two spellings of one duration."""
        short = parse_duration(f"{days}d{hours}h{minutes}m{seconds}s")

        assert short == parse_duration(f"P{days}DT{hours}H{minutes}M{seconds}S")

    @given(st.text(max_size=20))
    @example("P٣D")
    def test_total(self, text):
        """Any text is either a duration or a ValueError."""
        try:
            found = parse_duration(text)
        except ValueError:
            return

        assert found >= 0


class TestSizesAndSwitches:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("0", 0),
            ("65536", 65_536),
            ("1b", 1),
            ("64k", 65_536),
            ("64KiB", 65_536),
            ("256MiB", 268_435_456),
            ("256 MiB", 268_435_456),
            ("1GB", 1_000_000_000),
            ("1g", 1_073_741_824),
            ("2TiB", 2_199_023_255_552),
        ],
    )
    def test_sizes(self, text, size):
        """Units of 1024 and of 1000 are told apart as their names say."""
        assert size == parse_size(text)

    @pytest.mark.parametrize(
        "text", ["", "MiB", "1.5G", "-1", "1 X", "1XB", "٣k", "1  k"]
    )
    def test_no_sizes(self, text):
        """Anything else is an error with a way to write it."""
        with pytest.raises(ValueError, match="256MiB"):
            parse_size(text)

    @pytest.mark.parametrize("text", ["on", "ON", "true", "Yes", "1"])
    def test_on(self, text):
        """On has four spellings, in any case."""
        assert parse_bool(text) is True

    @pytest.mark.parametrize("text", ["off", "Off", "false", "no", "0"])
    def test_off(self, text):
        """So has off."""
        assert parse_bool(text) is False

    @pytest.mark.parametrize("text", ["", "enabled", "2", "o n"])
    def test_neither(self, text):
        """A third thing is an error, not off."""
        with pytest.raises(ValueError, match="on or off"):
            parse_bool(text)


class TestSecret:
    def test_hides(self):
        """Neither repr, str, format nor a container's repr shows the text."""
        secret = Secret(CANARY)
        shown = f"{secret} {secret!r} {[secret]}"

        assert CANARY not in shown

    def test_reveals(self):
        """Whoever asks gets it."""
        assert CANARY == Secret(CANARY).reveal()

    def test_is_a_value(self):
        """Equal texts are equal secrets, in sets as well."""
        assert {Secret("a")} == {Secret("a"), Secret("a")} != {Secret("b")}


class TestSqliteDsns:
    @pytest.mark.parametrize(
        ("text", "path", "table"),
        [
            ("sqlite:///./audit.db", "/srv/app/audit.db", "audit_log"),
            ("sqlite:///audit.db", "/srv/app/audit.db", "audit_log"),
            ("sqlite:///../audit.db", "/srv/audit.db", "audit_log"),
            ("sqlite:////abs/path.db", "/abs/path.db", "audit_log"),
            ("sqlite+pysqlite:////abs/x.db", "/abs/x.db", "audit_log"),
            ("SQLite:////abs/x.db", "/abs/x.db", "audit_log"),
            ("sqlite:///data/app.db?table=trail", "/srv/app/data/app.db", "trail"),
            ("sqlite:////me@corp/x.db", "/me@corp/x.db", "audit_log"),
            ("sqlite:///a%20b%3F%23.db", "/srv/app/a b?#.db", "audit_log"),
        ],
    )
    def test_reads(self, text, path, table):
        """Three slashes are relative to the given folder, four are absolute."""
        found = dsn(text)

        assert ("sqlite", path, None, table) == (
            found.backend,
            found.path,
            found.schema,
            found.table,
        )

    def test_default_table(self):
        """Each stream has its own default table."""
        assert "api_log" == dsn("sqlite:///a.db", table="api_log").table

    def test_display(self):
        """A relative path is shown as given, with the absolute one beside it."""
        relative, absolute = dsn("sqlite:///./logs.db"), dsn("sqlite:////abs/logs.db")

        assert "sqlite:///./logs.db (/srv/app/logs.db)" == relative.display
        assert "sqlite:///./logs.db" == relative.given_display
        assert "sqlite:////abs/logs.db" == absolute.display

    def test_equal_by_where_it_leads(self):
        """Two spellings of one file are one DSN, and one fingerprint."""
        first, second = dsn("sqlite:///./a.db"), dsn("sqlite:////srv/app/a.db")

        assert first == second
        assert hash(first) == hash(second)
        assert first.fingerprint == second.fingerprint

    def test_has_no_conninfo(self):
        """A file has no libpq string; the error shows which file."""
        with pytest.raises(ValueError, match=r"a\.db"):
            dsn("sqlite:///a.db").conninfo()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("sqlite://", "names no file"),
            ("sqlite:///", "names no file"),
            ("sqlite:///data/", "names no file"),
            ("sqlite:///:memory:", "lives in memory"),
            ("sqlite://:memory:", "lives in memory"),
            ("sqlite:///x.db?mode=memory", "lives in memory"),
            ("sqlite:///file:x.db?uri=true", "has options"),
            ("sqlite:///x.db?timeout=5", "takes \\?table= and no other"),
            ("sqlite://data/x.db", "two slashes"),
            ("sqlite:///x.db?table=main.log", "SQLite has none"),
            ("sqlite:///x.db#y", "%23"),
            ("sqlite:///50%.db", "%25"),
            ("sqlite:///my file.db", "%20"),
            ("sqlite:x.db", "is not a DSN"),
            ("./x.db", "is not a DSN"),
        ],
    )
    def test_refuses(self, text, message):
        """What cannot hold rows for good is refused with what to write instead."""
        with pytest.raises(SettingsError, match=message):
            dsn(text)

    @given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
    def test_round_trip(self, name):
        """Any file name can be written, percent-encoded."""
        found = dsn(f"sqlite:////data/{quote(f'_{name}_', safe='')}")

        assert os.path.normpath(f"/data/_{name}_") == found.path

    def test_names_the_file_sqlite_opens(self, tmp_path):
        """The path is the file that SQLite then has."""
        found = parse_dsn("sqlite:///./a%20b.db", cwd=tmp_path)
        sqlite3.connect(found.path).close()

        assert [tmp_path / "a b.db"] == list(tmp_path.iterdir())


WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12
)
HOSTS = st.from_regex(r"\A[a-z][a-z0-9_-]{0,8}(\.[a-z]{2,3})?\Z")
PORTS = st.none() | st.integers(1, 65_535)


class TestPostgresDsns:
    @pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
    def test_schemes(self, scheme):
        """Three spellings of the scheme are read, libpq gets its own."""
        found = dsn(f"{scheme}://user:pw@db:5432/app?table=audit_log")

        assert "postgresql" == found.backend
        assert "postgresql://user:pw@db:5432/app" == found.conninfo()

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("postgres://db/app", {"host": "db", "dbname": "app"}),
            ("postgres://u@db/app", {"user": "u", "host": "db", "dbname": "app"}),
            (
                "postgres://u:p@h1:5433,h2/app?target_session_attrs=read-write",
                {
                    "user": "u",
                    "password": "p",
                    "host": "h1,h2",
                    "port": "5433,",
                    "dbname": "app",
                    "target_session_attrs": "read-write",
                },
            ),
            (
                "postgres://u:p@[::1]:5433/app?sslmode=require&table=t",
                {
                    "user": "u",
                    "password": "p",
                    "host": "::1",
                    "port": "5433",
                    "dbname": "app",
                    "sslmode": "require",
                },
            ),
            (
                "postgresql:///app?host=/run/pg&table=t",
                {"host": "/run/pg", "dbname": "app"},
            ),
            ("postgres://%2Frun%2Fpg/app", {"host": "/run/pg", "dbname": "app"}),
            (
                "postgres://u@srv:p%2Fw%3A%40@db/app",
                {"user": "u@srv", "password": "p/w:@", "host": "db", "dbname": "app"},
            ),
            ("postgres://u:a@b@db", {"user": "u", "password": "a@b", "host": "db"}),
        ],
    )
    def test_libpq_reads_it(self, text, expected):
        """What libpq makes of its URL is what was meant."""
        found = conninfo_to_dict(dsn(text).conninfo())

        assert expected == found

    @given(
        WORDS, WORDS, st.lists(st.tuples(HOSTS, PORTS), min_size=1, max_size=3), WORDS
    )
    def test_round_trip(self, user, password, hosts, database):
        """Any user, password and database reach libpq unchanged, on any hosts."""
        where = ",".join(
            host if port is None else f"{host}:{port}" for host, port in hosts
        )
        who = f"{quote(user, safe='')}:{quote(password, safe='')}"
        text = f"postgres://{who}@{where}/{quote(database, safe='')}?table=t"
        found = conninfo_to_dict(dsn(text).conninfo())

        assert (user, password, database) == (
            found["user"],
            found["password"],
            found["dbname"],
        )
        assert ",".join(host for host, _ in hosts) == found["host"]

    @given(WORDS, WORDS)
    def test_shows_no_password(self, user, password):
        """The password is in no display, and the user not in the repr."""
        encoded = "Pw" + quote(password, safe="")
        found = dsn(f"postgres://Us{quote(user, safe='')}:{encoded}@db/app?table=t")

        assert encoded not in f"{found} {found!r} {found.display} {found.given_display}"
        assert "Us" not in repr(found)

    def test_display(self):
        """Password and unknown options are masked, the rest stands as given."""
        found = dsn("postgres://u:p@db:5432/app?sslmode=require&password=x&sslkey=y")

        assert (
            "postgres://u:***@db:5432/app?sslmode=require&***&***"
            == found.given_display
        )
        assert found.display == found.given_display

    @pytest.mark.parametrize(
        ("text", "schema", "table"),
        [
            ("postgres://db/app?table=audit_log", None, "audit_log"),
            ("postgres://db/app?table=ops.audit_log", "ops", "audit_log"),
            ("postgres://db/app?table=", None, "audit_log"),
            ("postgres://db/app?table=_T1", None, "_T1"),
        ],
    )
    def test_tables(self, text, schema, table):
        """One schema may stand before the table."""
        found = dsn(text)

        assert (schema, table) == (found.schema, found.table)

    @pytest.mark.parametrize(
        "name",
        ["1x", "a-b", "a.b.c", "a%20b", ".t", "s.", 'a"b', "a;b", "täble", "x" * 49],
    )
    def test_bad_tables(self, name):
        """What is no plain table name is refused: it stands in SQL."""
        with pytest.raises(SettingsError, match="table name"):
            dsn(f"postgres://db/app?table={name}")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("postgres://user:pw\n  @db:5432/app?table=audit_log", "white space"),
            ("postgres://user:pw @db/app", "white space"),
            ("postgres://user:pw@db/app\n", "white space"),
            ("host=db user=u password=pw", "white space"),
            ("mysql://u:pw@db/app", "unknown scheme 'mysql'"),
            ("postgresql+asyncpg://u:pw@db/app", "postgresql://user"),
            ("postgres:/u:pw@db/app", "is not a DSN"),
            ("postgres://u:p/w@db/app", "%2F"),
            ("postgres://u:p#w@db/app", "%23"),
            ("postgres://u:p?w@db/app", "%3F"),
            ("postgres://u:p%w@db/app", "%25"),
            ("postgres://u:p%00w@db/app", "holds a bare"),
            ("postgres://u:pw@db:port/app", "host or port"),
            ("postgres://u:pw@db:70000/app", "host or port"),
            ("postgres://u:pw@db:0/app", "host or port"),
            ("postgres://u:pw@[::1/app", "host or port"),
            ("postgres://u:pw", "host or port"),
            ("postgres://u:pw@db/app/x", "more than one /"),
            ("postgres://u:pw@db/app?sslmode", "option without a value"),
            ("postgres://u:pw@db/app?table=a&table=b", "two tables"),
        ],
    )
    def test_refuses(self, text, message):
        """A broken DSN is refused with what is wrong, and without its password."""
        with pytest.raises(SettingsError, match=message) as caught:
            dsn(text)

        assert "pw" not in str(caught.value)

    @given(st.text(alphabet="ab@:/?#%&=[]., \npgs", max_size=40), st.booleans())
    def test_total(self, text, is_url):
        """Any text is either a DSN or a SettingsError."""
        try:
            found = dsn(f"postgres://{text}" if is_url else text)
        except SettingsError:
            return

        assert isinstance(found, Dsn)

    def test_takes_a_secret(self):
        """A DSN may be handed on as a Secret; another type is refused by its name."""
        assert "app" in dsn(Secret("postgres://db/app")).conninfo()
        with pytest.raises(SettingsError, match="type int"):
            dsn(5)


class TestFingerprints:
    BASE = "postgres://user:pw@db:5432/app?table=audit_log"

    @pytest.mark.parametrize(
        "text",
        [
            "postgres://user:other@db:5432/app?table=audit_log",
            "postgresql://admin@db/app",
            "postgres://user:pw@DB/app?sslmode=require&application_name=x",
            "postgres:///app?host=db&user=u&password=p",
            "postgres://db/?dbname=app",
        ],
    )
    def test_outlives(self, text):
        """Neither user, password, options nor a default spelled out change it."""
        assert dsn(self.BASE).fingerprint == dsn(text).fingerprint

    @pytest.mark.parametrize(
        "text",
        [
            "postgres://user:pw@db2:5432/app",
            "postgres://user:pw@db:5433/app",
            "postgres://user:pw@db:5432/app2",
            "postgres://user:pw@db:5432/app?table=log",
            "postgres://user:pw@db:5432/app?table=ops.audit_log",
            "postgres://user:pw@db:5432,db2/app",
            "postgres:///app?host=/run/pg",
            "sqlite:////app",
        ],
    )
    def test_tells_apart(self, text):
        """Another server, database, schema or table is another store."""
        assert dsn(self.BASE).fingerprint != dsn(text).fingerprint

    def test_order_of_hosts(self):
        """The order in which servers are tried is no other store."""
        first = dsn("postgres://h1:5433,h2/app").fingerprint

        assert first == dsn("postgres://h2,h1:5433/app").fingerprint

    def test_form(self):
        """It is 16 hex digits, and the same in every process."""
        assert "830924a0318e3ec1" == dsn(self.BASE).fingerprint


class TestFromEnv:
    def test_defaults(self):
        """With nothing but a service id, the contract's defaults hold."""
        made = settings()

        assert Settings(service_id="api-server", node_id="host-01") == made
        assert (10_000, 268_435_456, 65_536) == (
            made.queue_capacity,
            made.spool_max_bytes,
            made.max_detail_bytes,
        )
        assert (21_600, 86_400, 60) == (
            made.retention_sweep_interval,
            made.retention_grace,
            made.checkpoint_interval,
        )
        assert {"audit", "sys", "api"} == made.stdout

    def test_the_page(self):
        """The page's first environment is read as printed."""
        made = settings(
            {
                "FASTEN_SERVICE_ID": "my-service",
                "FASTEN_NODE_ID": "host-02",
                "FASTEN_AUDIT_DSN": "sqlite:///./audit.db",
            }
        )

        assert ("my-service", "host-02") == (made.service_id, made.node_id)
        assert "/srv/app/audit.db" == made.audit_dsn.path

    @pytest.mark.parametrize(
        ("name", "text", "expected"),
        [
            ("tenant_id", "acme", "acme"),
            (
                "codes",
                "a.yaml,/b.yaml:c.yaml",
                ("/srv/app/a.yaml", "/b.yaml", "/srv/app/c.yaml"),
            ),
            ("strict", "off", False),
            ("audit_store_failure_strategy", "RAISE", "raise"),
            ("spool", "off", False),
            ("spool_dir", "spool/x", "/srv/app/spool/x"),
            ("spool_max_bytes", "1GiB", 1_073_741_824),
            ("durability", "power", "power"),
            ("on_full", "drop_count", OnFull(kind="drop_count")),
            ("on_full", "raise", OnFull(kind="raise")),
            ("on_full", "block:250", OnFull(kind="block", block_s=0.25)),
            ("queue_capacity", "5", 5),
            ("audit_retention_class_short", "7", 604_800),
            ("audit_retention_class_medium", "1y", 31_536_000),
            ("audit_retention_class_long", "2555", 220_752_000),
            (
                "audit_retention_override",
                "long=7y, medium=30",
                {"long": 220_752_000, "medium": 2_592_000},
            ),
            ("retention_sweep_interval", "30m", 1_800),
            ("retention_grace", "0s", 0),
            ("api_retention_days", "90", 90),
            ("sys_retention_days", "1w", 7),
            ("sys_ring_size", "0", 0),
            ("api_ring_size", "50", 50),
            ("stdout", "audit, api", {"audit", "api"}),
            ("stdout", "", set()),
            ("redact_keys", "iban, tax_id,", ("iban", "tax_id")),
            ("redact_replacement", "[gone]", "[gone]"),
            ("max_detail_bytes", "1MiB", 1_048_576),
            ("trust_request_id", "0", False),
            ("log", "off", False),
            ("checkpoint_interval", "PT5M", 300),
            ("reader_token", "a, b,a", (Secret("a"), Secret("b"))),
        ],
    )
    def test_each_variable(self, name, text, expected):
        """Each variable has its grammar."""
        made = settings({f"FASTEN_{name.upper()}": text})

        assert expected == getattr(made, name)

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("strict", False, False),
            ("strict", "off", False),
            ("spool", 1, True),
            ("queue_capacity", 7, 7),
            ("spool_dir", Path("/var/spool"), "/var/spool"),
            ("codes", [Path("a.yaml"), "/b.yaml"], ("/srv/app/a.yaml", "/b.yaml")),
            ("codes", Path("a.yaml"), ("/srv/app/a.yaml",)),
            ("audit_retention_class_long", 10, 864_000),
            ("audit_retention_class_long", timedelta(hours=1), 3_600),
            ("audit_retention_override", {"long": 1}, {"long": 86_400}),
            ("retention_sweep_interval", timedelta(minutes=5), 300.0),
            ("retention_grace", 0, 0),
            ("checkpoint_interval", 1.5, 1.5),
            ("stdout", ["audit"], {"audit"}),
            ("stdout", [], set()),
            ("stdout", "", set()),
            ("redact_keys", {"iban"}, ("iban",)),
            ("on_full", OnFull(kind="raise"), OnFull(kind="raise")),
            ("reader_token", ["a", Secret("b")], (Secret("a"), Secret("b"))),
            ("api_dsn", dsn("sqlite:////x.db"), dsn("sqlite:////x.db")),
        ],
    )
    def test_python_values(self, name, value, expected):
        """Keyword arguments of init may be Python's own values, and win."""
        made = settings({f"FASTEN_{name.upper()}": "garbage"}, **{name: value})

        assert expected == getattr(made, name)

    def test_default_tables(self):
        """Each stream's DSN has the stream's table unless it names one."""
        one = "sqlite:///all.db"
        made = settings(audit_dsn=one, api_dsn=one, sys_dsn=one)

        assert ("audit_log", "api_log", "sys_log") == (
            made.audit_dsn.table,
            made.api_dsn.table,
            made.sys_dsn.table,
        )

    def test_shared_table(self):
        """Two streams in one table are a fault that names both."""
        one = "sqlite:///all.db?table=log"
        found = fault(audit_dsn=one, api_dsn=one)

        assert (
            "FASTEN_API_DSN: leads to the same table as FASTEN_AUDIT_DSN, log" in found
        )

    @pytest.mark.parametrize("value", [None, ""])
    def test_override_unsets(self, value):
        """An override of nothing means the default, whatever the environment holds."""
        made = settings({"FASTEN_AUDIT_DSN": "sqlite:///a.db"}, audit_dsn=value)

        assert made.audit_dsn is None

    def test_empty_is_unset(self):
        """An empty variable, or one of blanks, is not set."""
        made = settings({"FASTEN_TENANT_ID": "", "FASTEN_QUEUE_CAPACITY": "  "})

        assert (None, 10_000) == (made.tenant_id, made.queue_capacity)

    def test_outer_blanks(self):
        """Blanks round a value, as env files leave them, are no part of it."""
        assert "acme" == settings({"FASTEN_TENANT_ID": " acme\r"}).tenant_id

    def test_never_the_process_environment(self, monkeypatch):
        """Only the mapping given is read."""
        monkeypatch.setenv("FASTEN_TENANT_ID", "other")

        assert settings().tenant_id is None

    def test_all_faults_at_once(self):
        """One error names every faulty variable with its value, and the cure."""
        found = fault(
            {
                "FASTEN_SERVICE_ID": "",
                "FASTEN_QUEUE_CAPACITY": "ten",
                "FASTEN_DURABILITY": "disk",
            },
            strict="perhaps",
            colour="red",
        )

        assert found.startswith("5 settings are unusable:\n  ")
        assert "FASTEN_SERVICE_ID: not set; name the service" in found
        assert "FASTEN_QUEUE_CAPACITY: 'ten' is not a whole number" in found
        assert "FASTEN_DURABILITY: 'disk' is not one of process, power" in found
        assert "FASTEN_STRICT (strict= of init): 'perhaps' is not a switch" in found
        assert "colour= is no setting" in found

    def test_is_a_value_error(self):
        """It is a FastenError, and a ValueError to those who know no fasten."""
        assert issubclass(SettingsError, FastenError)
        assert issubclass(SettingsError, ValueError)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("SERVICE_ID", "a\x00b"),
            ("SERVICE_ID", "x" * 256),
            ("NODE_ID", "a\nb"),
            ("NODE_ID", "\udcff"),
            ("STRICT", "2"),
            ("AUDIT_STORE_FAILURE_STRATEGY", "drop"),
            ("SPOOL_MAX_BYTES", "0"),
            ("SPOOL_MAX_BYTES", "lots"),
            ("ON_FULL", "block"),
            ("ON_FULL", "block:0"),
            ("ON_FULL", "block:1s"),
            ("QUEUE_CAPACITY", "0"),
            ("QUEUE_CAPACITY", "-1"),
            ("QUEUE_CAPACITY", "٣"),
            ("QUEUE_CAPACITY", "9" * 5_000),
            ("AUDIT_RETENTION_CLASS_SHORT", "0"),
            ("AUDIT_RETENTION_CLASS_SHORT", "0s"),
            ("AUDIT_RETENTION_CLASS_SHORT", "1001y"),
            ("AUDIT_RETENTION_CLASS_SHORT", "999999999"),
            ("AUDIT_RETENTION_OVERRIDE", "eternal=7y"),
            ("AUDIT_RETENTION_OVERRIDE", "long"),
            ("AUDIT_RETENTION_OVERRIDE", "long=1y,long=2y"),
            ("RETENTION_SWEEP_INTERVAL", "0s"),
            ("RETENTION_SWEEP_INTERVAL", "60"),
            ("API_RETENTION_DAYS", "36h"),
            ("STDOUT", "audit,kafka"),
            ("CHECKPOINT_INTERVAL", "often"),
            ("READER_TOKEN", "two words"),
            ("READER_TOKEN", "tökén"),
            ("SPOOL_DIR", "a\0b"),
        ],
    )
    def test_faults(self, name, value):
        """A value outside its grammar is a fault that names the variable."""
        assert f"FASTEN_{name}: " in fault({f"FASTEN_{name}": value})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("service_id", 5),
            ("strict", 2),
            ("strict", 1.0),
            ("queue_capacity", True),
            ("queue_capacity", 1.5),
            ("retention_grace", float("nan")),
            ("retention_grace", -1),
            ("retention_grace", object()),
            ("checkpoint_interval", True),
            ("audit_retention_class_long", 1.5),
            ("stdout", 5),
            ("codes", [5]),
            ("spool_dir", 5),
            ("on_full", 5),
            ("durability", None.__class__),
            ("audit_dsn", Path("/a.db")),
            ("reader_token", {"a": 1}),
            ("signing_key", b"x"),
            ("audit_dsn_file", 5),
        ],
    )
    def test_faults_of_type(self, name, value):
        """A Python value of another type is a fault, never another exception."""
        assert f" ({name}= of init): " in fault(**{name: value})

    def test_value_is_bounded(self):
        """A value that is shown is cut."""
        assert len(fault({"FASTEN_QUEUE_CAPACITY": "x" * 10_000})) < 300

    def test_no_hostname(self):
        """A host without a name needs FASTEN_NODE_ID."""
        assert "FASTEN_NODE_ID: " in fault(hostname="")

    def test_unexpanded(self):
        """A password that is still a shell's ${...} is pointed out, and used."""
        made = settings({"FASTEN_AUDIT_DSN": "postgres://user:${DB_PW}@db/shop"})

        assert 1 == len(made.warnings)
        assert "FASTEN_AUDIT_DSN holds ${...} as it stands" in made.warnings[0]


class TestNames:
    def test_unknown_variable(self):
        """An unknown FASTEN_ name is a warning with the nearest real one."""
        made = settings({"FASTEN_ACODES": "a.yaml", "FASTEN_ZZZ": "1"})
        expected = (
            "FASTEN_ACODES is no setting and was ignored; did you mean FASTEN_CODES?",
            "FASTEN_ZZZ is no setting and was ignored; no real name is near it",
        )

        assert expected == made.warnings

    def test_test_names(self):
        """The names of our own test suite are no strangers."""
        assert () == settings({"FASTEN_TEST_POSTGRES_DSN": "x"}).warnings

    def test_twins_of_open_settings(self):
        """Only secrets have a _FILE twin."""
        made = settings({"FASTEN_TENANT_ID_FILE": "/x"})

        assert "did you mean FASTEN_TENANT_ID?" in made.warnings[0]

    def test_other_names(self):
        """What does not begin with FASTEN_ is none of ours."""
        assert () == settings({"FASTENER": "1", "fasten_log": "off"}).warnings

    @pytest.mark.parametrize(
        ("name", "near"),
        [
            ("service", "service_id"),
            ("FASTEN_SERVICE_ID", "service_id"),
            ("audit_dns", "audit_dsn"),
        ],
    )
    def test_unknown_override(self, name, near):
        """An unknown keyword argument is an error with the nearest real one."""
        assert f"{name}= is no setting; did you mean {near}?" in fault(**{name: "x"})

    def test_variables(self):
        """Every field has its variable, and every secret its twin."""
        fields = {f.name for f in attrs.fields(Settings)} - {"warnings"}

        assert {f"FASTEN_{name.upper()}" for name in fields} == {
            name for name in VARIABLES if not name.endswith("_FILE")
        }
        assert 6 == sum(name.endswith("_FILE") for name in VARIABLES)


class TestDotenv:
    @pytest.mark.parametrize(
        "line",
        [
            "FASTEN_SERVICE_ID=x",
            "export FASTEN_SERVICE_ID=x",
            "a=1\n FASTEN_SERVICE_ID = x",
        ],
    )
    def test_named(self, tmp_path, line):
        """A missing service id that stands in ./.env: the error names the file."""
        (tmp_path / ".env").write_text(line)
        with pytest.raises(SettingsError) as caught:
            Settings.from_env({}, hostname="h", cwd=tmp_path)

        assert f"{tmp_path}/.env holds it" in str(caught.value)
        assert "set -a; . ./.env; set +a" in str(caught.value)

    @pytest.mark.parametrize(
        "line", ["", "# FASTEN_SERVICE_ID=x", "FASTEN_SERVICE_IDS=x"]
    )
    def test_not_named(self, tmp_path, line):
        """A .env that does not hold it is not mentioned."""
        (tmp_path / ".env").write_text(line)
        with pytest.raises(SettingsError) as caught:
            Settings.from_env({}, hostname="h", cwd=tmp_path)

        assert ".env" not in str(caught.value)

    def test_not_read(self, tmp_path):
        """Nothing is taken from a .env, and it is not opened without need."""
        (tmp_path / ".env").write_text("FASTEN_TENANT_ID=x")

        assert settings(cwd=tmp_path).tenant_id is None

    def test_unreadable(self, tmp_path):
        """A folder or Latin-1 text named .env is no trouble."""
        (tmp_path / ".env").write_bytes(b"\xff\xfe")
        with pytest.raises(SettingsError, match="FASTEN_SERVICE_ID: not set; name"):
            Settings.from_env({}, hostname="h", cwd=tmp_path)


class TestFiles:
    @pytest.mark.parametrize("newline", ["", "\n", "\r\n"])
    def test_dsn(self, tmp_path, newline):
        """A secret may stand in a file; its newline is no part of it."""
        (tmp_path / "dsn").write_bytes(f"postgres://u:pw@db/app{newline}".encode())
        made = settings({"FASTEN_AUDIT_DSN_FILE": str(tmp_path / "dsn")})

        assert "postgresql://u:pw@db/app" == made.audit_dsn.conninfo()

    def test_relative(self, tmp_path):
        """A relative path is resolved against the working directory."""
        (tmp_path / "token").write_text("t\n")
        made = settings(cwd=tmp_path, reader_token_file=Path("token"))

        assert (Secret("t"),) == made.reader_token

    def test_both(self):
        """Both given is a fault: nobody could say which one holds."""
        found = fault({"FASTEN_READER_TOKEN": "a", "FASTEN_READER_TOKEN_FILE": "/x"})

        assert "FASTEN_READER_TOKEN_FILE is set too; keep one" in found

    def test_override_takes_the_twin_along(self):
        """An override replaces the variable and its twin."""
        made = settings({"FASTEN_READER_TOKEN_FILE": "/missing"}, reader_token="a")

        assert (Secret("a"),) == made.reader_token

    def test_missing(self):
        """A missing file is a fault that names variable, path and cause."""
        found = fault({"FASTEN_SIGNING_KEY_FILE": "/run/missing"})

        assert (
            "FASTEN_SIGNING_KEY_FILE: cannot read the file /run/missing: No such file"
            in found
        )

    def test_empty(self, tmp_path):
        """So is an empty one, or a folder."""
        (tmp_path / "none").write_text("\n")

        assert "the file is empty" in fault(reader_token_file=tmp_path / "none")
        assert "Is a directory" in fault(reader_token_file=tmp_path)

    def test_not_text(self, tmp_path):
        """So is one that is not text, whose bytes stay out of the message."""
        (tmp_path / "bytes").write_bytes(b"\xff\xfe" + CANARY.encode())
        found = fault(reader_token_file=tmp_path / "bytes")

        assert "not UTF-8 text" in found
        assert CANARY not in found


class TestSigningKeys:
    def revealed(self, **options):
        return [key.reveal() for key in settings(**options).signing_key]

    def test_seeds(self):
        """The base64 of a seed is taken in every spelling of it, several at once."""
        other = base64.urlsafe_b64encode(b"\xff" * 32).decode()
        found = self.revealed(signing_key=f"{SEED}, {other.rstrip('=')}")

        assert [SEED, base64.b64encode(b"\xff" * 32).decode()] == found

    def test_pem_file(self, tmp_path):
        """A path is read: who uses the key needs no file."""
        (tmp_path / "key.pem").write_text(f"{PEM}\n")

        assert [PEM, SEED] == self.revealed(cwd=tmp_path, signing_key=f"key.pem,{SEED}")

    def test_twin_holds_the_key(self, tmp_path):
        """The _FILE twin may hold the PEM text itself."""
        (tmp_path / "key.pem").write_text(f"{PEM}\n")

        assert [PEM] == self.revealed(signing_key_file=tmp_path / "key.pem")

    @pytest.mark.parametrize(
        "text",
        [
            "-----BEGIN ENCRYPTED PRIVATE KEY-----",
            "-----BEGIN PUBLIC KEY-----",
            "hello",
        ],
    )
    def test_no_key(self, tmp_path, text):
        """A file that holds no usable key is a fault, at init."""
        (tmp_path / "key.pem").write_text(text)

        assert "32-byte Ed25519 seed" in fault(signing_key=str(tmp_path / "key.pem"))

    def test_short_seed(self):
        """So is the base64 of too few bytes."""
        found = fault(signing_key=base64.b64encode(b"short").decode())

        assert "FASTEN_SIGNING_KEY" in found


class TestDigest:
    def test_secrets_do_not_count(self):
        """New passwords, tokens and keys are no new settings."""
        first = settings(
            audit_dsn="postgres://u:a@db/app", reader_token="a", signing_key=SEED
        )
        second = settings(audit_dsn="postgres://u:b@db/app", reader_token="b")

        assert first.digest() == second.digest()

    @pytest.mark.parametrize(
        "change",
        [
            {"queue_capacity": 1},
            {"audit_dsn": "sqlite:///a.db"},
            {"stdout": "audit"},
            {"on_full": "block:5"},
            {"audit_retention_override": "long=7y"},
            {"codes": "a.yaml"},
        ],
    )
    def test_all_else_does(self, change):
        """Any other change is one."""
        assert settings().digest() != settings(**change).digest()

    def test_spelling_does_not_count(self):
        """Two spellings of the same settings have one digest."""
        first = settings(retention_grace="24h", stdout="sys,audit")
        second = settings(retention_grace=timedelta(days=1), stdout=["audit", "sys"])

        assert first.digest() == second.digest()

    def test_every_setting_has_a_place_in_it(self):
        """With everything set there still is a digest."""
        made = settings(
            tenant_id="t", sys_dsn="sqlite:///a.db", spool_dir="/s", redact_keys="a,b"
        )

        assert 64 == len(made.digest())


def _file_of_canary(place):
    (place / "canary").write_text(CANARY)
    return str(place / "canary")


# Each builds (environ, overrides) with the canary where a secret can stand.
LEAKS = {
    "white space": lambda p: (
        {"FASTEN_AUDIT_DSN": f"postgres://u:{CANARY} @db/app"},
        {},
    ),
    "line break": lambda p: ({"FASTEN_API_DSN": f"postgres://u:{CANARY}\n@db/app"}, {}),
    "keywords": lambda p: ({"FASTEN_SYS_DSN": f"host=db password={CANARY}"}, {}),
    "no scheme": lambda p: ({"FASTEN_AUDIT_DSN": f"u:{CANARY}@db/app"}, {}),
    "token for DSN": lambda p: ({"FASTEN_AUDIT_DSN": CANARY}, {}),
    "scheme": lambda p: ({"FASTEN_AUDIT_DSN": f"mysql://u:{CANARY}@db/app"}, {}),
    "slash": lambda p: ({"FASTEN_AUDIT_DSN": f"postgres://u:a/{CANARY}@db/app"}, {}),
    "hash": lambda p: ({"FASTEN_AUDIT_DSN": f"postgres://u:a#{CANARY}@db/app"}, {}),
    "question": lambda p: ({"FASTEN_AUDIT_DSN": f"postgres://u:a?{CANARY}@db/app"}, {}),
    "percent": lambda p: ({"FASTEN_AUDIT_DSN": f"postgres://u:%{CANARY}@db/app"}, {}),
    "bracket": lambda p: ({"FASTEN_AUDIT_DSN": f"postgres://u:[{CANARY}@[db/app"}, {}),
    "host forgotten": lambda p: ({"FASTEN_AUDIT_DSN": f"postgres://u:{CANARY}"}, {}),
    "host and more": lambda p: ({"FASTEN_AUDIT_DSN": f"postgres://u:{CANARY}/app"}, {}),
    "bad port": lambda p: ({"FASTEN_AUDIT_DSN": f"postgres://u:{CANARY}@db:x/app"}, {}),
    "bad table": lambda p: (
        {"FASTEN_AUDIT_DSN": f"postgres://u:{CANARY}@db/app?table=a-b"},
        {},
    ),
    "two tables": lambda p: (
        {"FASTEN_AUDIT_DSN": f"postgres://u:{CANARY}@db/app?table=a&table=b"},
        {},
    ),
    "option": lambda p: (
        {"FASTEN_AUDIT_DSN": f"postgres://db/app/?password={CANARY}"},
        {},
    ),
    "ampersand": lambda p: (
        {"FASTEN_AUDIT_DSN": f"postgres://db/app?password=a&{CANARY}&b"},
        {},
    ),
    "ampersand and equals": lambda p: (
        {"FASTEN_AUDIT_DSN": f"postgres://db/app/x?password=a&{CANARY}=b"},
        {},
    ),
    "fragment": lambda p: (
        {"FASTEN_AUDIT_DSN": f"postgres://db/app?password=a#{CANARY}"},
        {},
    ),
    "sqlite": lambda p: ({"FASTEN_AUDIT_DSN": f"sqlite://u:{CANARY}@db/app"}, {}),
    "elsewhere": lambda p: ({"FASTEN_LOG": f"postgres://u:{CANARY}@db/app"}, {}),
    "elsewhere, in Python": lambda p: ({}, {"stdout": f"postgres://u:{CANARY}@db/app"}),
    "outbox": lambda p: ({"FASTEN_OUTBOX_DSN": f"postgres//u:{CANARY}@db/app"}, {}),
    "path for secret": lambda p: (
        {"FASTEN_AUDIT_DSN_FILE": f"pg://u:{CANARY}@db/a"},
        {},
    ),
    "token for path": lambda p: ({"FASTEN_READER_TOKEN_FILE": CANARY}, {}),
    "key for path": lambda p: ({"FASTEN_SIGNING_KEY_FILE": CANARY}, {}),
    "both": lambda p: (
        {"FASTEN_READER_TOKEN": CANARY, "FASTEN_READER_TOKEN_FILE": "/x"},
        {},
    ),
    "token": lambda p: ({"FASTEN_READER_TOKEN": f"{CANARY} x"}, {}),
    "key": lambda p: ({"FASTEN_SIGNING_KEY": CANARY}, {}),
    "key of bytes": lambda p: ({}, {"signing_key": CANARY.encode()}),
    "key in a file": lambda p: ({"FASTEN_SIGNING_KEY": _file_of_canary(p)}, {}),
    "DSN in a file": lambda p: ({"FASTEN_AUDIT_DSN_FILE": _file_of_canary(p)}, {}),
    "types": lambda p: ({}, {"audit_dsn": {"password": CANARY}, "reader_token": [5]}),
    "mapping": lambda p: ({}, {"reader_token": {CANARY: 1}}),
    "innocent": lambda p: (
        {
            "FASTEN_AUDIT_DSN": f"postgres://u:{CANARY}@db/app",
            "FASTEN_READER_TOKEN": CANARY,
            "FASTEN_SIGNING_KEY": SEED,
            "FASTEN_QUEUE_CAPACITY": "ten",
            "FASTEN_SERVICE_ID": "",
        },
        {"api_dsn": f"postgres://u:{CANARY}@db/app"},
    ),
}


def _shown_failure(case, place):
    """
    Return all that a program could print of the failure, locals of frames included.
    """
    try:
        Settings.from_env(*LEAKS[case](place), hostname="h", cwd=place)
    except SettingsError as error:
        lines = traceback.TracebackException.from_exception(error, capture_locals=True)
        return f"{error} {error!r} {error.args} {''.join(lines.format())}"
    pytest.fail("no error")


class TestCanary:
    @pytest.mark.parametrize("case", LEAKS)
    def test_errors(self, case, tmp_path):
        """No secret is in an error, its repr, or a traceback that prints locals."""
        shown = _shown_failure(case, tmp_path)

        assert "FASTEN_" in shown
        assert CANARY not in shown

    def test_parse_dsn(self):
        """The same holds for a DSN given to the command line."""
        try:
            parse_dsn("postgres://u:" + CANARY + "@db:x/app", cwd=CWD)
        except SettingsError as error:
            lines = traceback.TracebackException.from_exception(
                error, capture_locals=True
            )

        assert CANARY not in "".join(lines.format())

    def test_settings(self):
        """No secret is in the repr of settings that are well, nor in a warning."""
        made = settings(
            {"FASTEN_AUDIT_DSN_": f"postgres://u:{CANARY}@db/app"},
            audit_dsn=f"postgres://u:{CANARY}@db/app?password={CANARY}",
            reader_token=CANARY,
            signing_key=SEED,
        )
        shown = f"{made} {made.audit_dsn.display} {made.warnings} {attrs.asdict(made)}"

        assert CANARY not in f"{made} {made.audit_dsn.display} {made.warnings}"
        assert SEED not in repr(made)
        assert "service_id" in shown

    def test_pickles(self):
        """Settings can be sent to a worker process, secrets and all."""
        made = settings(audit_dsn="postgres://u:p@db/app", reader_token="t")

        assert made == pickle.loads(pickle.dumps(made))
