# SPDX-License-Identifier: Apache-2.0
"""
gRPC: a real server and a real channel, sync and aio, all four kinds of call.

The handlers are generic ones: messages are bytes, and no compiler is needed.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager

import grpc
import pytest

import fasten
from fasten.shim.grpc import (
    AioServerInterceptor,
    ClientInterceptor,
    ServerInterceptor,
    aio_client_interceptors,
)

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
ROOMY = [
    ("grpc.max_metadata_size", 4 << 20),
    ("grpc.absolute_max_metadata_size", 8 << 20),
]


def here(phase=""):
    """
    Record a row; answer what the context says.
    """
    fasten.emit("ORDER_PLACED", f"ord{phase}")
    ctx = fasten.current()
    return f"{ctx.request_id} {ctx.method} {ctx.client.partition(':')[0]}".encode()


def requests_of(given):
    """
    Return the requests of a call, of one or of many.
    """
    return [given] if isinstance(given, bytes) else list(given)


def unary(request, context):
    """
    Answer once; fail when asked to.
    """
    if requests_of(request)[0] == b"fail":
        raise ValueError("as asked")
    return here()


def stream(request, context):
    """
    Answer three times, and record a row when it is over or left.
    """
    assert requests_of(request)
    try:
        for _ in range(3):
            yield here()
    finally:
        here("-end")


async def requests_of_aio(given):
    """
    Return the requests of a call, of one or of many.
    """
    return [given] if isinstance(given, bytes) else [one async for one in given]


async def unary_aio(request, context):
    """
    Answer once; fail when asked to.
    """
    await asyncio.sleep(0)
    if (await requests_of_aio(request))[0] == b"fail":
        raise ValueError("as asked")
    return here()


async def stream_aio(request, context):
    """
    Answer three times, and record a row when it is over or left.
    """
    assert await requests_of_aio(request)
    try:
        for _ in range(3):
            yield here()
            await asyncio.sleep(0)
    finally:
        here("-end")


async def writer_aio(request, context):
    """
    Answer three times by writing.
    """
    assert await requests_of_aio(request)
    for _ in range(3):
        await context.write(here())


def handlers(one, many):
    """
    Make a service of the four kinds.
    """
    return grpc.method_handlers_generic_handler(
        "shop.Shop",
        {
            kind: getattr(grpc, f"{kind}_rpc_method_handler")(
                many if kind.endswith("stream") else one
            )
            for kind in KINDS
        },
    )


@contextmanager
def serving(one=unary, many=stream):
    """
    Serve in one thread; yield the address.
    """
    server = grpc.server(
        ThreadPoolExecutor(1), interceptors=[ServerInterceptor()], options=ROOMY
    )
    server.add_generic_rpc_handlers((handlers(one, many),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait(10)


@asynccontextmanager
async def serving_aio(one=unary_aio, many=stream_aio):
    """
    Serve from the running loop; yield the address.
    """
    server = grpc.aio.server(
        ThreadPoolExecutor(1), interceptors=[AioServerInterceptor()], options=ROOMY
    )
    server.add_generic_rpc_handlers((handlers(one, many),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def call(channel, kind, request=b"r", **options):
    """
    Call a method, and return all its answers as text.
    """
    given = iter([request, request]) if kind.startswith("stream") else request
    answer = getattr(channel, kind)(f"/shop.Shop/{kind}")(given, timeout=20, **options)
    answers = [answer] if kind.endswith("unary") else list(answer)
    return [one.decode() for one in answers]


async def call_aio(channel, kind, request=b"r", **options):
    """
    Call a method, and return all its answers as text.
    """
    given = iter([request, request]) if kind.startswith("stream") else request
    answer = getattr(channel, kind)(f"/shop.Shop/{kind}")(given, timeout=20, **options)
    if kind.endswith("unary"):
        return [(await answer).decode()]
    return [one.decode() async for one in answer]


@pytest.mark.parametrize("kind", KINDS)
def test_the_id_goes_with_a_call(fasten_trail, kind):
    """
    A call of each kind is served under the caller's id, each message of its answer.
    """
    with serving() as address, grpc.insecure_channel(address, ROOMY) as bare:
        channel = grpc.intercept_channel(bare, ClientInterceptor())
        with fasten.bind("req-1", method="http"):
            answers = call(channel, kind)
        own = call(channel, kind, metadata=(("x-request-id", "req-2"),))
        minted, again = call(channel, kind)[0], call(channel, kind)[0]

    assert {"req-1 grpc ipv4"} == set(answers)
    assert {"req-2 grpc ipv4"} == set(own)
    assert 32 == len(minted.split()[0])
    assert minted != again
    ends = [row["request_id"] for row in fasten_trail.audit if "-end" in row["target"]]
    assert (["req-1", "req-2"] if kind.endswith("stream") else []) == ends[:2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("one", "many"), [(unary_aio, stream_aio), (unary_aio, writer_aio), (unary, stream)]
)
def test_the_id_goes_with_an_aio_call(fasten_trail, kind, one, many):
    """
    So it is in asyncio, for coroutines, asynchronous generators, writers and plain
    functions.
    """

    async def run():
        options = {"interceptors": aio_client_interceptors(), "options": ROOMY}
        async with (
            serving_aio(one, many) as address,
            grpc.aio.insecure_channel(address, **options) as channel,
        ):
            with fasten.bind("req-1", method="http"):
                answers = await call_aio(channel, kind)
            metadata = grpc.aio.Metadata(("x-request-id", "req-2"))
            own = await call_aio(channel, kind, metadata=metadata)
            minted = (await call_aio(channel, kind))[0]
            return answers, own, minted

    answers, own, minted = asyncio.run(run())

    assert {"req-1 grpc ipv4"} == set(answers)
    assert {"req-2 grpc ipv4"} == set(own)
    assert 32 == len(minted.split()[0])


HOSTILE = [
    (("x-request-id", "x" * 1_000_000),),
    (("x-request-id", "boot-shop-1"),),
    (("x-request-id", "a b"),),
    (("x-request-id", ""),),
    (("x-request-id-bin", b"\0\xff"),),
    tuple(("x-request-id", f"bad {n}") for n in range(65)),
]


@pytest.mark.parametrize("metadata", HOSTILE)
@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
def test_forged_ids(fasten_trail, metadata, kind):
    """
    What is no id is not taken for one, and the call is served.
    """
    with serving() as address, grpc.insecure_channel(address, ROOMY) as channel:
        answers = call(channel, kind, metadata=metadata)

    assert {32} == {len(answer.split()[0]) for answer in answers}
    assert 1 == len(set(answers))


def test_of_many_ids_the_first_usable_one_counts(fasten_trail):
    """
    Copies of the key do no harm; without one a `traceparent` will do.
    """
    copies = tuple(("x-request-id", f"bad {n}") for n in range(64))
    trace = "0af7651916cd43dd8448eb211c80319c"
    parent = (("traceparent", f"00-{trace}-b7ad6b7169203331-01"),)
    with serving() as address, grpc.insecure_channel(address, ROOMY) as channel:
        first = call(
            channel, "unary_unary", metadata=(*copies, ("x-request-id", "req-3"))
        )
        second = call(channel, "unary_unary", metadata=parent)

    assert ["req-3 grpc ipv4"] == first
    assert [f"{trace} grpc ipv4"] == second


def test_bytes_that_are_no_text(fasten_trail):
    """
    Bytes that gRPC itself would refuse to send, a NUL among them, are no id either.
    """
    from fasten_shims import grpc as shim

    for value in (b"a\0b", "a\0b", b"\xff\xfe", None, 7):
        assert None is shim._id_of((("x-request-id", value),))


def test_failures_and_unknown_methods(fasten_trail):
    """
    What a handler raises is what the caller gets; an unknown method stays unknown.
    """
    with serving() as address, grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as failed:
            call(channel, "unary_unary", b"fail")
        with pytest.raises(grpc.RpcError) as unknown:
            channel.unary_unary("/shop.Shop/other")(b"r", timeout=20)

    assert "Exception calling application: as asked" == failed.value.details()
    assert grpc.StatusCode.UNIMPLEMENTED is unknown.value.code()


def test_nothing_is_left_in_a_thread(fasten_trail):
    """
    A stream that the caller leaves is ended in its scope, and the thread that served
    it is as it was.
    """
    pool = ThreadPoolExecutor(1)
    server = grpc.server(pool, interceptors=[ServerInterceptor()])
    server.add_generic_rpc_handlers((handlers(unary, stream),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        metadata = (("x-request-id", "req-4"),)
        answers = channel.unary_stream("/shop.Shop/unary_stream")(
            b"r", metadata=metadata, timeout=20
        )
        next(answers)
        answers.cancel()
        left = pool.submit(fasten.current).result(20)
    server.stop(None).wait(10)

    assert None is left
    assert "req-4" == fasten_trail.assert_correlated("req-4")
