"""HTTP calls to servers from any thread: an event loop in its own thread, with keep-alive.

A call has a timeout, or None where its caller awaits it with a deadline. It is retried only once,
if the server closes the connection before it answers; further retries are up to the caller, who
knows what may be sent twice.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import CancelledError, Future, TimeoutError as FutureTimeout
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import aiohttp

from sdp_lightning.engines.remote.addresses import proxy_of
from sdp_lightning.engines.remote.backend import Call
from sdp_lightning.engines.remote.open_files import open_files_error
from sdp_lightning.engines.remote.responses import (
    MAX_BYTES,
    ServerError,
    printable,
    read_events,
    read_refusal,
    read_whole,
    reading_answer,
)
from sdp_lightning.errors import EngineError

T = TypeVar("T")
_CLOSE_S = 10.0
_KEEPALIVE_S = 3.0  # below uvicorn's 5 s: a connection is never reused while the server closes it
_CA_REMEDY = "Name the certificate of its authority as ca_file, if it is not one of the system's."


class HttpClient:
    """One aiohttp session in an event loop in its own thread.

    The number of connections is not limited: a pause must never wait for the requests that it ends.

    Nothing that a server sends is kept or followed: no cookies, no redirects.

    Args:
        api_key: sent as a bearer token; None sends none.
        tls: whose certificates are believed at ``https`` addresses; None: the system's.
        use_proxy: whether calls go through the proxy that the environment names for their server.
    """

    def __init__(
        self,
        *,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        use_proxy: bool = False,
    ) -> None:
        self._tls, self._use_proxy = tls, use_proxy
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._lock = threading.Lock()  # work is handed over before the shutdown
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._session: aiohttp.ClientSession | None = None

    def start(self) -> None:
        """Start the thread. No-op if it runs."""
        if self._thread is not None:
            return
        loop = asyncio.new_event_loop()
        self._loop = loop
        self._thread = threading.Thread(target=self._serve, args=(loop,), name="sdp-http")
        self._thread.daemon = True
        self._thread.start()
        self.run(self._open(), 10.0)

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run ``work`` in the client's event loop and wait for it, from another thread.

        Raises:
            EngineError: if it takes longer than ``timeout_s``, or the client is closed.
        """
        future = self._hand_over(work)
        try:
            return future.result(timeout_s)
        except CancelledError as error:
            raise EngineError("the engine was closed meanwhile.") from error
        except FutureTimeout as error:
            if not future.done():
                future.cancel()
                raise EngineError(
                    f"no answer from the servers within {timeout_s:.1f} s."
                ) from error
            raise

    async def bridge(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work``, which runs in the client's event loop, from another event loop.

        Raises:
            EngineError: if the client is closed before ``work`` ends.
        """
        future = self._hand_over(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if future.cancelled() and task is not None and not task.cancelling():
                raise EngineError("the engine was closed meanwhile.") from error
            raise

    def spawn(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        """Run ``work`` in the client's event loop until it ends or the client is closed."""
        return self._hand_over(work)

    async def request(
        self, url: str, call: Call, *, timeout_s: float | None, max_bytes: int = MAX_BYTES
    ) -> Any:
        """Send ``call`` to the server at ``url``; await it in the client's event loop.

        Returns:
            The answer's JSON, None if it is empty, or its text if ``call.answer`` is ``"text"``.

        Raises:
            ServerError: naming server and path; also if the answer has more than ``max_bytes``.
            OpenFilesError: if this process cannot open a connection.
        """
        async with self._sent(url, call, timeout_s) as answer:
            as_text = call.answer == "text"
            return await read_whole(_where(url, call), answer, max_bytes, as_text=as_text)

    async def stream(
        self, url: str, call: Call, *, timeout_s: float | None, max_bytes: int
    ) -> AsyncGenerator[Any]:
        """Send ``call``, which is answered by server-sent events; in the client's event loop.

        Yields:
            The JSON of each event before the final ``[DONE]``.

        Raises:
            ServerError: naming server and path; also if the stream breaks off, or all of it has
                more than ``max_bytes``.
        """
        async with self._sent(url, call, timeout_s) as answer:
            async for event in read_events(_where(url, call), answer, max_bytes):
                yield event

    @asynccontextmanager
    async def _sent(
        self, url: str, call: Call, timeout_s: float | None
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """Context of an answer with status 200; errors while it is read become ``ServerError``."""
        if self._session is None:
            raise EngineError("the client is closed.")
        where = _where(url, call)
        send = partial(
            self._session.request,
            call.method,
            url + call.path,
            json=call.body,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            allow_redirects=False,
            proxy=proxy_of(url) if self._use_proxy else None,
        )
        with reading_answer(where):
            try:
                try:
                    response = await send()
                except aiohttp.ServerDisconnectedError:
                    # The server closed a kept connection at that moment and has seen nothing, which
                    # happens if either side stalls; or it died, and refuses the next connection.
                    response = await send()
                async with response as answer:
                    if answer.status != 200:
                        raise await read_refusal(where, answer)
                    yield answer
            except TimeoutError as error:
                raise ServerError(f"{where} did not answer within {timeout_s:.1f} s.") from error
            except (aiohttp.ClientError, OSError) as error:
                if isinstance(error, OSError) and (limit := open_files_error(error)):
                    raise limit from error
                remedy = f" {_CA_REMEDY}" if isinstance(error, aiohttp.ClientSSLError) else ""
                cause = f"{type(error).__name__}: {printable(str(error))}"
                raise ServerError(f"{where}: {cause}{remedy}") from error

    def close(self) -> None:
        """End the thread and cancel its work. Safe to call twice."""
        with self._lock:
            loop, self._loop = self._loop, None
            if loop is None or self._thread is None:
                return
            loop.call_soon_threadsafe(lambda: loop.create_task(self._wind_up(loop)))
        self._thread.join(_CLOSE_S)

    async def _open(self) -> None:
        connector = aiohttp.TCPConnector(
            limit=0, keepalive_timeout=_KEEPALIVE_S, ssl=self._tls or True
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={"Accept-Encoding": "identity", **self._headers},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def _wind_up(self, loop: asyncio.AbstractEventLoop) -> None:
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        session, self._session = self._session, None
        if session is not None:
            await session.close()
        await loop.shutdown_default_executor()  # its threads resolved host names
        loop.stop()

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            loop.close()

    def _hand_over(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if self._loop is None:
                work.close()
                raise EngineError("the engine is closed, or was not started.")
            return asyncio.run_coroutine_threadsafe(work, self._loop)


def _where(url: str, call: Call) -> str:
    return f"{url}{call.path.partition('?')[0]}"
