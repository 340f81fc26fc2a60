# SPDX-License-Identifier: Apache-2.0
"""
`dump`, `codes check` and `codes typegen`: the codes of all languages stay in step.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fasten
from fasten.cli.consistency import changes, literal_codes, sources
from fasten.cli.typegen import LANGUAGES, generate
from fasten.codes import Meta, Registry, registry
from fasten.errors import InvalidAnchor
from fasten.testing import capture
from tests.cli_runs import run, run_program, write
from tests.outside import ROOT, run_python

SHOP = """
domain: shop
codes:
  CART_FILLED:
    description: Somebody put something into a cart.
    retention_class: long
    severity: warn
    on_failure: raise
    detail: {items: int, note: 'str?', total: float}
  CART_EMPTIED: {}
"""


@pytest.fixture(autouse=True)
def _codes_stay_here(monkeypatch):
    """
    What a test registers is gone after it.
    """
    registry.ensure()
    for name in ("_sources", "_metas", "entries", "_warned"):
        monkeypatch.setattr(
            registry, name, type(getattr(registry, name))(getattr(registry, name))
        )


class TestDump:
    def test_the_page_s_format(self):
        """
        `fasten dump` is `id,domain,severity`, sorted, and nothing else.
        """
        done = run("dump")
        lines = done.stdout.splitlines()

        assert (0, "") == (done.exit_code, done.stderr)
        assert lines == sorted(lines)
        assert {
            "AUTH_LOGIN,user,info",
            "ORDER_PLACED,commerce,info",
            "PAYMENT_PROCESSED,commerce,info",
            "USER_CREATED,user,info",
        } <= set(lines)
        assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*,[\w.-]+,[a-z]+", x) for x in lines)

    def test_files_of_the_directory_and_of_the_environment(self, tmp_path):
        """
        Codes files of the working directory count, unless FASTEN_CODES names others.
        """
        write(tmp_path / "shop.codes.yaml", SHOP)
        write(tmp_path / "other.yaml", "domain: other\ncodes: {OTHER_DONE: {}}\n")
        here = run_program("dump").stdout
        named = run_program("dump", env={"FASTEN_CODES": "other.yaml"}).stdout

        assert "CART_FILLED,shop,warn\n" in here
        assert "CART_FILLED" not in named
        assert "OTHER_DONE,other,info\n" in named

    def test_codes_that_an_application_registers(self, tmp_path):
        """
        `--app` sees what code registers, without opening the application's store.
        """
        write(
            tmp_path / "webshop.py",
            """
            import fasten
            from fasten.codes import Meta
            fasten.codes.register("shop", {"CART_FILLED": Meta()})
            fasten.init(service_id="shop", audit_dsn="sqlite:///./audit.db")
            print("noise")
            app = None
            """.replace("\n            ", "\n"),
        )
        done = run_program("dump", "--app", "webshop:app")

        assert 0 == done.returncode, done.stderr
        assert "CART_FILLED,shop,info\n" in done.stdout
        assert "noise" not in done.stdout
        assert not (tmp_path / "audit.db").exists()

    def test_a_broken_file_is_a_finding(self, tmp_path):
        """
        Every mistake is told, and nothing is printed.
        """
        write(tmp_path / "codes.yaml", "domain: shop\ncodes: {lower: {}, X: {a: 1}}\n")
        done = run("dump")

        assert (1, "") == (done.exit_code, done.stdout)
        assert "'lower' is not a code" in done.stderr
        assert "unknown key 'a'" in done.stderr

    def test_a_warning_is_one_line(self, tmp_path):
        """
        What PII does to a class is said on stderr, not as a Python warning.
        """
        write(
            tmp_path / "codes.yaml",
            "domain: shop\n"
            "codes: {X_Y: {pii_in_detail: true, retention_class: long}}\n",
        )
        done = run_program("dump")

        assert 0 == done.returncode
        assert done.stderr.startswith("warning: X_Y: pii_in_detail forces")


class TestCheckFiles:
    @pytest.mark.parametrize(
        ("before", "after", "said"),
        [
            ("CART_EMPTIED: {}", "", "removed   CART_EMPTIED"),
            ("severity: warn", "severity: info", "severity: warn -> info"),
            ("class: long", "class: short", "retention_class: long -> short"),
            ("on_failure: raise", "on_failure: queue", "on_failure: raise -> queue"),
            ("domain: shop", "domain: web", "domain: shop -> web"),
            ("items: int, ", "", "detail.items: int -> removed"),
            ("items: int", "items: str", "detail.items: int -> str"),
            ("total: float", "total: int", "detail.total: float -> int"),
            ("items: int", "items: 'int?'", "detail.items: int -> int?"),
            ("note: 'str?'", "note: str", "detail.note: str? -> str"),
            ("items: int", "items: int, more: str", "detail.more: absent -> requ"),
            ("CART_EMPTIED: {}", "CART_EMPTIED: {detail: {a: int}}", "anything -> d"),
        ],
    )
    def test_what_somebody_relies_on_may_not_go(self, tmp_path, before, after, said):
        """
        A removed code, and metadata that promise less, are findings.
        """
        old = write(tmp_path / "old.yaml", SHOP)
        new = write(tmp_path / "new.yaml", SHOP.replace(before, after))
        done = run("codes", "check", str(old), str(new))

        assert 1 == done.exit_code
        assert said in done.stdout
        assert "promise less" in done.stderr

    @pytest.mark.parametrize(
        ("before", "after", "said"),
        [
            ("severity: warn", "severity: error", ""),
            ("items: int", "items: float", ""),
            ("items: int", "items: int, more: 'str?'", ""),
            ("description: Somebody", "description: Nobody", ""),
            ("CART_EMPTIED: {}", "CART_EMPTIED: {on_failure: raise}", ""),
            ("  CART_EMPTIED: {}", "  CART_EMPTIED: {}\n  NEW_ONE: {}", "added     NE"),
        ],
    )
    def test_more_is_welcome(self, tmp_path, before, after, said):
        """
        New codes, optional fields and stronger promises pass.
        """
        old = write(tmp_path / "old.yaml", SHOP)
        new = write(tmp_path / "new.yaml", SHOP.replace(before, after))
        done = run("codes", "check", str(old), str(new))

        assert (0, "") == (done.exit_code, done.stderr)
        assert said in done.stdout
        assert bool(said) == bool(done.stdout)

    def test_dumps_of_other_languages(self, tmp_path):
        """
        What `dump` printed, in any language, can stand on either side.
        """
        yaml = write(tmp_path / "new.yaml", SHOP)
        dump = write(
            tmp_path / "go.csv",
            "# from the Go service\nCART_FILLED,shop,error\nCART_GONE,shop,info\n",
        )
        done = run("codes", "check", str(dump), str(yaml), "--json")
        told = {change["code"]: change for change in json.loads(done.stdout)}

        assert 1 == done.exit_code
        assert "removed" == told["CART_GONE"]["kind"]
        assert "severity: error -> warn" == told["CART_FILLED"]["what"]
        assert "added" == told["USER_CREATED"]["kind"]

    def test_a_dump_agrees_with_itself(self, tmp_path):
        """
        Python's own dump compared with itself has nothing to say.
        """
        dump = write(tmp_path / "a.csv", run("dump").stdout)

        assert (0, "") == (
            run("codes", "check", str(dump), str(dump)).exit_code,
            run("codes", "check", str(dump), str(dump)).output,
        )

    @pytest.mark.parametrize(
        ("words", "code", "said"),
        [
            ([], 2, "give two files, OLD and NEW, or --app"),
            (["one"], 2, "give two files"),
            (["nowhere", "nowhere"], 2, "cannot read nowhere"),
            (["a.yaml", "a.yaml", "--source", "."], 2, "not both"),
            (["broken.yaml", "a.yaml"], 1, "broken.yaml:2"),
        ],
    )
    def test_wrong_words_are_told(self, tmp_path, words, code, said):
        """
        What cannot be compared is not taken for agreement.
        """
        write(tmp_path / "a.yaml", SHOP)
        write(tmp_path / "broken.yaml", "domain: shop\ncodes: {lower: {}}\n")
        done = run("codes", "check", *words)

        assert code == done.exit_code
        assert said in done.stderr

    @given(st.permutations(["CART_A", "CART_B", "CART_C"]))
    def test_order_does_not_matter(self, names):
        """
        The order of codes in a file is no difference.
        """
        known = {name: {"domain": "shop", "severity": "info"} for name in names}

        assert [] == changes(known, dict(sorted(known.items())))


PROGRAM = '''
import fasten
import fasten as f
from fasten import emit, aemit as later
from fasten.shim import scheduler
from fasten.shim.scheduler import instrument
from other import emit as theirs, Emitter

fasten.emit(code="USER_CREATD", target="u")
f.emit("SECOND_ONE", "u")
emit("THIRD_ONE", "u")
emit("USER_CREATED", "u")
name = "USER" + "_X"
emit(name, "u")
theirs("NOT_OURS", "u")
Emitter().emit("NOT_OURS_EITHER")
engine = fasten.init()
engine.emit("FOURTH_ONE", "u")


async def main():
    await later("FIFTH_ONE", "u")


@scheduler.instrument(code="SIXTH_ONE")
def job():
    """Says fasten.emit("NOT_CODE", 1)."""


@instrument(code="SEVENTH_ONE")
def other():
    pass
'''


class TestCheckSource:
    def test_literal_codes_of_a_file(self, tmp_path):
        """
        Only what goes to fasten counts: its emit, whatever it is called, and shims.
        """
        path = write(tmp_path / "program.py", PROGRAM)

        assert [
            "USER_CREATD",
            "SECOND_ONE",
            "THIRD_ONE",
            "USER_CREATED",
            "FOURTH_ONE",
            "FIFTH_ONE",
            "SIXTH_ONE",
            "SEVENTH_ONE",
        ] == [x.code for x in sorted(literal_codes(path), key=lambda x: x.line)]

    def test_codes_that_nothing_registers(self, tmp_path):
        """
        `codes check --app` names file, line and the nearest code.
        """
        package = tmp_path / "webshop_a"
        (package / "deep").mkdir(parents=True)
        (package / "tests").mkdir()
        write(package / "__init__.py", "")
        write(package / "web.py", "app = None\n")
        write(
            package / "deep" / "jobs.py",
            'import fasten\n\nfasten.emit("USER_CREATD", "u")\n'
            'fasten.emit("CART_FILLED", "u")\n',
        )
        write(package / "tests" / "x.py", 'import fasten\nfasten.emit("NOPE", "u")\n')
        write(package / "broken.py", "def\n")
        write(tmp_path / "shop.codes.yaml", SHOP)
        done = run("codes", "check", "--app", "webshop_a.web:app")

        assert 1 == done.exit_code
        said = "unknown code 'USER_CREATD'; did you mean 'USER_CREATED'?"
        assert f"{package}/deep/jobs.py:3: {said}\n" == done.stdout
        assert "broken.py:1: cannot be read as Python" in done.stderr

    def test_a_clean_program(self, tmp_path):
        """
        Registered codes only: exit 0 and silence.
        """
        write(
            tmp_path / "cleanshop.py",
            "import fasten\nfrom fasten.codes import Meta\n"
            'fasten.codes.register("shop", {"CART_FULL": Meta()})\n'
            'def work():\n    fasten.emit("CART_FULL", "c")\napp = work\n',
        )
        done = run("codes", "check", "--app", "cleanshop", "--source", "cleanshop.py")

        assert (0, "") == (done.exit_code, done.output)

    def test_json(self, tmp_path):
        """
        Programs get path, line and code.
        """
        write(tmp_path / "x.py", 'from fasten import emit\nemit("NO_SUCH", "u")\n')
        done = run("codes", "check", "--source", "x.py", "--json")

        assert [("x.py", 2, "NO_SUCH")] == [
            (told["path"], told["line"], told["code"])
            for told in json.loads(done.stdout)
        ]

    def test_other_people_s_code_is_not_read(self, tmp_path):
        """
        Virtual environments, hidden folders and tests are left out.
        """
        for name in (".hidden", "venv", "node_modules", "tests", "src"):
            (tmp_path / name).mkdir()
            write(tmp_path / name / "a.py", "")
        write(tmp_path / "venv" / "pyvenv.cfg", "")
        write(tmp_path / "test_a.py", "")

        assert [tmp_path / "src" / "a.py"] == list(sources(tmp_path))

    def test_our_own_source_is_clean(self):
        """
        The project emits only codes that it registers.
        """
        for name in ("examples", "fasten_shims"):
            if (ROOT / name).is_dir():
                assert (
                    0 == run("codes", "check", "--source", str(ROOT / name)).exit_code
                )


HOSTILE = Meta(
    description='ends */ """ with \\u000a ??/ \\',
    detail={"a": "int", "b-c": "str?", "class": "list", 'q"uote': "dict"},
    domain="shop",
    id="CART_FILLED",
)
METAS = [
    HOSTILE,
    Meta(domain="shop", id="IMPORT", action="import", detail={"a": "bool?"}),
    Meta(domain="shop", id="A_1"),
    Meta(domain="shop", id="A1"),
    Meta(domain="shop", id="ERROR"),
    Meta(domain="shop", id="EMIT"),
]


def compiled(name: str, *words: str, cwd) -> str:
    """
    Run a compiler, if this machine has it; return what it says.
    """
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not on this machine")
    done = subprocess.run(
        [name, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


class TestTypegen:
    @pytest.mark.parametrize("language", sorted(LANGUAGES))
    def test_every_code_is_named_but_fasten_s_own(self, language):
        """
        Each registered code is in the file once as text, those of fasten are not.
        """
        done = run("codes", "typegen", "--lang", language)

        assert (0, "") == (done.exit_code, done.stderr)
        for code in registry.entries:
            assert (f'"{code}"' in done.stdout) == (code not in fasten.codes.OWN_CODES)

    def test_files_can_be_given(self, tmp_path):
        """
        FILES count beside what is found here.
        """
        path = write(tmp_path / "given.yaml", SHOP)

        assert (
            "cart_filled"
            in run("codes", "typegen", "--lang", "python", str(path)).stdout
        )

    def test_python_compiles_and_is_formatted(self, tmp_path):
        """
        The module is Python that a formatter leaves alone.
        """
        text = generate("python", METAS)
        ast.parse(text)
        write(tmp_path / "audit.py", text)
        ruff = [sys.executable, "-m", "ruff", "format", "--check", "--isolated", "."]
        done = subprocess.run(
            ruff, cwd=tmp_path, capture_output=True, text=True, check=False
        )

        assert 0 == done.returncode, done.stdout

    def test_python_emits(self, tmp_path):
        """
        A generated function emits its code with target, detail and anchors.
        """
        write(tmp_path / "shop.codes.yaml", SHOP)
        text = run("codes", "typegen", "--lang", "python").stdout
        module: dict = {}
        exec(compile(text, "audit.py", "exec"), module)
        with capture() as trail:
            module["cart_filled"](
                "c-1", detail={"items": 2, "total": 9.5}, actor="u-1", reason="sale"
            )
            module["cart_emptied"]("c-1")

        trail.assert_emitted("CART_FILLED", target="c-1", actor="u-1", reason="sale")
        trail.assert_emitted("CART_EMPTIED", times=1)

    @pytest.mark.slow
    def test_wrong_uses_fail_the_type_checkers(self, tmp_path):
        """
        A wrong code, a missing field and a wrong type fail mypy and pyright.
        """
        write(tmp_path / "audit.py", generate("python", _shop_metas()))
        good = """
            from audit import CODES, Code, cart_emptied, cart_filled
            code: Code = "CART_FILLED"
            cart_filled("c", detail={"items": 1, "total": 2.0}, actor="u")
            cart_filled(7, detail={"items": 1, "total": 2, "note": "x"})
            cart_emptied("c", detail={"anything": 1})
            first: str = CODES[0]
        """
        bad = """
            from audit import Code, cart_emptied, cart_filled
            import audit
            code: Code = "CART_FILED"
            cart_filled("c")
            cart_filled("c", detail={"items": 1})
            cart_filled("c", detail={"items": "1", "total": 2.0})
            cart_filled("c", detail={"items": 1, "total": 2.0, "more": 1})
            cart_emptied("c", actr="u")
            audit.cart_fild("c")
        """
        write(tmp_path / "good.py", textwrap.dedent(good))
        write(tmp_path / "bad.py", textwrap.dedent(bad))
        write(
            tmp_path / "pyrightconfig.json",
            json.dumps({"typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}),
        )

        wrong = {("bad.py", line) for line in range(4, 11)}
        files = ("audit.py", "good.py", "bad.py")

        assert wrong == _mypy(tmp_path, *files)
        assert wrong == _pyright(tmp_path, *files)

    def test_typescript_parses(self, tmp_path):
        """
        The constants and detail types are TypeScript, for tsc where there is one.
        """
        write(
            tmp_path / "codes.ts",
            generate("typescript", METAS)
            + 'const c: Code = "CART_FILLED"; void c;\n'
            + 'const d: Details["IMPORT"] = {}; void d;\n',
        )
        compiled("tsc", "--noEmit", "--strict", "codes.ts", cwd=tmp_path)

    def test_typescript_constants_run(self, tmp_path):
        """
        Without its types the file is JavaScript that node runs.
        """
        text = generate("typescript", METAS)
        plain = text.partition("export type")[0].replace(" as const", "")
        write(tmp_path / "codes.mjs", f"{plain}console.log(Codes.CART_FILLED)\n")

        assert "CART_FILLED\n" == compiled("node", "codes.mjs", cwd=tmp_path)

    def test_go_compiles(self, tmp_path):
        """
        The constants are a Go package.
        """
        write(tmp_path / "go.mod", "module example.org/audit\n\ngo 1.21\n")
        write(tmp_path / "audit.go", generate("go", METAS))
        compiled("go", "vet", "./...", cwd=tmp_path)

    def test_rust_compiles(self, tmp_path):
        """
        The constants are a Rust crate without warnings.
        """
        write(tmp_path / "codes.rs", generate("rust", METAS))
        words = ("--crate-type", "lib", "-D", "warnings", "codes.rs")
        compiled("rustc", *words, cwd=tmp_path)

    @pytest.mark.parametrize("standard", ["c++14", "c++20"])
    def test_cpp_compiles(self, tmp_path, standard):
        """
        The constants are a header of C++14, whatever macros are about.
        """
        write(tmp_path / "codes.hpp", generate("cpp", METAS))
        write(
            tmp_path / "main.cpp",
            "#define ERROR 1\n"
            '#include "codes.hpp"\n'
            "#include <cstring>\n"
            "int main() { return std::strcmp(fasten::codes::kCartFilled, "
            '"CART_FILLED"); }\n',
        )
        flags = (f"-std={standard}", "-Wall", "-Wextra", "-Werror")
        compiled("g++", *flags, "-o", "main", "main.cpp", cwd=tmp_path)

        assert 0 == subprocess.run([tmp_path / "main"], check=False).returncode

    def test_java_compiles(self, tmp_path):
        """
        The constants are a Java class.
        """
        write(tmp_path / "FastenCodes.java", generate("java", METAS))
        compiled("javac", "-Werror", "FastenCodes.java", cwd=tmp_path)

    @given(st.text(), st.sampled_from(sorted(LANGUAGES)))
    def test_a_description_stays_in_its_comment(self, description, language):
        """
        Prose of anybody adds no line to the file.
        """
        meta = Meta(description=description, domain="shop", id="CART_FILLED")
        plain = Meta(description="Short.", domain="shop", id="CART_FILLED")
        lines = generate(language, [meta]).split("\n")
        differing = [
            (a, b)
            for a, b in zip(lines, generate(language, [plain]).split("\n"), strict=True)
            if a != b
        ]

        assert len(differing) <= 1
        if language == "python":
            ast.parse("\n".join(lines))


class TestDeclaredDetail:
    @pytest.mark.parametrize(
        ("detail", "said"),
        [
            (None, "items is missing; give it a int; total is missing"),
            ({"items": 1}, "total is missing; give it a float"),
            ({"items": "1", "total": 1.0}, "items is a str, not a int"),
            ({"items": True, "total": 1.0}, "items is a bool, not a int"),
            ({"items": 1, "total": 1.0, "note": 3}, "note is a int, not a str"),
            ({"items": 1, "total": 1.0, "nota": "x"}, "did you mean 'note'?"),
            ("hunter2", "detail is a str, not a mapping"),
        ],
    )
    def test_emit_refuses_what_the_type_checkers_refuse(self, tmp_path, detail, said):
        """
        At run time, too, a missing field or a wrong type is the caller's mistake.
        """
        registry.load(write(tmp_path / "shop.yaml", SHOP))
        with capture() as trail, pytest.raises(InvalidAnchor) as raised:
            fasten.emit("CART_FILLED", "c-1", detail=detail)

        assert str(raised.value).startswith("detail of CART_FILLED: ")
        assert said in str(raised.value)
        assert "hunter2" not in str(raised.value)
        assert [] == trail.audit

    def test_emit_takes_what_fits(self, tmp_path):
        """
        Optional fields may be missing, and an int is a float as well.
        """
        registry.load(write(tmp_path / "shop.yaml", SHOP))
        with capture() as trail:
            fasten.emit("CART_FILLED", "c-1", detail={"items": 1, "total": 2})

        trail.assert_emitted("CART_FILLED", detail={"items": 1, "total": 2})

    def test_without_strictness_it_is_stored_and_marked(self, tmp_path):
        """
        FASTEN_STRICT=off turns the mistake into a row that says so.
        """
        registry.load(write(tmp_path / "shop.yaml", SHOP))
        with capture(strict=False) as trail:
            fasten.emit("CART_FILLED", "c-1", detail={"items": 1})

        assert "total is missing" in trail.audit[0]["detail"]["_mistake"]


def _shop_metas() -> list[Meta]:
    path = write(Path("shop.yaml"), SHOP)
    own = Registry()
    own.load(path)
    return [own.meta("CART_FILLED"), own.meta("CART_EMPTIED")]


def _mypy(cwd, *files: str) -> set[tuple[str, int]]:
    done = run_python(
        """
        import sys
        from mypy import api
        out, err, code = api.run([
            "--strict", "--no-error-summary", "--cache-dir", ".mypy", *sys.argv[1:]
        ])
        print(out, err)
        """,
        *files,
        cwd=cwd,
        timeout=170,
    )
    found = re.findall(r"^(\w+\.py):(\d+): error", done.stdout, re.MULTILINE)
    return {(name, int(line)) for name, line in found}


def _pyright(cwd, *files: str) -> set[tuple[str, int]]:
    program = shutil.which("pyright") or shutil.which(
        "pyright", path=str(ROOT / ".venv" / "bin")
    )
    if program is None:
        pytest.skip("pyright is not on this machine")
    done = subprocess.run(
        [program, "--outputjson", "--pythonpath", sys.executable, *files],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    told = json.loads(done.stdout)["generalDiagnostics"]
    return {
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1)
        for each in told
        if each["severity"] == "error"
    }
