# SPDX-License-Identifier: Apache-2.0
"""
The pytest plugin: fixtures over `fasten.testing.capture`, a marker, and strictness.

pytest loads this file in every run of every project that has fasten installed. So it
stands outside of the package `fasten`, and loads that only for a test that uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    import fasten

__all__ = [
    "_fasten_guard",
    "fasten_clock",
    "fasten_trail",
    "pytest_addoption",
    "pytest_configure",
    "pytest_runtest_call",
    "pytest_runtest_makereport",
    "pytest_runtest_setup",
]

MARK: Final = (
    "fasten(**settings): run the test with a fasten trail that has these settings, as "
    "of fasten.init(); capture=False leaves fasten alone, also under --fasten-strict"
)
STRICT: Final = (
    "fail a test that emits an audit row outside of a trail, and one in which fasten "
    "let a mistake pass; no test opens a store"
)
RECIPE: Final = """\
Nothing called fasten.init() in this test. Ask for the fixture fasten_trail, or give
it to every test by one line in the configuration of pytest: usefixtures = fasten_trail
"""

_TRAIL: Final = "_fasten_trail"
_GUARD: Final = "_fasten_guard"
_PASSED: Final = "_fasten_passed"


def pytest_addoption(parser: pytest.Parser) -> None:
    """
    Add `--fasten-strict`.
    """
    group = parser.getgroup("fasten", "fasten audit trails")
    try:
        group.addoption("--fasten-strict", action="store_true", help=STRICT)
    except ValueError:
        # `-p fasten.testing.plugin` beside the plugin that is installed.
        return


def pytest_configure(config: pytest.Config) -> None:
    """
    Register the marker.
    """
    config.addinivalue_line("markers", MARK)


# --- fixtures ---------------------------------------------------------------------


@pytest.fixture
def fasten_trail(request: pytest.FixtureRequest) -> Iterator[fasten.testing.Trail]:
    """
    Give the test a Trail of what it makes fasten record; no store is opened.
    """
    import fasten

    if _is_left_alone(request.node):
        pytest.fail("fasten_trail is asked for, and the mark says capture=False")
    with fasten.testing.capture(**_settings(request.node)) as trail:
        setattr(request.node, _TRAIL, trail)
        yield trail


@pytest.fixture
def fasten_clock(fasten_trail: fasten.testing.Trail) -> fasten.testing.Clock:
    """
    Give the test the clock that its rows are stamped by; it stands still.
    """
    return fasten_trail.clock


@pytest.fixture
def _fasten_guard(request: pytest.FixtureRequest) -> Iterator[None]:
    import fasten

    with fasten.testing.capture() as outside:
        setattr(request.node, _GUARD, outside)
        yield
        if getattr(request.node, _PASSED, False):
            _check(request.node)


# --- around each test -------------------------------------------------------------


def _is_left_alone(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("fasten")
    return mark is not None and not mark.kwargs.get("capture", True)


def _settings(item: pytest.Item) -> dict[str, Any]:
    """
    Merge the marks of a test, its class and its module: the nearest wins.
    """
    settings: dict[str, Any] = {}
    for mark in reversed(list(item.iter_markers("fasten"))):
        if mark.args:
            pytest.fail(f"the mark fasten takes names, as in {MARK}", pytrace=False)
        settings.update(mark.kwargs)
    settings.pop("capture", None)
    return settings


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """
    Open the trail of a marked test, and the guard of a strict run, before all else.
    """
    if not isinstance(item, pytest.Function):
        return
    names = [name for name in item.fixturenames if name != "fasten_trail"]
    if _is_left_alone(item):
        # The configuration may give the trail to every test; this one wants none.
        is_asked = "fasten_trail" in signature(item.function).parameters
        item.fixturenames = item.fixturenames if is_asked else names
        return
    if "fasten_trail" in item.fixturenames or item.get_closest_marker("fasten"):
        names.insert(0, "fasten_trail")
    if item.config.getoption("fasten_strict", default=False):
        names.insert(0, "_fasten_guard")
    # A list of its own: tests made from one function share theirs.
    item.fixturenames = names


@pytest.hookimpl(trylast=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """
    Fail a test that passed so far, if a strict run finds fault with it.
    """
    _check(item)
    # The end of the test is looked at, too, but a failure has one message only.
    setattr(item, _PASSED, True)


def _check(item: pytest.Item) -> None:
    outside: fasten.testing.Trail | None = getattr(item, _GUARD, None)
    if outside is None:
        return
    inside: fasten.testing.Trail | None = getattr(item, _TRAIL, None)
    mistakes = [*outside.mistakes(), *(inside.mistakes() if inside else [])]
    strays = outside.report() if outside.audit else ""
    if strays:
        pytest.fail(
            f"--fasten-strict: emitted outside of a trail:\n{strays}\n"
            "Ask for the fixture fasten_trail, or use `with fasten.testing.capture()`.",
            pytrace=False,
        )
    if mistakes:
        told = "\n".join(f"  {mistake}" for mistake in mistakes)
        pytest.fail(f"--fasten-strict: fasten let pass:\n{told}", pytrace=False)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:
    """
    Show the trail of a test that failed.
    """
    outcome: Any = yield
    report = outcome.get_result()
    if not report.failed or any(name == "fasten trail" for name, _ in report.sections):
        return
    trail: fasten.testing.Trail | None = getattr(item, _TRAIL, None)
    if trail is not None:
        report.sections.append(("fasten trail", trail.report() or "(empty)"))
    elif call.excinfo is not None and call.excinfo.typename == "NotInitialized":
        report.sections.append(("fasten trail", RECIPE))
