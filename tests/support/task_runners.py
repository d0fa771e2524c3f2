"""Task runners, closed at the end of a test, and tasks for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sdp_lightning.rollout.task_runner import AsyncTaskRunner
from support.rollouts import DEADLINE_S

Make = Callable[..., AsyncTaskRunner]


@contextmanager
def runners_under_test() -> Iterator[Make]:
    """Makes runners, and closes them at the end."""
    runners: list[AsyncTaskRunner] = []

    def new(**settings: Any) -> AsyncTaskRunner:
        runners.append(AsyncTaskRunner(name="runner-under-test", **settings))
        return runners[-1]

    try:
        yield new
    finally:
        for runner in runners:
            runner.close(DEADLINE_S)
    assert not [t for t in threading.enumerate() if t.name == "runner-under-test"]


async def give(value: object) -> object:
    return value


async def fail(message: str = "boom") -> None:
    raise ValueError(message)


async def for_ever() -> None:
    await asyncio.Event().wait()


class Meeting:
    """Tasks that end only when all of them have started."""

    def __init__(self, size: int) -> None:
        self.size, self.started = size, 0
        self.all_here = asyncio.Event()

    async def attend(self) -> None:
        self.started += 1
        if self.started == self.size:
            self.all_here.set()
        await self.all_here.wait()
