"""Futures that are settled from another thread than their event loop's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from sdp_lightning.distributed.event_loop import call_in, settle


def in_thread(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_future_is_settled_once_by_whichever_thread_comes_first() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        result, failure, cancelled = (loop.create_future() for _ in range(3))
        cancelled.cancel()
        for future, outcome in ((result, 7), (failure, KeyError("x")), (cancelled, 1)):
            in_thread(lambda future=future, outcome=outcome: settle(future, outcome))
            in_thread(lambda future=future: settle(future, "too late"))
        assert await result == 7
        with pytest.raises(KeyError):
            await failure
        await asyncio.sleep(0)
        assert cancelled.cancelled()

    asyncio.run(main())


def test_a_closed_loop_is_left_alone() -> None:
    loop = asyncio.new_event_loop()
    future = loop.create_future()
    loop.close()
    settle(future, None)
    call_in(loop, lambda: None)
    assert not future.done()
