# SPDX-License-Identifier: Apache-2.0
"""
The ambient context: ids, scopes, who is named in them, and what crosses threads.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fasten import context
from fasten.context import (
    Context,
    ContextThreadPoolExecutor,
    RequestIdMinter,
    accept,
    bind,
    carry,
    current,
    current_request_id,
    extract,
    identify,
    inject,
    mint_request_id,
    parse_traceparent,
    resume,
    scope,
    snapshot,
    suppressed,
    with_request_id,
)
from fasten.errors import NotInScope
from tests.outside import run_python

MINTED = re.compile(r"[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}")
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ALPHANUMERIC = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


class Headers:
    """
    The smallest carrier that a custom transport could write.
    """

    def __init__(self, **headers: str | bytes) -> None:
        self.headers: dict[str, str | bytes] = dict(headers)

    def get(self, key: str) -> str | bytes | None:
        """
        Return the header.
        """
        return self.headers.get(key)

    def set(self, key: str, value: str) -> None:
        """
        Write the header.
        """
        self.headers[key] = value


@pytest.fixture
def source() -> Iterator[Any]:
    """
    Register trace sources that are gone after the test.
    """
    added: list[Any] = []

    def add(fn: Any) -> None:
        added.append(fn)
        context.add_source(fn)

    yield add
    for fn in added:
        context.remove_source(fn)


def python(script: str) -> str:
    """
    Run a script in a fresh interpreter and return what it printed.
    """
    done = run_python(script)

    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout.strip()


class TestAccept:
    """
    The one rule for what may become a request id.
    """

    @given(
        st.text(ALPHANUMERIC, min_size=1, max_size=1),
        st.text(ALPHANUMERIC + "._:~-", max_size=127),
    )
    def test_takes_what_the_grammar_allows(self, first: str, rest: str) -> None:
        """
        Every id of the grammar is accepted as it is, from str and from bytes.
        """
        rid = first + rest
        expected = None if rid.startswith(("boot-", "orphan-", "evt-")) else rid

        assert (expected, expected) == (accept(rid), accept(rid.encode()))

    @given(st.text(max_size=200))
    @example("a\n")
    @example("é")
    @example("\uff41")
    @example("a\u2028")
    @example("a" * 129)
    @example("")
    def test_never_passes_anything_else(self, text: str) -> None:
        """
        Whatever is accepted matches the published expression.
        """
        published = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._:~-]{0,127}\Z")
        rid = accept(text)

        assert rid is None or (rid == text and published.match(text))

    @pytest.mark.parametrize(
        "value",
        [
            None,
            7,
            True,
            ["abc"],
            {"a": 1},
            b"\xff\xfe",
            b"a" * 1_000_000,
            "a" * 1_000_000,
            "boot-x-1",
            "orphan-x-1",
            "evt-01",
            "-a",
            "a b",
            "a\r\nSet-Cookie: x",
            "a\0",
            "\x1b[31m",
            "\u202eabc",
        ],
    )
    def test_refuses(self, value: object) -> None:
        """
        Hostile text, other types and the prefixes of fasten's own ids are refused.
        """
        assert accept(value) is None

    def test_returns_a_plain_string(self) -> None:
        """
        A subclass of str does not travel on.
        """

        class Sly(str):
            __slots__ = ()

        assert str is type(accept(Sly("abc")))


class TestMint:
    """
    Minted ids.
    """

    def test_has_the_bits_of_a_uuid7(self) -> None:
        """
        32 lower hex digits, version 7, the RFC's variant, and accepted as an id.
        """
        rid = mint_request_id()

        assert (7, "specified in RFC 4122") == (UUID(rid).version, UUID(rid).variant)
        assert MINTED.fullmatch(rid)
        assert rid == accept(rid)

    def test_grows_with_the_clock(self) -> None:
        """
        A microsecond later is a greater id, whatever the random bits say.
        """
        times = iter(range(1_700_000_000_000_000_000, 1_700_000_000_000_100_000, 1000))
        bits = iter([b"\xff" * 8, b"\0" * 8] * 50)
        mint = RequestIdMinter(lambda: next(times), lambda n: next(bits))
        minted = [mint() for _ in range(100)]

        assert sorted(minted) == minted

    def test_is_valid_at_the_edges_of_time(self) -> None:
        """
        Neither the epoch nor a clock past 48 bits of milliseconds breaks the form.
        """
        ids = [
            RequestIdMinter(lambda now=now: now, bytes)()  # type: ignore[misc]
            for now in (0, -1, 999_999, 2**80)
        ]

        assert all(MINTED.fullmatch(rid) for rid in ids)

    def test_threads_never_share_an_id(self) -> None:
        """
        Eight threads minting at once get different ids.
        """
        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(lambda _: mint_request_id(), range(8000)))

        assert 8000 == len(set(ids))

    def test_can_be_replaced(self) -> None:
        """
        A test's own minter is used until the one before is put back.
        """
        before = context.use_minter(lambda: "counted-1")
        with bind() as ctx:
            rid = ctx.request_id
        context.use_minter(before)

        assert ("counted-1", 32) == (rid, len(mint_request_id()))


class TestTraceparent:
    """
    The W3C header.
    """

    @pytest.mark.parametrize(
        "value",
        [
            f"00-{TRACE}-{SPAN}-01",
            f"00-{TRACE}-{SPAN}-03",
            f"00-{TRACE}-{SPAN}-ff",
            f"cc-{TRACE}-{SPAN}-00",
            f"cc-{TRACE}-{SPAN}-00-what-the-future-brings",
            f"00-{TRACE}-{SPAN}-01".encode(),
        ],
    )
    def test_reads(self, value: str | bytes) -> None:
        """
        Known and future versions give trace and span id.
        """
        assert (TRACE, SPAN) == parse_traceparent(value)

    @pytest.mark.parametrize(
        "value",
        [
            None,
            "",
            7,
            f"ff-{TRACE}-{SPAN}-01",
            f"00-{'0' * 32}-{SPAN}-01",
            f"00-{TRACE}-{'0' * 16}-01",
            f"00-{TRACE.upper()}-{SPAN}-01",
            f"00-{TRACE}-{SPAN}-01-more",
            f"00-{TRACE}-{SPAN}-01\n",
            f"00-{TRACE}-{SPAN}",
            f"cc-{TRACE}-{SPAN}-00.more",
            f" 00-{TRACE}-{SPAN}-01",
        ],
    )
    def test_refuses(self, value: object) -> None:
        """
        Malformed headers, zero ids and version ff are not trace contexts.
        """
        assert parse_traceparent(value) is None

    @given(st.text(max_size=80) | st.binary(max_size=80))
    def test_never_raises(self, value: str | bytes) -> None:
        """
        Any text gives a pair of ids or None.
        """
        ids = parse_traceparent(value)

        assert ids is None or [32, 16] == [len(part) for part in ids]


class TestSentinel:
    """
    The ids of rows that belong to no request.
    """

    def test_boots_then_orphans(self) -> None:
        """
        Until the first scope the id says boot, afterwards orphan, with one suffix.
        """
        printed = python(
            "from fasten import context as c\n"
            "c.set_service('my svc/\u00fc')\n"
            "print(c.sentinel())\n"
            "with c.bind('abc'): pass\n"
            "print(c.sentinel())"
        )
        boot, orphan = printed.split()

        assert re.fullmatch(r"boot-my_svc__-[0-9a-f]{12}", boot)
        assert boot.replace("boot-", "orphan-") == orphan

    def test_a_forked_child_starts_over(self) -> None:
        """
        The child boots again, under digits of its own.
        """
        printed = python(
            "import os\n"
            "from fasten import context as c\n"
            "c.set_service('s')\n"
            "with c.bind('abc'): pass\n"
            "print(c.sentinel(), flush=True)\n"
            "pid = os.fork()\n"
            "if pid == 0:\n"
            "    print(c.sentinel(), flush=True)\n"
            "    os._exit(0)\n"
            "os.waitpid(pid, 0)"
        )
        orphan, boot = printed.split()

        assert ("orphan-s", "boot-s") == (orphan[:8], boot[:6])
        assert orphan[-12:] != boot[-12:]

    @given(st.text(max_size=300))
    def test_stays_within_the_charset_of_ids(self, service: str) -> None:
        """
        Any service name gives a bounded sentinel of the ids' own characters.
        """
        before = context._process.service
        context.set_service(service)
        rid = context.sentinel()
        context.set_service(before)

        assert re.fullmatch(r"(boot|orphan)-[A-Za-z0-9._:~-]{1,64}-[0-9a-f]{12}", rid)


class TestBind:
    """
    Scopes: what they hold, copy and put back.
    """

    def test_yields_the_context(self) -> None:
        """
        The with-block gets the Context that current() returns, as given.
        """
        with bind("r-1", actor="ann", tenant_id="t", method="mqtt", client="c") as ctx:
            inside = current()

        assert ctx is inside
        assert ("r-1", "ann", "t", "mqtt", "c") == (
            ctx.request_id,
            ctx.actor,
            ctx.tenant_id,
            ctx.method,
            ctx.client,
        )

    def test_restores_whatever_happens(self) -> None:
        """
        After an exception the context around is back.
        """
        with bind("outer"):
            with pytest.raises(ZeroDivisionError), bind("inner"):
                1 / 0  # noqa: B018
            after = current_request_id()

        assert ("outer", None) == (after, current())

    @pytest.mark.parametrize("bad", [None, "", "a b", "boot-x", "x" * 129, b"\xff", 7])
    def test_mints_for_none_and_for_a_bad_id(self, bad: Any) -> None:
        """
        A missing or unusable id is replaced, never taken from the scope around.
        """
        with bind("outer"), bind(bad) as ctx:
            pass

        assert MINTED.fullmatch(ctx.request_id)

    def test_no_arguments_begin_a_new_correlation(self) -> None:
        """
        A bare bind() mints, also inside another scope.
        """
        with bind("outer"), bind() as ctx:
            pass

        assert ("outer", True) == (ctx.parent, bool(MINTED.fullmatch(ctx.request_id)))

    def test_naming_somebody_keeps_the_id(self) -> None:
        """
        To change the actor inside a request is not to leave the request.
        """
        with bind("outer", tenant_id="t"), bind(actor="bob") as ctx:
            pass

        assert ("outer", "t", "bob", None) == (
            ctx.request_id,
            ctx.tenant_id,
            ctx.actor,
            ctx.parent,
        )

    def test_a_child_copies_its_parent(self) -> None:
        """
        What is not given is copied; what the child writes stays the child's.
        """
        with bind("a", actor="ann", actor_kind="admin", trace_id=TRACE) as parent:
            with bind("b") as child:
                identify(actor="bob")

        assert ("b", "a", TRACE) == (child.request_id, child.parent, child.trace_id)
        assert ("ann", "admin", "bob") == (parent.actor, parent.actor_kind, child.actor)

    def test_spells_ids_that_are_not_strings(self) -> None:
        """
        Ints, UUIDs and enums name people too, and a UUID is a request id.
        """
        key = UUID(int=5)
        with bind(key, actor=42, client=key, actor_kind="schedule") as ctx:  # type: ignore[arg-type]
            pass

        assert (str(key), "42", str(key), "scheduler") == (
            ctx.request_id,
            ctx.actor,
            ctx.client,
            ctx.actor_kind,
        )

    def test_ignores_what_is_no_trace_id(self) -> None:
        """
        A row's trace id is W3C hex or nothing.
        """
        with bind(trace_id="0" * 32, span_id="x") as ctx:
            pass

        assert (None, None) == (ctx.trace_id, ctx.span_id)

    def test_leaves_from_another_context(self) -> None:
        """
        A scope that a generator leaves in another thread ends without an error.
        """

        def dependency() -> Iterator[Context]:
            with bind("r") as ctx:
                yield ctx

        generator = dependency()
        entered = copy_context().run(next, generator)
        left = copy_context().run(next, generator, None)

        assert ("r", None, None) == (entered.request_id, left, current())

    def test_leaving_late_does_not_disturb_a_later_scope(self) -> None:
        """
        Only the scope's own cell is taken back, not one opened since.
        """

        def other() -> str | None:
            with bind("later"):
                late.__exit__(None, None, None)
                return current_request_id()

        late = bind("early")
        copy_context().run(late.__enter__)

        assert "later" == copy_context().run(other)

    def test_with_request_id_mints_or_takes(self) -> None:
        """
        with_request_id changes the id and nothing else.
        """
        with bind("a", actor="ann"):
            with with_request_id("b") as given_id:
                pass
            with with_request_id() as minted:
                pass

        assert ("b", "ann") == (given_id.request_id, given_id.actor)
        assert MINTED.fullmatch(minted.request_id)

    def test_repr_names_what_is_known(self) -> None:
        """
        The repr shows the anchors that are set, without asking for the others.
        """
        with scope("r", request=1, ask_actor=lambda _: 1 / 0) as ctx:
            shown = repr(ctx)

        assert "Context(kind='other', request_id='r')" == shown


class TestScope:
    """
    Scopes of what came in over a wire.
    """

    def test_takes_over_nobodys_identity(self) -> None:
        """
        A listener started inside a request does not work in that user's name.
        """
        with bind("outer", actor="ann", tenant_id="t"), scope("inner") as ctx:
            pass

        assert ("inner", "outer", None, None) == (
            ctx.request_id,
            ctx.parent,
            ctx.actor,
            ctx.tenant_id,
        )

    def test_mints_for_a_bad_id(self) -> None:
        """
        Off the wire comes attacker text; an unusable id is replaced.
        """
        with scope(b"\r\n") as ctx:
            pass

        assert MINTED.fullmatch(ctx.request_id)

    def test_asks_at_first_use_and_once(self) -> None:
        """
        Middlewares' callables see the request when a value is wanted, not before.
        """
        asked: list[object] = []

        def ask(request: object) -> int:
            asked.append(request)
            return 42

        with scope("r", kind="http", request="the request", ask_actor=ask) as ctx:
            before = list(asked)
            names = [snapshot()[1], ctx.actor, snapshot()[1]]

        assert ([], ["42", "42", "42"], ["the request"]) == (before, names, asked)
        assert Context is type(ctx)

    def test_asks_again_while_there_is_no_answer(self) -> None:
        """
        A log line before authentication does not fix the row's tenant at None.
        """
        request: dict[str, str] = {}
        with scope("r", request=request, ask_tenant=lambda r: r.get("tenant")) as ctx:
            early = ctx.tenant_id
            request["tenant"] = "acme"
            late = ctx.tenant_id

        assert (None, "acme") == (early, late)

    def test_counts_what_a_callable_raises(self) -> None:
        """
        A broken callable costs its answer and nothing else.
        """
        before = context.failures()["askers"]
        with scope("r", kind="http", request=1, ask_client=lambda r: r.headers):
            client = snapshot()[5]

        assert (None, before + 1) == (client, context.failures()["askers"])

    def test_a_callable_that_logs_is_not_asked_again(self) -> None:
        """
        What a callable itself needs of the context it does without.
        """
        inside: list[str] = []

        def ask(request: object) -> str:
            inside.append(snapshot()[1])
            return "ann"

        with scope("r", kind="http", request=1, ask_actor=ask):
            outside = snapshot()[1]

        assert (["anonymous"], "ann") == (inside, outside)

    def test_identify_wins_over_a_callable(self) -> None:
        """
        Once named, nobody is asked.
        """
        with scope("r", request=1, ask_actor=lambda _: "asked", ask_tenant=str) as ctx:
            identify(actor="told")

        assert ("told", "1") == (ctx.actor, ctx.tenant_id)

    def test_what_is_known_holds_until_a_callable_answers(self) -> None:
        """
        The peer's address stands in while nobody names a better client.
        """
        request: dict[str, str] = {}
        with scope("r", client="peer", request=request, ask_client=dict.popitem) as ctx:
            early = ctx.client
            with bind(method="ui") as child:
                inherited = child.client
            context.ask(ctx, request, client=lambda r: r.get("client"))
            later = ctx.client
            request["client"] = "told"

        assert ("peer", "peer", "peer", "told") == (
            early,
            inherited,
            later,
            ctx.client,
        )

    def test_an_inner_middleware_asks_too(self) -> None:
        """
        Callables may come when the scope is open: the later takes the other's place.
        """
        with scope("r", request=1, ask_actor=lambda _: "outer") as ctx:
            context.ask(ctx, "ann", actor=str, tenant=len)
            names = ctx.actor, ctx.tenant_id

        assert ("ann", "3") == names
        assert Context is type(ctx)

    def test_an_inner_middleware_does_not_rename(self) -> None:
        """
        Who is named already stays, whatever a later callable would say.
        """
        with scope("r") as ctx:
            identify(actor="told", tenant_id="acme")
            context.ask(ctx, "asked", actor=str, tenant=str)

        assert ("told", "acme") == (ctx.actor, ctx.tenant_id)

    def test_a_child_goes_on_asking(self) -> None:
        """
        A copied cell asks for itself what its parent has not been told.
        """
        with scope("r", request="ann", ask_actor=str, ask_client=str) as parent:
            client = parent.client
            with bind("s") as child:
                names = child.actor, child.client

        assert (("ann", "ann"), "ann") == (names, client)

    def test_unknown_attributes_are_errors(self) -> None:
        """
        A context with open questions has no more attributes than others.
        """
        with scope("r", request=1, ask_actor=str) as ctx, pytest.raises(AttributeError):
            ctx.actr  # type: ignore[attr-defined]  # noqa: B018

    def test_many_threads_ask_at_once(self) -> None:
        """
        All threads of a request see the same answer, whoever asked first.
        """
        barrier = threading.Barrier(8, timeout=10)
        ask = lambda _: "ann"  # noqa: E731

        def read(ctx: Context) -> tuple[str | None, ...]:
            barrier.wait()
            return ctx.actor, ctx.tenant_id, ctx.client

        with ThreadPoolExecutor(8) as pool:
            for _ in range(50):
                with scope(
                    request=1, ask_actor=ask, ask_tenant=ask, ask_client=ask
                ) as ctx:
                    answers = list(pool.map(read, [ctx] * 8))

                assert [("ann", "ann", "ann")] * 8 == answers

    def test_resume_goes_on_in_the_same_cell(self) -> None:
        """
        What one part of a request learns, the part after it knows.
        """
        with scope("r") as ctx:
            pass
        with resume(ctx):
            identify(actor="ann")

        assert (None, "ann") == (current(), ctx.actor)


class TestTrust:
    """
    FASTEN_TRUST_REQUEST_ID, as the HTTP shims read it.
    """

    def test_ids_are_trusted_unless_told_otherwise(self) -> None:
        """
        `init()` sets the switch; without one, callers' ids are taken over.
        """
        seen = [context.trusts_request_ids()]
        try:
            for is_trusted in (False, True):
                context.trust_request_ids(is_trusted)
                seen.append(context.trusts_request_ids())
        finally:
            context.trust_request_ids(True)

        assert [True, False, True] == seen


class TestIdentify:
    """
    Naming the caller.
    """

    def test_needs_a_scope(self) -> None:
        """
        Outside any scope it raises, and says what to do.
        """
        with pytest.raises(NotInScope, match=r"install the transport's shim or"):
            identify(actor="ann")

    def test_reaches_the_scope_from_a_thread_with_a_copied_context(self) -> None:
        """
        A sync FastAPI dependency runs in a thread: what it says is seen outside.
        """
        with scope("r", kind="http") as ctx, ThreadPoolExecutor(1) as pool:
            run = copy_context().run
            pool.submit(
                run, functools.partial(identify, actor=7, tenant_id="t")
            ).result()

        assert ("7", "t") == (ctx.actor, ctx.tenant_id)

    def test_reaches_the_scope_from_a_child_task(self) -> None:
        """
        A task of the request shares its cell.
        """

        async def request() -> str | None:
            with scope("r", kind="http") as ctx:
                await asyncio.create_task(name())
                return ctx.actor

        async def name() -> None:
            identify(actor="ann")

        assert "ann" == asyncio.run(request())

    def test_a_new_actor_drops_the_kind_of_the_old(self) -> None:
        """
        An actor without a kind is a user, whatever kind was there before.
        """
        with bind(actor="cron", actor_kind="scheduler"):
            identify(actor="ann")
            named = snapshot()[1:3]

        assert ("ann", "user") == named

    def test_changes_only_what_it_is_given(self) -> None:
        """
        Client and delegation are added beside an actor that stays.
        """
        with bind(actor="ann", actor_kind="admin") as ctx:
            identify(client="10.0.0.1", on_behalf_of="bob")

        assert ("ann", "admin", "10.0.0.1", "bob") == (
            ctx.actor,
            ctx.actor_kind,
            ctx.client,
            ctx.on_behalf_of,
        )


class TestSnapshot:
    """
    What a row takes from the context.
    """

    def test_outside_any_scope(self) -> None:
        """
        The system acts, under a sentinel id.
        """
        rid, *rest = snapshot()

        assert ["system", "system", *[None] * 6] == rest
        assert rid.startswith(("boot-", "orphan-"))

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [("http", ("anonymous", "user")), ("other", ("system", "system"))],
    )
    def test_nobody_named(self, kind: Any, expected: tuple[str, str]) -> None:
        """
        Nobody is anonymous over HTTP, and the system elsewhere.
        """
        with scope("r", kind=kind):
            named = snapshot()[1:3]

        assert expected == named

    def test_a_kind_without_an_actor_is_kept(self) -> None:
        """
        A scheduler's job runs as the system, of kind scheduler.
        """
        with scope("r", actor_kind="scheduler"):
            named = snapshot()[1:3]

        assert ("system", "scheduler") == named

    def test_all_of_it(self) -> None:
        """
        The order of the tuple is the order of the documentation.
        """
        with bind(
            "r",
            actor="ann",
            tenant_id="t",
            method="http",
            client="c",
            on_behalf_of="bob",
            trace_id=TRACE,
            span_id=SPAN,
        ):
            row = snapshot()

        assert ("r", "ann", "user", "t", "http", "c", "bob", TRACE, SPAN) == row

    @pytest.mark.parametrize(
        ("method", "actor"),
        [("http", "anonymous"), ("ui", "anonymous"), ("mqtt", "system")],
    )
    def test_a_wire_of_its_own_is_not_http(self, method: str, actor: str) -> None:
        """
        A message handled inside a request has no anonymous caller.
        """
        with scope("r", kind="http"), bind(method=method):
            named = snapshot()[1]

        assert actor == named


class TestSources:
    """
    Trace ids from elsewhere.
    """

    def test_fill_what_the_context_lacks(self, source: Any) -> None:
        """
        Both inside and outside a scope the running span is named.
        """
        source(lambda: {"trace_id": TRACE, "span_id": SPAN})
        outside = snapshot()[7:]
        with bind("r"):
            inside = snapshot()[7:]

        assert ((TRACE, SPAN), (TRACE, SPAN)) == (outside, inside)

    def test_never_contradict_the_context(self, source: Any) -> None:
        """
        A span of another trace is a false lead; one of the same trace is welcome.
        """
        source(lambda: {"trace_id": TRACE, "span_id": SPAN})
        with bind("r", trace_id="ab" * 16):
            foreign = snapshot()[7:]
        with bind("r", trace_id=TRACE):
            own = snapshot()[7:]

        assert (("ab" * 16, None), (TRACE, SPAN)) == (foreign, own)

    def test_a_running_span_is_nearer_than_the_callers(self, source: Any) -> None:
        """
        Of one trace the span at work here is named, and the caller's for want of it.
        """
        running: dict[str, str] = {}
        source(lambda: running)
        with scope("r", trace_id=TRACE, span_id=SPAN):
            before = snapshot()[7:]
            running |= {"trace_id": TRACE, "span_id": "ab" * 8}
            inside = snapshot()[7:], context.correlation()[2:]
            with bind(span_id="cd" * 8):
                told = snapshot()[7:]
            running["trace_id"] = "ef" * 16
            foreign = snapshot()[7:]

        assert (TRACE, SPAN) == before == foreign
        assert ((TRACE, "ab" * 8),) * 2 == inside
        assert (TRACE, "cd" * 8) == told

    def test_the_newest_answer_wins(self, source: Any) -> None:
        """
        Sources are asked from the last one added on, until one answers.
        """
        source(lambda: {"trace_id": TRACE, "span_id": SPAN})
        source(lambda: {"trace_id": "cd" * 16})
        source(dict)

        assert ("cd" * 16, None) == snapshot()[7:]

    @pytest.mark.parametrize(
        "given", [None, 7, {"trace_id": "x"}, {"trace_id": 5}, {"trace_id": "0" * 32}]
    )
    def test_nonsense_is_no_trace(self, given: Any, source: Any) -> None:
        """
        What is not W3C hex never reaches a row.
        """
        source(lambda: given)

        assert (None, None) == snapshot()[7:]

    def test_what_they_raise_is_counted(self, source: Any) -> None:
        """
        A broken source costs the trace id and nothing else.
        """
        before = context.failures()["sources"]
        source(lambda: 1 / 0)
        ids = snapshot()[7:]

        assert ((None, None), before + 1) == (ids, context.failures()["sources"])

    def test_one_that_logs_does_not_recurse(self, source: Any) -> None:
        """
        A source that takes a snapshot itself gets one without trace ids.
        """
        inner: list[Any] = []

        def logging_source() -> dict[str, str]:
            inner.append(snapshot()[7:])
            return {"trace_id": TRACE}

        source(logging_source)

        assert ((TRACE, None), [(None, None)]) == (snapshot()[7:], inner)


class TestCarry:
    """
    Threads, executors and callbacks.
    """

    def test_a_bare_thread_has_no_context(self) -> None:
        """
        This is what carry is for.
        """
        with bind("r"), ThreadPoolExecutor(1) as pool:
            lost = pool.submit(current_request_id).result()
            carried = pool.submit(carry(current_request_id)).result()

        assert (None, "r") == (lost, carried)

    def test_one_carried_function_serves_many_threads(self) -> None:
        """
        Eight threads run the same carried function at the same time.
        """
        barrier = threading.Barrier(8, timeout=10)

        def work(number: int) -> tuple[int, str | None]:
            barrier.wait()
            return number, current_request_id()

        with bind("r"):
            carried = carry(work)
        with ThreadPoolExecutor(8) as pool:
            done = list(pool.map(carried, range(8)))

        assert [(number, "r") for number in range(8)] == done

    def test_keeps_names_and_arguments(self) -> None:
        """
        The wrapper looks like what it wraps.
        """

        @carry
        def add(a: int, *, b: int) -> int:
            """
            Add.
            """
            return a + b

        assert (3, "add") == (add(1, b=2), add.__name__)

    def test_coroutine_functions_stay_coroutine_functions(self) -> None:
        """
        The context holds while the coroutine runs, and is put back after it.
        """

        async def work() -> str | None:
            await asyncio.sleep(0)
            return current_request_id()

        async def main(fn: Any) -> tuple[str | None, str | None]:
            return await fn(), current_request_id()

        with bind("r"):
            carried = carry(work)

        assert inspect.iscoroutinefunction(carried)
        assert ("r", None) == asyncio.run(main(carried))

    def test_takes_objects_with_an_async_call(self) -> None:
        """
        A callable object is carried as what its call is.
        """

        class Job:
            async def __call__(self) -> str | None:
                return current_request_id()

        with bind("r"):
            carried = carry(Job())

        assert "r" == asyncio.run(carried())

    def test_the_cell_is_shared(self) -> None:
        """
        A thread of the scope can name the caller.
        """
        with bind("r") as ctx:
            named = carry(functools.partial(identify, actor="ann"))
            thread = threading.Thread(target=named)
            thread.start()
            thread.join(10)

        assert "ann" == ctx.actor

    def test_the_executor_carries_by_itself(self) -> None:
        """
        Each job of ContextThreadPoolExecutor runs in its submitter's context.
        """
        with ContextThreadPoolExecutor(2) as pool:
            with bind("a"):
                first = pool.submit(current_request_id)
                mapped = list(pool.map(lambda _: current_request_id(), range(3)))
            with bind("b"):
                second = pool.submit(current_request_id)
            done = first.result(10), second.result(10)

        assert (("a", "b"), ["a"] * 3) == (done, mapped)


class TestCarriers:
    """
    Headers out and in.
    """

    def test_a_round_trip(self) -> None:
        """
        What is injected is extracted, through a carrier and through a dict.
        """
        headers, plain = Headers(), dict[str, str]()
        with bind("r-1"):
            inject(headers)
            inject(plain, "x-request-id")

        assert ("r-1", "r-1") == (extract(headers), extract(plain))
        assert isinstance(headers, context.Carrier)

    def test_outside_a_scope_nothing_is_written(self) -> None:
        """
        A sentinel must not travel: the receiver would refuse it.
        """
        headers = Headers()
        inject(headers)

        assert {} == headers.headers

    @pytest.mark.parametrize(
        ("headers", "expected"),
        [
            ({"x-request-id": "a"}, "a"),
            ({"request_id": b"b"}, "b"),
            ({"X-Request-ID": "bad id", "request_id": "c"}, "c"),
            ({"traceparent": f"00-{TRACE}-{SPAN}-03"}, TRACE),
            ({"X-Request-ID": "a", "traceparent": f"00-{TRACE}-{SPAN}-03"}, "a"),
            ({"X-Request-ID": "boot-a-1"}, None),
            ({}, None),
        ],
    )
    def test_extract(self, headers: dict[str, Any], expected: str | None) -> None:
        """
        The id's own header comes first, then the trace id; a bad one is none.
        """
        assert expected == extract(headers)


def test_suppressed_marks_fastens_own_work() -> None:
    """
    The mark holds inside the with-block and in nothing else.
    """
    before = context.is_suppressed()
    with suppressed():
        inside = context.is_suppressed()

    assert (False, True, False) == (before, inside, context.is_suppressed())
