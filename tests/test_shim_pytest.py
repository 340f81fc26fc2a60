# SPDX-License-Identifier: Apache-2.0
"""
The pytest plugin, in projects of their own: one pytest run each.

What a trail can do is in `test_testing`.
"""

from __future__ import annotations

import sys

import pytest

from tests.outside import run_python

pytest_plugins = ["pytester"]


@pytest.fixture
def project(pytester, monkeypatch):
    """
    Return a project whose tests run in a process of their own, with our plugin only.
    """
    # With CI set, pytest's summary repeats a failure's message in full.
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)
    # Loading the others that are installed here takes a second or two each time.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "fasten_shims.pytest")
    return pytester


@pytest.fixture
def installed(project, monkeypatch):
    """
    Return a project that has every plugin that is installed.
    """
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    monkeypatch.delenv("PYTEST_PLUGINS")
    return project


def run(project, *args):
    """
    Run the project's tests.
    """
    return project.runpytest_subprocess("-p", "no:cacheprovider", "-ra", *args)


class TestFixtures:
    def test_the_trail_is_the_tests_own(self, project):
        """
        Each test starts with none; the clock is the one that rows are stamped by.
        """
        project.makepyfile("""
            import fasten

            def test_one(fasten_trail, fasten_clock):
                fasten.emit("USER_CREATED", "u-1")
                fasten_clock.advance(60)
                fasten.emit("USER_CREATED", "u-2")
                fasten_trail.assert_emitted("USER_CREATED", times=2)
                times = [row["timestamp"] for row in fasten_trail.audit]
                assert times == ["2026-04-22T12:34:56.000000Z",
                                 "2026-04-22T12:35:56.000000Z"]

            def test_two(fasten_trail):
                assert fasten_trail.audit == []
        """)

        run(project).assert_outcomes(passed=2)

    def test_a_failure_shows_the_trail(self, project):
        """
        As a section of the report, the three streams in order.
        """
        project.makepyfile("""
            import fasten

            def test_it(fasten_trail):
                with fasten.bind("r-1"):
                    fasten.emit("USER_CREATED", "u-1", actor="ann")
                    fasten.log.warning("careful")
                    fasten.record_api(method="GET", path="/x", status=200)
                assert fasten_trail.api == []
        """)
        result = run(project)

        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(
            [
                "*- fasten trail -*",
                "audit  USER_CREATED  ann  target=u-1",
                "sys    warning   careful  r-1",
                "api    GET /x  200  r-1",
            ]
        )

    def test_a_failure_names_the_nearest_rows(self, project):
        """
        What a test that forgets to emit fails with.
        """
        project.makepyfile("""
            import fasten

            def test_it(fasten_trail):
                fasten.emit("USER_CREATED", "u-2", actor="ann")
                fasten_trail.assert_emitted("USER_CREATED", target="u-1")
        """)
        result = run(project)

        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(
            [
                "E*USER_CREATED target='u-1' was not emitted",
                "E*the only row:",
                "E*USER_CREATED  ann  target=u-2",
                "E*target is 'u-2', not 'u-1'",
            ]
        )

    def test_a_pass_shows_nothing(self, project):
        """
        Neither does a test that is skipped.
        """
        project.makepyfile("""
            import fasten, pytest

            def test_it(fasten_trail):
                fasten.emit("USER_CREATED", "u-1")

            def test_skipped(fasten_trail):
                pytest.skip("x")
        """)
        result = run(project)

        result.assert_outcomes(passed=1, skipped=1)
        result.stdout.no_fnmatch_line("*fasten trail*")

    def test_who_never_calls_init_is_told_the_line(self, project):
        """
        The error of a test without a trail names the recipe, and the recipe works.
        """
        project.makepyfile("""
            import fasten

            def test_it():
                fasten.emit("USER_CREATED", "u-1")
        """)
        result = run(project)

        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*usefixtures = fasten_trail*"])
        project.makeini("[pytest]\nusefixtures = fasten_trail\n")
        run(project, "--fasten-strict").assert_outcomes(passed=1)


class TestMark:
    def test_it_gives_settings(self, project):
        """
        The nearest mark wins; a marked test has a trail without asking for one.
        """
        project.makepyfile("""
            import fasten, pytest
            from fasten import engine

            pytestmark = pytest.mark.fasten(service_id="module", strict=False)

            def test_of_the_module():
                fasten.emit("NO_SUCH_CODE", "x")
                assert engine.current().settings.service_id == "module"

            @pytest.mark.fasten(service_id="test")
            def test_of_its_own(fasten_trail):
                fasten.emit("NO_SUCH_CODE", "x")
                assert fasten_trail.audit[0]["service_id"] == "test"

            own = pytest.mark.fasten(service_id="own")

            @pytest.mark.parametrize("name", ["module", pytest.param("own", marks=own)])
            def test_of_one_parameter(name):
                assert engine.current().settings.service_id == name

            @pytest.mark.fasten(capture=False)
            def test_left_alone():
                assert engine.current() is None
        """)

        run(project, "--strict-markers").assert_outcomes(passed=5)

    def test_it_holds_before_other_fixtures(self, project):
        """
        A fixture that builds the application is under the trail already.
        """
        project.makepyfile("""
            import fasten, pytest

            @pytest.fixture(scope="module")
            def app(tmp_path_factory):
                path = tmp_path_factory.mktemp("x") / "audit.db"
                engine = fasten.init(service_id="app", audit_dsn=f"sqlite:///{path}")
                assert engine.delivery is None

            @pytest.mark.fasten()
            def test_it(app, fasten_trail):
                fasten.emit("USER_CREATED", "u-1")
                fasten_trail.assert_emitted("USER_CREATED", service="app")
        """)

        run(project).assert_outcomes(passed=1)

    def test_it_works_on_a_testcase(self, project):
        """
        Whose methods can ask for no fixture.
        """
        project.makepyfile("""
            import unittest
            import fasten, pytest
            from fasten import engine

            @pytest.mark.fasten(service_id="cases")
            class Tests(unittest.TestCase):
                def setUp(self):
                    fasten.emit("AUTH_LOGIN", "set-up")

                def test_it(self):
                    assert engine.current().settings.service_id == "cases"

                def test_failing(self):
                    fasten.emit("USER_CREATED", "u-1")
                    self.fail("on purpose")
        """)
        result = run(project)

        result.assert_outcomes(passed=1, failed=1)
        result.stdout.fnmatch_lines(["audit  USER_CREATED  system  target=u-1"])

    @pytest.mark.parametrize(
        ("mark", "told"),
        [
            ('fasten("orders")', "takes names"),
            ("fasten(servce_id='x')", "servce_id= is no setting"),
        ],
    )
    def test_a_wrong_one_says_so(self, project, mark, told):
        """
        A misspelt setting does not pass silently.
        """
        project.makepyfile(f"""
            import pytest

            @pytest.mark.{mark}
            def test_it():
                pass
        """)
        result = run(project)

        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines([f"*{told}*"])


class TestStrict:
    def test_an_emit_outside_of_a_trail_fails(self, project):
        """
        In the test, in its fixtures, or at its end; without the option nobody minds.
        """
        project.makepyfile("""
            import fasten, pytest
            from fasten.testing import capture

            @pytest.fixture
            def early():
                fasten.emit("AUTH_LOGIN", "early")

            @pytest.fixture
            def late():
                yield
                fasten.emit("AUTH_LOGIN", "late")

            def test_plain(tmp_path):
                path = tmp_path / "audit.db"
                fasten.init(service_id="x", audit_dsn=f"sqlite:///{path}", stdout="")
                fasten.emit("USER_CREATED", "u-1")
                fasten.flush(60)
                fasten.close()
                print("stored:", path.exists())

            def test_by_fixture(early):
                pass

            def test_at_its_end(late):
                pass

            def test_asked(fasten_trail):
                fasten.emit("USER_CREATED", "u-1")

            def test_captured():
                with capture():
                    fasten.emit("USER_CREATED", "u-1")

            def test_log_only():
                fasten.log.info("x")

            def test_nothing():
                pass
        """)
        result = run(project, "--fasten-strict", "-rA")

        result.assert_outcomes(passed=5, failed=2, errors=1)
        result.stdout.fnmatch_lines(
            [
                "*ERROR at teardown of test_at_its_end*",
                "--fasten-strict: emitted outside of a trail:",
                "audit  AUTH_LOGIN  system  target=late",
                "*_ test_plain _*",
                "stored: False",
                "*_ test_by_fixture _*",
            ]
        )
        relaxed = run(project, "-k", "plain or log_only or asked", "-rA")
        relaxed.assert_outcomes(passed=3, deselected=4)
        relaxed.stdout.fnmatch_lines(["stored: True"])

    def test_a_mistake_that_was_let_pass_fails(self, project):
        """
        Codes that nobody knows, callables that raise, and those of inner blocks.
        """
        project.makepyfile("""
            import fasten, pytest
            from fasten import context
            from fasten.testing import capture

            @pytest.mark.fasten(strict=False)
            def test_code():
                fasten.emit("USER_CREATD", "x")

            def test_callable(fasten_trail):
                with context.scope(request=1, ask_actor=lambda _: 1 / 0):
                    fasten.emit("AUTH_LOGIN", "x")

            def test_assertion(fasten_trail):
                fasten_trail.assert_not_emitted("USER_CREATD")

            def test_inner():
                with capture(strict=False):
                    fasten.emit("USER_CREATD", "x")

            def test_clean(fasten_trail):
                fasten_trail.assert_not_emitted("USER_CREATED")
        """)
        result = run(project, "--fasten-strict")

        result.assert_outcomes(passed=1, failed=4)
        result.stdout.fnmatch_lines(
            [
                "*USER_CREATD x: unknown code*USER_CREATED*",
                "*1 of the actor=, tenant= and client= callables raised",
                "*assert_not_emitted: unknown code*",
            ]
        )
        run(project).assert_outcomes(passed=5)

    def test_it_hides_no_other_failure(self, project):
        """
        A test that fails by itself keeps its own message, a TestCase's method, too.
        """
        project.makepyfile("""
            import unittest
            import fasten

            def test_it():
                fasten.emit("USER_CREATED", "u-1")
                assert 1 == 2

            class Tests(unittest.TestCase):
                def test_case(self):
                    fasten.emit("USER_CREATED", "u-1")
                    self.fail("on purpose")

                def test_stray(self):
                    fasten.emit("USER_CREATED", "u-1")
        """)
        result = run(project, "--fasten-strict")

        result.assert_outcomes(failed=3)
        result.stdout.fnmatch_lines(["E*assert 1 == 2", "E*on purpose"])
        assert 1 == result.stdout.str().count("emitted outside of a trail")

    def test_a_test_can_stay_out(self, project):
        """
        One that is about a real store says so.
        """
        project.makepyfile("""
            import fasten, pytest

            @pytest.mark.fasten(capture=False)
            def test_it(tmp_path):
                path = tmp_path / "audit.db"
                fasten.init(service_id="x", audit_dsn=f"sqlite:///{path}", stdout="")
                fasten.emit("USER_CREATED", "u-1")
                assert fasten.flush()
                assert path.exists()
                fasten.close()

            @pytest.mark.fasten(capture=False)
            def test_torn(fasten_trail):
                pass
        """)
        project.makeini("[pytest]\nusefixtures = fasten_trail\n")
        result = run(project, "--fasten-strict")

        result.assert_outcomes(passed=1, errors=1)
        result.stdout.fnmatch_lines(["*the mark says capture=False*"])


class TestManners:
    def test_loads_nothing_until_a_fixture_is_used(self, installed):
        """
        Also where fasten itself is broken: other people's tests go on.
        """
        installed.makepyfile("""
            import sys

            def test_it():
                assert [] == [m for m in sys.modules if m.split(".")[0] == "fasten"]
                assert "structlog" not in sys.modules
        """)
        broken = installed.mkpydir("fasten")
        (broken / "__init__.py").write_text("raise RuntimeError('broken')\n")
        result = run(installed, "-v", "--trace-config")

        result.assert_outcomes(passed=1)
        result.stdout.fnmatch_lines(["*fasten_shims*pytest.py*"])

    def test_costs_next_to_nothing(self):
        """
        Less than 5 ms on top of pytest: here, the best of a few fresh interpreters.
        """
        took = [
            float(
                run_python("""
                    import time
                    import pytest
                    before = time.perf_counter()
                    import fasten_shims.pytest
                    print(time.perf_counter() - before)
                """).stdout
            )
            for _ in range(3)
        ]

        assert min(took) < 0.005

    def test_help_names_option_and_mark(self, project):
        """
        The help of pytest itself is where one looks.
        """
        option, marks = run(project, "--help"), run(project, "--markers")

        option.stdout.fnmatch_lines(["fasten audit trails:", "*--fasten-strict*"])
        marks.stdout.fnmatch_lines(["@pytest.mark.fasten(??settings): *"])

    def test_can_be_loaded_under_its_other_name(self, installed, monkeypatch):
        """
        By `-p`, with entry points off or on top of them: the trail is shown once.
        """
        installed.makepyfile("""
            import fasten

            def test_it(fasten_trail):
                fasten.emit("USER_CREATED", "u-1")
                assert 0
        """)
        both = run(installed, "-p", "fasten.testing.plugin")
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        alone = run(installed, "-p", "fasten.testing.plugin", "--fasten-strict")

        for result in (both, alone):
            result.assert_outcomes(failed=1)
            titles = [line for line in result.outlines if "- fasten trail -" in line]
            assert 1 == len(titles)

    def test_can_be_switched_off(self, installed):
        """
        By its name, as any plugin.
        """
        installed.makepyfile("def test_it(fasten_trail): pass")
        result = run(installed, "-p", "no:fasten")

        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines(["*fixture 'fasten_trail' not found*"])

    @pytest.mark.slow
    def test_with_xdist(self, project):
        """
        Each worker has its own trail, and the section travels to the report.
        """
        project.makepyfile("""
            import fasten, pytest

            @pytest.mark.parametrize("number", range(8))
            def test_it(fasten_trail, number):
                fasten.emit("USER_CREATED", number)
                fasten_trail.assert_emitted("USER_CREATED", times=1, target=number)
                assert number != 5

            def test_stray():
                fasten.emit("USER_CREATED", "stray")
        """)
        result = run(project, "-p", "xdist", "-n", "2", "--fasten-strict")

        result.assert_outcomes(passed=7, failed=2)
        result.stdout.fnmatch_lines(["audit  USER_CREATED  system  target=5"])
        result.stdout.fnmatch_lines(["audit  USER_CREATED  system  target=stray"])


FASTAPI = """
    import fasten
    from contextlib import asynccontextmanager
    from fastapi import FastAPI
    from fasten.shim.http import APILogger, RequestIDMiddleware

    @asynccontextmanager
    async def lifespan(app):
        fasten.init(service_id="shop", audit_dsn="sqlite:///./audit.db")
        fasten.log.info("starting")
        yield
        fasten.close()

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(RequestIDMiddleware)
    app.add_middleware(APILogger, skip={"/health"})
    app.mount("/api/v1/logs", fasten.reader.router(auth="none"))

    @app.post("/users/{name}", status_code=201)
    async def create(name: str):
        fasten.emit("USER_CREATED", name)
        fasten.log.info("created")

    @app.get("/sync")
    def sync():
        fasten.identify(actor="ann")
        fasten.emit("AUTH_LOGIN", "ann")
"""


def test_in_a_fastapi_project(project):
    """
    Its lifespan calls init() and close(), its reader answers from the trail.
    """
    project.makepyfile(app=FASTAPI)
    project.makepyfile("""
        from pathlib import Path
        import pytest
        from fastapi.testclient import TestClient
        from app import app

        @pytest.fixture
        def client(fasten_trail):
            with TestClient(app) as client:
                yield client

        @pytest.mark.parametrize("again", [1, 2])
        def test_it(client, fasten_trail, again):
            answer = client.post("/users/ann")
            fasten_trail.assert_emitted("USER_CREATED", times=1, target="ann",
                                        actor="anonymous", service="shop")
            fasten_trail.assert_correlated(answer.headers["X-Request-ID"])
            assert [201] == [row["status"] for row in fasten_trail.api]
            found = client.get("/api/v1/logs/audit", params={"target": "ann"}).json()
            assert ["USER_CREATED"] == [row["code"] for row in found["rows"]]
            assert not Path("audit.db").exists()

        def test_sync(client, fasten_trail):
            client.get("/sync")
            fasten_trail.assert_emitted("AUTH_LOGIN", actor="ann")
    """)
    # fastapi's test client warns of what its own libraries do.
    run(project, "--fasten-strict").assert_outcomes(passed=3)


def test_in_a_django_project(project):
    """
    Its TestCase under a mark, its models and a row of the same transaction.
    """
    project.makepyfile(
        project="""
        import fasten
        from django.conf import settings
        from django.db import connection
        from django.http import HttpResponse
        from django.urls import path

        def create(request):
            from django.contrib.auth.models import User
            user = User.objects.create(username="ann")
            fasten.emit("USER_CREATED", user.pk, connection=connection)
            return HttpResponse(status=201)

        urlpatterns = [path("users", create)]
        """,
        conftest="""
        import django
        from django.conf import settings

        def pytest_configure():
            settings.configure(
                SECRET_KEY="x", ROOT_URLCONF="project", ALLOWED_HOSTS=["*"],
                DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3",
                                       "NAME": ":memory:"}},
                INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth"],
                MIDDLEWARE=["fasten.shim.django.RequestIDMiddleware",
                            "fasten.shim.django.APILogger"],
            )
            django.setup()
        """,
    )
    project.makepyfile("""
        import pytest
        from django.test import Client, TestCase
        from django.core.management import call_command
        from fasten.testing import capture

        @pytest.fixture(scope="session", autouse=True)
        def database():
            call_command("migrate", verbosity=0)

        @pytest.mark.fasten(service_id="shop")
        class Tests(TestCase):
            def setUp(self):
                self.trail = self.enterContext(capture())

            def test_it(self):
                answer = self.client.post("/users")
                row = self.trail.assert_emitted("USER_CREATED", actor="anonymous")
                assert row["pending"] is True
                self.trail.assert_correlated(answer.headers["X-Request-ID"])

            async def test_async(self):
                await self.async_client.post("/users")
                self.trail.assert_emitted("USER_CREATED", times=1)

        def test_plain(fasten_trail):
            Client().get("/nowhere")
            assert [404] == [row["status"] for row in fasten_trail.api]
    """)

    run(project, "--fasten-strict").assert_outcomes(passed=3)


def test_the_plugin_is_installed():
    """
    An entry point names it, outside of the package that it serves.
    """
    from importlib.metadata import entry_points

    (found,) = entry_points(group="pytest11", name="fasten")

    assert "fasten_shims.pytest" == found.value
    assert "fasten_shims.pytest" in sys.modules
