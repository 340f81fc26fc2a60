# SPDX-License-Identifier: Apache-2.0
"""
Streams of answers in the scope of one call: it is set for each step, not between them.

Whoever reads the stream has a scope of its own, or none.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterable
from typing import Any, TypeVar

from fasten.context import Context, resume

__all__ = ["stepwise", "stepwise_async"]

T = TypeVar("T")


def stepwise(answers: Iterable[T], ctx: Context) -> Generator[T, None, Any]:
    """
    Go through *answers*, each made within *ctx*, and end them there; return what a
    generator returns.
    """
    waiting = iter(answers)
    try:
        while True:
            with resume(ctx):
                try:
                    answer = next(waiting)
                except StopIteration as end:
                    return end.value
            yield answer
    finally:
        with resume(ctx):
            getattr(waiting, "close", bool)()


async def stepwise_async(
    answers: AsyncGenerator[T, None], ctx: Context
) -> AsyncGenerator[T, None]:
    """
    Go through *answers* as `stepwise` does.
    """
    try:
        while True:
            with resume(ctx):
                try:
                    answer = await anext(answers)
                except StopAsyncIteration:
                    return
            yield answer
    finally:
        with resume(ctx):
            await answers.aclose()
