# SPDX-License-Identifier: Apache-2.0
"""
Codes: what a Meta holds, who may register what, and all that a file can get wrong.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from itertools import count
from threading import Event, Thread

import attrs
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import fasten
from fasten import codes
from fasten.codes import (
    OWN_CODES,
    ActorKind,
    Meta,
    Method,
    Outcome,
    Registry,
    RetentionClass,
    Severity,
    entry_for,
    is_code,
)
from fasten.errors import CodeConflict, FastenError, InvalidCodes, UnknownCode
from tests.outside import ROOT


@pytest.fixture
def registry():
    """
    A registry of the test's own.
    """
    return Registry()


@pytest.fixture
def write(tmp_path):
    """
    Write a codes file and return its path.
    """
    numbers = count(1)

    def write_file(text, name=None):
        path = tmp_path / (name or f"{next(numbers)}.codes.yaml")
        path.write_text(textwrap.dedent(text))
        return path

    return write_file


def faults(registry, *paths):
    """
    Return the lines of the error that loading *paths* raises.
    """
    before = registry.entries
    with pytest.raises(InvalidCodes) as caught:
        registry.load(*paths)

    assert before is registry.entries
    return str(caught.value).split("\n  ")


class TestEnums:
    def test_words(self):
        """The enums hold the words of the contract, and are strings."""
        assert "debug info warn error critical" == " ".join(Severity)
        assert "short medium long" == " ".join(RetentionClass)
        assert "user admin service system scheduler agent" == " ".join(ActorKind)
        assert "success failure denied unknown" == " ".join(Outcome)
        assert (
            "http mqtt cli scheduler ui agent_tool sdk task grpc kafka nats amqp"
            == " ".join(Method)
        )

    def test_alias(self):
        """The page's `schedule` is read as `scheduler`; no other word is made up."""
        assert ActorKind.SCHEDULER is ActorKind("schedule")
        with pytest.raises(ValueError, match="robot"):
            ActorKind("robot")


class TestMeta:
    def test_defaults(self):
        """Category and action wait for the code; the rest is the contract's."""
        made = Meta()

        assert (None, None, "info", "", "", "medium", False, "queue", None) == (
            attrs.astuple(made)[:9]
        )

    def test_by_position(self):
        """The order of the arguments is the contract's."""
        made = Meta(
            "auth", "login", "warn", "d", "e", "long", False, "raise", {"a": "int"}
        )

        assert made == Meta(
            category="auth",
            action="login",
            severity=Severity.WARN,
            description="d",
            emitter="e",
            retention_class=RetentionClass.LONG,
            on_failure="raise",
            detail={"a": "int"},
        )

    def test_ellipsis(self):
        """A literal `...` is the default, as the page writes it."""
        assert Meta(retention_class="long") == Meta(..., retention_class="long")
        assert Meta() == Meta(*[...] * 9, domain=..., id=...)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("severity", "warning", "did you mean 'warn'"),
            ("severity", "loud", "write one of debug, info"),
            ("severity", 5, "severity 5 is not"),
            ("severity", ["info"], "severity a list is not"),
            ("retention_class", "forever", "write one of short"),
            ("on_failure", "drop", "write queue or raise"),
            ("action", "Created", "a lower-case word"),
            ("category", "a,b", "letters, digits"),
            ("domain", "", "letters, digits"),
            ("id", "user_created", "as in USER_CREATED"),
            ("description", 5, "put it in quotes"),
            ("emitter", None, "put it in quotes"),
            ("pii_in_detail", "yes", "not true or false"),
            ("detail", ["a"], "not a mapping"),
            ("detail", {"a": "text"}, "write one of str, int"),
            ("detail", {"a": {"type": "int", "maximum": 5}}, "write one of str, int"),
            (
                "detail",
                {"a": {"type": "int", "required": "no"}},
                "write one of str, int",
            ),
            ("detail", {"a": {"type": ["int"]}}, "write one of str, int"),
            ("detail", {5: "int"}, "a field named 5"),
        ],
    )
    def test_bad_values(self, field, value, message):
        """A bad value names its field, itself and the cure."""
        with pytest.raises(InvalidCodes, match=re.escape(message)) as caught:
            Meta(**{field: value})

        assert field in str(caught.value)

    def test_is_a_value(self):
        """Metas are compared by value and cannot be changed."""
        made = Meta(severity="warn")

        assert Meta(severity=Severity.WARN) == made
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            made.severity = Severity.INFO


class TestDetail:
    META = Meta(
        detail={
            "amount": "float",
            "items": {"type": "list"},
            "note": "str?",
            "tax": {"type": "float", "optional": True},
            "paid": {"type": "bool", "required": False},
            "count": {"type": "int", "required": True},
        }
    )

    def test_spellings(self):
        """Every spelling of a field comes down to one."""
        expected = {
            "amount": "float",
            "items": "list",
            "note": "str?",
            "tax": "float?",
            "paid": "bool?",
            "count": "int",
        }

        assert expected == self.META.detail

    @pytest.mark.parametrize(
        "detail",
        [
            {"amount": 1.5, "items": [], "count": 1},
            {"amount": 1, "items": (1, 2), "count": 1, "note": None, "paid": True},
        ],
    )
    def test_fits(self, detail):
        """Optional fields may be missing or None, integers are floats."""
        assert [] == self.META.check_detail(detail)

    def test_misfits(self):
        """Each misfit is a sentence of names and types, never a value."""
        found = self.META.check_detail(
            {"amount": "s3cret", "items": {}, "count": True, "amuont": "s3cret"}
        )
        expected = [
            "amount is a str, not a float",
            "items is a dict, not a list",
            "count is a bool, not a int",
            "'amuont' is no field of it; did you mean 'amount'?",
        ]

        assert expected == found

    def test_missing(self):
        """A missing field and a detail that is no mapping are told apart."""
        assert ["x is missing; give it a int"] == Meta(
            detail={"x": "int"}
        ).check_detail({})
        assert ["detail is a str, not a mapping"] == self.META.check_detail("x")

    def test_undeclared(self):
        """A code that declares nothing takes everything."""
        assert [] == Meta().check_detail({"x": object()})


class TestStandardCatalogue:
    CONTRACT = (
        "AUTH_LOGIN AUTH_LOGOUT AUTH_FAILED USER_CREATED USER_UPDATED USER_DELETED "
        "ROLE_GRANTED ROLE_REVOKED ORDER_PLACED PAYMENT_PROCESSED PAYMENT_COMPLETED "
        "CONFIG_UPDATED PIPELINE_DEPLOYED JOB_COMPLETED BATCH_PROCESSED TRIGGER_FIRED "
        "SENSOR_UPDATED SETPOINT_REQUESTED DEVICE_SETPOINT_UPDATED TOOL_CALLED "
        "RETENTION_SWEEP_RAN AUDIT_STARTED AUDIT_READ AUDIT_ROW_ERASED "
        "AUDIT_ROWS_DROPPED AUDIT_ROW_QUARANTINED AUDIT_SELF_TEST CHAIN_RESTORED "
        "RETENTION_POLICY_CHANGED"
    )

    def test_holds_the_contract(self, registry):
        """Every code of the contract is there without registering anything."""
        registry.ensure()

        assert set(self.CONTRACT.split()) <= registry.entries.keys()

    def test_dump(self, registry):
        """`fasten dump` prints what the page shows, sorted."""
        lines = registry.dump()

        assert sorted(lines) == lines
        assert {
            "AUTH_LOGIN,user,info",
            "ORDER_PLACED,commerce,info",
            "PAYMENT_PROCESSED,commerce,info",
            "USER_CREATED,user,info",
            "RETENTION_SWEEP_RAN,ops,info",
        } <= set(lines)

    @pytest.mark.parametrize(
        ("code", "expected"),
        [
            ("TRIGGER_FIRED", "short"),
            ("BATCH_PROCESSED", "short"),
            ("CONFIG_UPDATED", "medium"),
            ("JOB_COMPLETED", "medium"),
            ("AUTH_LOGIN", "long"),
            ("PAYMENT_COMPLETED", "long"),
        ],
    )
    def test_retention(self, registry, code, expected):
        """Classes are as on the page."""
        assert expected == registry.meta(code).retention_class

    def test_own_codes(self, registry):
        """The codes of domain fasten are exactly those closed to callers."""
        registry.ensure()
        reserved = {code for code, entry in registry.entries.items() if entry.reserved}

        assert OWN_CODES == reserved
        assert {"long"} == {registry.entries[c].retention_class for c in reserved}

    def test_is_described(self, registry):
        """Every code says what it means."""
        registry.ensure()

        assert [] == [c for c in registry.entries if not registry.meta(c).description]

    def test_missing(self, tmp_path):
        """A broken installation is an error that names the file."""
        with pytest.raises(InvalidCodes, match=r"nowhere\.yaml: cannot be read"):
            Registry(tmp_path / "nowhere.yaml").ensure()

    def test_import_reads_nothing(self):
        """Importing and registering load neither YAML nor cattrs."""
        script = (
            "import sys; from fasten.codes import Meta, register;"
            "register('x', {'X_DONE': Meta()});"
            "print(sorted({'yaml', 'cattrs'} & set(sys.modules)))"
        )
        made = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )

        assert "[]" == made.stdout.strip()


class TestEntries:
    def test_plain_strings(self, registry):
        """What the hot path reads are plain strings, and most of them joined."""
        registry.register("shop", {"CART_EMPTIED": Meta(severity="warn")})
        entry = registry.entries["CART_EMPTIED"]

        assert (
            "CART_EMPTIED",
            "emptied",
            "warn",
            "shop",
            "shop",
            "medium",
            "queue",
            False,
            "CART_EMPTIED\0emptied\0warn\0shop\0shop\0medium",
            False,
        ) == entry
        assert {str, bool} == {type(value) for value in entry}

    def test_entry_for(self):
        """A code that nobody registered has an entry all the same, if asked for."""
        entry = entry_for("THING_HAPPENED")

        assert ("happened", "unregistered") == (entry.action, entry.domain)

    @pytest.mark.parametrize(
        ("code", "action"),
        [("LOGIN", "login"), ("USER_CREATED", "created"), ("A_B_", "b"), ("V_2", "2")],
    )
    def test_action(self, code, action):
        """The action is the code's last word."""
        assert action == entry_for(code).action

    @pytest.mark.parametrize("text", ["A", "A1", "USER_CREATED", "X_"])
    def test_is_code(self, text):
        """Capitals, digits and underscores, a capital first."""
        assert is_code(text)

    @pytest.mark.parametrize(
        "text", ["", "a", "1A", "_A", "A-B", "A B", "A\n", "É", "A" * 129]
    )
    def test_is_no_code(self, text):
        """Nothing else."""
        assert not is_code(text)


class TestRegister:
    def test_the_page(self, registry):
        """The page's snippet runs; PII forces short, with one warning for it."""
        with pytest.warns(UserWarning, match="AUTH_FAILED: pii_in_detail") as caught:
            registry.register(
                "user",
                {
                    "AUTH_LOGIN": Meta(..., retention_class="long"),
                    "AUTH_FAILED": Meta(
                        ..., retention_class="long", pii_in_detail=True
                    ),
                },
            )

        assert 1 == len(caught)
        assert __file__ == caught[0].filename
        assert "long" == registry.meta("AUTH_LOGIN").retention_class
        assert "short" == registry.meta("AUTH_FAILED").retention_class
        assert "short" == registry.entries["AUTH_FAILED"].retention_class

    def test_warns_once(self, registry):
        """The same code is warned of once; who asks for short is not warned at all."""
        twice = {"A_B": Meta(pii_in_detail=True)}
        with pytest.warns(UserWarning, match="A_B"):
            registry.register("x", twice)
        registry.register("x", twice)
        registry.register(
            "x", {"C_D": Meta(pii_in_detail=True, retention_class="short")}
        )

        assert "short" == registry.meta("C_D").retention_class

    def test_own_definition_wins(self, registry):
        """A user's definition wins over the standard one, read before or after."""
        registry.register("accounts", {"USER_CREATED": Meta(severity="warn")})
        registry.ensure()
        registry.register("accounts", {"USER_DELETED": Meta(severity="warn")})

        assert "accounts" == registry.entries["USER_CREATED"].domain
        assert "accounts" == registry.entries["USER_DELETED"].domain
        assert "user" == registry.entries["USER_UPDATED"].domain

    def test_same_again(self, registry):
        """Registering the same again changes nothing, not even the dictionary."""
        registry.register("x", {"A_B": Meta()})
        before = registry.entries
        registry.register("x", {"A_B": Meta(severity=Severity.INFO)})

        assert before is registry.entries

    def test_conflict(self, registry):
        """Two definitions that differ conflict; nothing of the second call stays."""
        registry.register("x", {"A_B": Meta()})
        with pytest.raises(CodeConflict, match="A_B is defined otherwise by register"):
            registry.register("x", {"C_D": Meta(), "A_B": Meta(severity="warn")})

        assert {"A_B"} == registry.entries.keys()
        assert "info" == registry.entries["A_B"].severity

    @pytest.mark.parametrize("code", sorted(OWN_CODES))
    def test_own_codes_are_closed(self, registry, code):
        """Nobody else registers fasten's own codes, under whatever domain."""
        with pytest.raises(CodeConflict, match=f"{code}' is fasten's own"):
            registry.register("x", {code: Meta()})

    @pytest.mark.parametrize("domain", ["fasten", "Fasten"])
    def test_own_domain_is_closed(self, registry, domain):
        """Nor any code under its domain."""
        with pytest.raises(CodeConflict, match="fasten's own"):
            registry.register(domain, {"A_B": Meta()})

    def test_sweeps_are_open(self, registry):
        """RETENTION_SWEEP_RAN is everybody's, as the page emits it."""
        registry.register("cron", {"RETENTION_SWEEP_RAN": Meta()})

        assert not registry.entries["RETENTION_SWEEP_RAN"].reserved

    def test_all_mistakes(self, registry):
        """One error lists all mistakes of a call."""
        with pytest.raises(InvalidCodes) as caught:
            registry.register(
                "shop",
                {
                    "user_created": Meta(),
                    "A_B": Meta(id="A_C"),
                    "C_D": Meta(domain="other"),
                    "E_F": {"severity": "info"},
                    5: Meta(),
                },
            )
        found = str(caught.value)

        assert found.startswith("5 mistakes in codes:")
        assert "'user_created' is not a code" in found
        assert "as in USER_CREATED" in found
        assert "A_B has id 'A_C'" in found
        assert "C_D has domain 'other' but stands under 'shop'" in found
        assert "'E_F' is a dict; give it a Meta" in found
        assert "5 is not a code" in found
        assert {} == registry.entries

    @pytest.mark.parametrize("domain", ["", "a b", "a,b", "a\0b", None, 5])
    def test_bad_domain(self, registry, domain):
        """A domain that would not survive `fasten dump` is refused."""
        with pytest.raises(InvalidCodes, match="is not a domain"):
            registry.register(domain, {"A_B": Meta()})

    def test_same_id_and_domain(self, registry):
        """Domain and id may be repeated in the Meta."""
        registry.register("x", {"A_B": Meta(domain="x", id="A_B")})

        assert ("x", "A_B") == (registry.meta("A_B").domain, registry.meta("A_B").id)

    def test_while_emitting(self, registry):
        """Who reads while others register sees whole dictionaries; nothing is lost."""
        registry.ensure()
        is_done, torn = Event(), []

        def read():
            while not is_done.is_set():
                seen = registry.entries
                size = len(seen)
                torn.extend(1 for _ in range(50) if len(seen) != size)
                torn.extend(1 for code in seen if code != seen[code].code)

        def register(name):
            for i in range(25):
                registry.register(f"d{name}", {f"T{name}_{i}": Meta()})

        writers = [Thread(target=register, args=(n,)) for n in range(4)]
        reader = Thread(target=read)
        for thread in (reader, *writers):
            thread.start()
        for thread in writers:
            thread.join(30)
        is_done.set()
        reader.join(30)

        assert [] == torn
        assert 100 == sum(code.startswith("T") for code in registry.entries) - 2


class TestUnknown:
    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("USER_CREATD", "unknown code 'USER_CREATD'; did you mean 'USER_CREATED'?"),
            ("user_created", "did you mean 'USER_CREATED'?"),
            ("userCreated", "did you mean 'USER_CREATED'?"),
            (
                "QQQ_ZZZ",
                "register it: fasten.codes.register(domain, {'QQQ_ZZZ': Meta()})",
            ),
            ("x" * 5_000, "..."),
            (None, "no code"),
            (b"USER_CREATED", "a bytes is no code"),
        ],
    )
    def test_message(self, registry, code, message):
        """The error names the nearest code, or how to register it."""
        error = registry.unknown(code)

        assert isinstance(error, UnknownCode)
        assert isinstance(error, LookupError)
        assert message in str(error)
        assert len(str(error)) < 300

    @pytest.mark.parametrize("code", ["NOPE_NOPE", None, ["A"]])
    def test_meta(self, registry, code):
        """Asking for the Meta of an unknown code raises it."""
        with pytest.raises(UnknownCode):
            registry.meta(code)


ONE = """
    domain: shop
    codes:
      CART_FILLED: {severity: debug}
      CART_EMPTIED:
    """
MANY = """
    domains:
      shop:
        CART_FILLED: {severity: debug}
        CART_EMPTIED: {}
    """


class TestFiles:
    @pytest.mark.parametrize("text", [ONE, MANY])
    def test_spellings(self, registry, write, text):
        """Both spellings say the same."""
        registry.load(write(text))

        assert "debug" == registry.entries["CART_FILLED"].severity
        assert ("shop", "emptied") == (
            registry.entries["CART_EMPTIED"].domain,
            registry.entries["CART_EMPTIED"].action,
        )

    def test_all_keys(self, registry, write):
        """Every key of Meta may stand in a file."""
        path = write(
            """
            domains:
              shop:
                CART_FILLED:
                  id: CART_FILLED
                  domain: shop
                  category: carts
                  action: fill
                  severity: warn
                  description: A cart has something in it.
                  emitter: web
                  retention_class: short
                  pii_in_detail: true
                  on_failure: raise
                  detail:
                    items: int
                    note: str?
                    total: {type: float, required: false}
            """
        )
        registry.load(str(path))
        expected = Meta(
            "carts",
            "fill",
            "warn",
            "A cart has something in it.",
            "web",
            "short",
            True,
            "raise",
            {"items": "int", "note": "str?", "total": "float?"},
            domain="shop",
            id="CART_FILLED",
        )

        assert expected == registry.meta("CART_FILLED")

    def test_wins_over_the_standard(self, registry, write):
        """A file's definition wins over the standard one."""
        registry.ensure()
        registry.load(write("domains: {accounts: {USER_CREATED: {severity: warn}}}"))

        assert "accounts" == registry.meta("USER_CREATED").domain

    def test_pii(self, registry, write):
        """PII in a file forces short with one warning, not repeated by reloading."""
        path = write(
            "domains: {x: {A_B: {pii_in_detail: true, retention_class: long}}}"
        )
        with pytest.warns(UserWarning, match="A_B") as caught:
            registry.load(path)
        registry.reload()

        assert __file__ == caught[0].filename
        assert "short" == registry.entries["A_B"].retention_class

    def test_merge_keys(self, registry, write):
        """YAML's own merging works; what it brings in is no duplicate."""
        registry.load(
            write(
                """
                domain: shop
                codes:
                  CART_FILLED: &usual {severity: warn, retention_class: long}
                  CART_EMPTIED: {<<: *usual, severity: error}
                  CART_SOLD: {<<: [{severity: debug}, *usual]}
                """
            )
        )
        found = {
            code: (entry.severity, entry.retention_class)
            for code, entry in registry.entries.items()
        }

        assert {
            "CART_FILLED": ("warn", "long"),
            "CART_EMPTIED": ("error", "long"),
            "CART_SOLD": ("debug", "long"),
        } == found

    def test_all_mistakes_of_all_files(self, registry, write):
        """One error lists every mistake of every file, with file, line and cure."""
        first = write(
            """\
            domain: shop
            codes:
              CART_FILLED: {severityy: warn, severity: loud, pii_in_detail: "yes"}
              cart_emptied: {}
              CART_SOLD: {severity: info, severity: warn}
              CART_LOST: {}
              CART_LOST: {severity: warn}
            """
        )
        second = write(
            """\
            domains:
              shop:
                CART_SOLD: {severity: error}
              other: {AUDIT_READ: {}}
            extra: 1
            """
        )
        found = faults(registry, first, second, "/nowhere.codes.yaml")
        expected = [
            "10 mistakes in codes:",
            f"{first}:3: CART_FILLED: unknown key 'severityy'; did you mean 'sever",
            f"{first}:3: CART_FILLED: severity 'loud' is not one of",
            f"{first}:3: CART_FILLED: pii_in_detail 'yes' is not true or false",
            f"{first}:4: 'cart_emptied' is not a code; write capitals",
            f"{first}:5: 'severity' stands twice, first in line 5",
            f"{first}:7: 'CART_LOST' stands twice, first in line 6",
            f"{second}:5: unknown key 'extra'",
            f"{second}:4: 'AUDIT_READ' is fasten's own",
            "/nowhere.codes.yaml: cannot be read: No such file or directory",
            f"{second}:3: CART_SOLD is defined otherwise by {first}:5",
        ]

        missing = [e for e in expected if not any(f.startswith(e) for f in found)]
        assert ([], len(expected)) == (missing, len(found))

    def test_conflict_is_both_errors(self, registry, write):
        """A conflict between files may be caught as what it is."""
        one, two = write(ONE), write("domains: {shop: {CART_FILLED: {severity: warn}}}")
        with pytest.raises(CodeConflict) as caught:
            registry.load(one, two)

        assert isinstance(caught.value, InvalidCodes)
        assert isinstance(caught.value, FastenError)

    def test_conflict_with_a_call(self, registry, write):
        """A file and a call that differ are a conflict as well."""
        registry.register("shop", {"CART_FILLED": Meta()})
        with pytest.raises(CodeConflict, match=r"otherwise by register\('shop'\)"):
            registry.load(write(ONE))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "the file is empty"),
            ("# nothing\n", "the file is empty"),
            ("[A_B]", "the file is not a mapping"),
            ("A_B", "the file is not a mapping"),
            ("domain: x", "domain and codes belong together"),
            ("codes: {A_B: {}}", "domain and codes belong together"),
            ("{}", "domain and codes belong together"),
            ("domains: [x]", "domains is not a mapping"),
            ("domains: {x: [A_B]}", "the codes of x are not a mapping"),
            ("domains: {x: }", "the codes of x are not a mapping"),
            ("domain: {x: 1}\ncodes: {A_B: {}}", "is not a domain"),
            ("domain: 5\ncodes: {A_B: {}}", "5 is not a domain"),
            ("domains: {a b: {A_B: {}}}", "'a b' is not a domain"),
            ("domains: {fasten: {A_B: {}}}", "fasten's own"),
            ("domains: {x: {A_B: [1]}}", "A_B is not a mapping"),
            ("domains: {x: {A_B: text}}", "A_B is not a mapping"),
            ("domains: {x: {ON: {}}}", "the key True is not text; put it in quotes"),
            ("domains: {x: {? [a] : {}}}", "the key a list is not text"),
            ("domains: {x: {A_B: {action: 5}}}", "action 5 is not usable"),
            ("domains: {x: {A_B: {description: 5}}}", "description 5 is not text"),
            ("domains: {x: {A_B: {severity: }}}", "severity None is not"),
            ("domains: {x: {A_B: {severity: 2026-99-99}}}", "cannot be read as"),
            (
                "domains: {x: {A_B: {severity: !!python/name:os.system x}}}",
                "cannot be read",
            ),
            ("domains: {x: {A_B: !!python/object:os.X {}}}", "A_B is not a mapping"),
            ("domains: {x: {A_B: {detail: !!set {a}}}}", "is not allowed"),
            ("domains: {x: {A_B: {detail: {<<: 5}}}}", "<< takes a mapping"),
            ("domains: {x: {A_B: {id: A_C}}}", "A_B has id 'A_C'"),
            ("domains: {x: {A_B: {domain: y}}}", "but stands under 'x'"),
            ("domains: {x: {A_B: {}}, y: {A_B: {}}}", "defined twice, first in line 1"),
            ("domain: [\n", "broken YAML"),
            ("a: b: c", "1: broken YAML: mapping values are not allowed here"),
            ("domain: x\n\tcodes: y", "2: broken YAML"),
            ("domain: x\n---\ndomain: y\n", "broken YAML"),
            ("domain: *x", "broken YAML"),
            ("domain: \x07", "not YAML"),
            ("x: " + "[" * 5_000, "beyond measure"),
            ("&a [*a]", "the file is not a mapping"),
            ("domains: {x: {A_B: {detail: &a {b: *a}}}}", "beyond measure"),
            ("domains: {x: &a {<<: *a}}", "beyond measure"),
        ],
    )
    def test_mistakes(self, registry, write, text, message):
        """Each mistake has its sentence; the file is named and nothing is taken."""
        path = write("")
        path.write_text(text)
        found = faults(registry, path)

        assert any(message in line for line in found)
        assert all(
            str(path) in line for line in found if "mistakes in codes" not in line
        )

    def test_bombs(self, registry, write):
        """Aliases that stand for billions are refused at once, merged or not."""
        lists = "\n".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]" for i in range(40))
        merges = "\n".join(
            f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}" for i in range(40)
        )
        one = write(f"a0: &a0 x\n{lists}\ndomains: {{x: {{A_B: {{detail: *a40}}}}}}")
        two = write(f"a0: &a0 {{x: y}}\n{merges}\ndomains: {{x: {{A_B: *a40}}}}")
        found = faults(registry, one, two)

        assert 2 == sum("beyond measure" in line for line in found)

    def test_long_error(self, registry, write):
        """An error of thousands of mistakes stays readable."""
        path = write("\n".join(f"a{i}: x" for i in range(1_500)))

        assert "and 501 more" == faults(registry, path)[-1]

    def test_not_text(self, registry, tmp_path):
        """Bytes that are no text are a mistake, not a traceback."""
        path = tmp_path / "x.codes.yaml"
        path.write_bytes(b"\xff\xfe\x00\xd8domain: x")

        assert ["not YAML" in line for line in faults(registry, path)] == [True]

    def test_too_large(self, registry, write):
        """A file of more than a megabyte is none of codes."""
        assert "more than 1 MiB" in faults(registry, write("#" * 1_100_000))[0]

    def test_not_a_file(self, registry, tmp_path):
        """Neither is a folder."""
        assert "not a regular file" in faults(registry, tmp_path)[0]

    JSON = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "domain",
                        "codes",
                        "domains",
                        "A_B",
                        "severity",
                        "detail",
                        "id",
                        "<<",
                    ]
                )
                | st.text(max_size=4),
                inner,
                max_size=3,
            )
        ),
        max_leaves=12,
    )

    @given(JSON)
    def test_total(self, tmp_path_factory, content):
        """Whatever YAML says, it is read or it is InvalidCodes."""
        registry = Registry()
        path = tmp_path_factory.mktemp("codes") / "x.codes.yaml"
        path.write_text(yaml.safe_dump(content))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                registry.load(path)
        except InvalidCodes as error:
            assert str(path) in str(error)  # noqa: PT017
            return

        assert all(is_code(code) for code in registry.entries)


class TestReload:
    def test_takes_changes(self, registry, write):
        """Reloading takes what changed, what is new and what is gone."""
        path = write(ONE)
        registry.load(path)
        path.write_text(
            "domains: {shop: {CART_FILLED: {severity: warn}, CART_SOLD: {}}}"
        )
        registry.reload()

        assert {"CART_FILLED", "CART_SOLD"} == registry.entries.keys()
        assert "warn" == registry.entries["CART_FILLED"].severity

    def test_all_or_nothing(self, registry, write):
        """One broken file leaves every code as it was."""
        one, two = write(ONE), write("domains: {x: {A_B: {}}}")
        registry.load(one, two)
        before = registry.entries
        one.write_text("domains: {shop: {CART_SOLD: {}}}")
        two.write_text("domains: {x: {a_b: {}}}")
        with pytest.raises(InvalidCodes):
            registry.reload()

        assert before is registry.entries

    def test_loading_again(self, registry, write):
        """Loading a file again is reloading it, not a conflict with itself."""
        path = write(ONE)
        registry.load(path)
        path.write_text("domains: {shop: {CART_FILLED: {severity: warn}}}")
        registry.load(path)

        assert "warn" == registry.entries["CART_FILLED"].severity

    def test_keeps_calls(self, registry, write):
        """What was registered by a call stays."""
        registry.register("x", {"A_B": Meta()})
        registry.load(write(ONE))
        registry.reload()

        assert {"A_B", "CART_FILLED", "CART_EMPTIED"} == registry.entries.keys()


class TestConfigure:
    def test_replaces_earlier_settings(self, registry, write):
        """The next settings' files replace those of the last, conflicts or not."""
        one, two = write(ONE), write("domains: {shop: {CART_FILLED: {severity: warn}}}")
        registry.configure([str(one)])
        registry.configure([str(two)])

        assert {"CART_FILLED"} == registry.entries.keys()
        assert "warn" == registry.entries["CART_FILLED"].severity

    def test_keeps_loaded(self, registry, write):
        """Files given to load stay, also where the settings name them too."""
        one, two = write(ONE), write("domains: {x: {A_B: {}}}")
        registry.load(one)
        registry.configure([str(one), str(two)])
        registry.configure([])

        assert {"CART_FILLED", "CART_EMPTIED"} == registry.entries.keys()

    def test_broken(self, registry, write):
        """A broken file leaves the earlier settings' codes."""
        registry.configure([str(write(ONE))])
        with pytest.raises(InvalidCodes):
            registry.configure([str(write("domain: x"))])

        assert {"CART_FILLED", "CART_EMPTIED"} == registry.entries.keys()


class TestDiscover:
    def test_finds(self, registry, write, tmp_path):
        """codes.yaml comes first, then *.codes.yaml by name; folders are none."""
        expected = [write(ONE, name) for name in ("codes.yaml", "a.codes.yaml")]
        expected.append(write(ONE, "b.codes.yaml"))
        write(ONE, "codes.yml")
        (tmp_path / "c.codes.yaml").mkdir()

        assert tuple(map(str, expected)) == registry.discover(tmp_path)

    def test_not_the_standard_catalogue(self, registry, tmp_path):
        """Neither the standard catalogue nor a copy is taken for a user's file."""
        shutil.copy(ROOT / "codes.yaml", tmp_path / "codes.yaml")
        registry.load(tmp_path / "codes.yaml")

        assert () == registry.discover(tmp_path) == registry.discover(ROOT)
        assert {} == registry.entries

    def test_nothing(self, registry, tmp_path):
        """An empty or missing folder has none."""
        assert () == registry.discover(tmp_path) == registry.discover(tmp_path / "no")


class TestDefaultRegistry:
    def test_functions_are_bound(self):
        """The module's functions are those of the default registry."""
        for name in ("register", "load", "reload", "dump", "meta", "discover"):
            assert getattr(codes.registry, name) == getattr(codes, name)

    def test_from_the_package(self):
        """They are reached as `fasten.codes.…`, as the page does."""
        assert "created" == fasten.codes.meta("USER_CREATED").action
