"""Calls to servers from any thread: one event loop of its own, connections kept alive.

Every call has a deadline. Nothing is retried here: what may be sent twice is the caller's to know.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

import aiohttp

from sdp_lightning.engines.backend import Call
from sdp_lightning.errors import EngineError

T = TypeVar("T")
_SHOWN = 300  # characters of an answer in an error


class ServerError(EngineError):
    """A server did not answer as it should.

    Attributes:
        status: of the answer; None if there was none: no connection, no answer in time, or one
            that broke off.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_refusal(self) -> bool:
        """Whether the request itself is at fault: another server would refuse it too."""
        return self.status is not None and 400 <= self.status < 500


class HttpClient:
    """One aiohttp session in an event loop of its own thread.

    Args:
        api_key: sent as a bearer token; None sends none.
        max_connections: at once, over all servers.
    """

    def __init__(self, *, api_key: str | None = None, max_connections: int = 1024) -> None:
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._max_connections = max_connections
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._session: aiohttp.ClientSession | None = None

    def start(self) -> None:
        """Start the thread. Does nothing if it runs."""
        if self._thread is not None:
            return
        loop = asyncio.new_event_loop()
        self._loop = loop
        self._thread = threading.Thread(target=self._serve, args=(loop,), name="sdp-http")
        self._thread.daemon = True
        self._thread.start()
        self.run(self._open(), 10.0)

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run ``work`` in the client's loop and wait, from another thread.

        Raises:
            EngineError: if it takes longer than ``timeout_s``, or the client is closed.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._require_loop(work))
        try:
            return future.result(timeout_s)
        except FutureTimeout as error:
            if not future.done():
                future.cancel()
                raise EngineError(
                    f"no answer from the servers within {timeout_s:.0f} s."
                ) from error
            raise

    async def bridge(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work``, which runs in the client's loop, from another event loop."""
        loop = self._require_loop(work)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Let ``work`` run in the client's loop until it ends or the client is closed."""
        asyncio.run_coroutine_threadsafe(work, self._require_loop(work))

    async def request(self, url: str, call: Call, *, timeout_s: float) -> Any:
        """Send ``call`` to the server at ``url``; in the client's loop.

        Returns:
            The answer's JSON, or None for an empty one.

        Raises:
            ServerError: naming server and path.
        """
        if self._session is None:
            raise EngineError("the client is closed.")
        where = f"{url}{call.path.partition('?')[0]}"
        limit = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                call.method, url + call.path, json=call.body, timeout=limit
            ) as answer:
                text = await answer.text()
                status = answer.status
        except TimeoutError as error:
            raise ServerError(f"{where} did not answer within {timeout_s:.0f} s.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(f"{where}: {type(error).__name__}: {error}") from error
        if status != 200:
            raise ServerError(f"{where} answered {status}: {text[:_SHOWN]}", status)
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise ServerError(f"{where} answered no JSON: {text[:_SHOWN]!r}") from error

    def close(self) -> None:
        """End the thread; what is under way is cancelled. Safe to call twice."""
        loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        loop.call_soon_threadsafe(lambda: loop.create_task(self._wind_up(loop)))
        self._thread.join(10.0)

    async def _open(self) -> None:
        connector = aiohttp.TCPConnector(limit=self._max_connections, keepalive_timeout=30.0)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)

    async def _wind_up(self, loop: asyncio.AbstractEventLoop) -> None:
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        session, self._session = self._session, None
        if session is not None:
            await session.close()
        loop.stop()

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            loop.close()

    def _require_loop(self, work: Coroutine[Any, Any, Any]) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            work.close()
            raise EngineError("the engine is closed, or was not started.")
        return self._loop
