"""The address of agents: an HTTP server beside the rollouts, whose keys each open one sample.

It lives in the event loop of the rollouts, and ends with it. It knows sessions, not engines.
Keys are in no log and no error.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import secrets
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.rewards.timeouts import call_aside_if_long
from sdp_lightning.workflows.agent.apis.api import Api, Event
from sdp_lightning.workflows.agent.apis.chat_completions import ChatCompletions
from sdp_lightning.workflows.agent.apis.completions import Completions, Generate
from sdp_lightning.workflows.agent.apis.messages import Messages
from sdp_lightning.workflows.agent.apis.responses import Responses
from sdp_lightning.workflows.agent.request import AgentRequest, Answer, RefusedRequest
from sdp_lightning.workflows.agent.session import AgentSession

logger = logging.getLogger(__name__)
_WIRE = logging.getLogger(f"{__name__}.wire")  # of aiohttp: what strangers send, keys among it
_WIRE.setLevel(logging.CRITICAL)

MAX_BODY = 16 * 2**20  # bytes
KEEP_ALIVE_S = 10.0  # between comments of a stream that has no answer yet
_BODY_S = 60.0  # to read a body
_WRITE_S = 60.0  # to write a piece to a client that reads slowly
_MOST_ENDED = 10_000  # ended sessions that are told from unknown keys
_APIS: tuple[Api, ...] = (
    ChatCompletions(),
    Completions(),
    Messages(),
    Responses(),
    Generate(),
)


@dataclass(frozen=True)
class Endpoint:
    """The address of a policy for one agent: what clients of OpenAI's API are made with.

    Attributes:
        base_url: ends with ``/v1``.
        api_key: opens this sample alone.
        model: name of the model.
    """

    base_url: str
    api_key: str = field(repr=False)
    model: str


class Gateway:
    """Serves the sessions of one event loop.

    Args:
        host: address or name to listen at.
        port: 0 is any that is free.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._sessions: dict[bytes, tuple[bytes, AgentSession]] = {}
        self._ended: OrderedDict[bytes, None] = OrderedDict()
        loop = asyncio.get_running_loop()
        self._started: asyncio.Future[str] = loop.create_future()
        self._serving = loop.create_task(self._serve(), name="sdp-gateway")

    async def open(self, session: AgentSession) -> Endpoint:
        """The endpoint of a session, which is answered from now on.

        Raises:
            ConfigError: if the gateway cannot listen.
        """
        base_url = await asyncio.shield(self._started)
        key = f"sk-sdp-{secrets.token_urlsafe(32)}"
        self._sessions[_digest(key)] = key.encode(), session
        return Endpoint(base_url, key, session.settings.model)

    async def close(self, endpoint: Endpoint) -> None:
        """End a session: what is under way is cancelled, and its key opens nothing."""
        digest = _digest(endpoint.api_key)
        _, session = self._sessions.pop(digest)
        self._ended[digest] = None
        if len(self._ended) > _MOST_ENDED:
            self._ended.popitem(last=False)
        await session.end()

    async def _serve(self) -> None:
        app = web.Application(client_max_size=MAX_BODY)
        for api in _APIS:
            for path in (api.path, f"/v1{api.path}"):  # clients differ in what is the base
                app.router.add_post(path, _Handler(self, api).handle)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name}", self._models)
        app.router.add_route("*", "/{rest:.*}", self._nowhere)
        runner = web.AppRunner(
            app, access_log=None, logger=_WIRE, handler_cancellation=True, shutdown_timeout=1.0
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, self._host, self._port)
            try:
                await site.start()
                self._started.set_result(self._base_url(runner.addresses[0]))
            except OSError as error:
                reason = f"agents cannot be served at {self._host}:{self._port}: {error.strerror}."
                self._started.set_exception(ConfigError(f"{reason} Set another host or port."))
                return
            await asyncio.get_running_loop().create_future()  # until the loop ends
        finally:
            self._started.cancel()  # whoever waits for a start that did not come
            _GATEWAYS.get(asyncio.get_running_loop(), {}).pop((self._host, self._port), None)
            await runner.cleanup()
            for _ in range(3):  # in which connections that were closed let go of their sockets
                await asyncio.sleep(0)

    def _base_url(self, address: tuple[Any, ...]) -> str:
        found = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if not found.is_loopback:
            logger.warning(
                "agents are served at %s, which other machines may reach, without encryption: "
                "keys and conversations can be read on the way. Use a private network.",
                found,
            )
        if found.is_unspecified:
            found = ipaddress.ip_address("127.0.0.1" if found.version == 4 else "::1")
        host = f"[{found}]" if found.version == 6 else str(found)
        return f"http://{host}:{address[1]}/v1"

    def session_of(self, request: web.Request) -> AgentSession:
        """The session that a request's key opens; ``RefusedRequest`` if it opens none."""
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        digest = _digest(key)
        expected, session = self._sessions.get(digest, (b"", None))
        if session is not None and hmac.compare_digest(expected, key.encode()):
            session.refuse_if_ended()
            return session
        if digest in self._ended:
            raise RefusedRequest(
                403, "session_ended", "this key's sample has ended: its agent returned, or was cut."
            )
        raise RefusedRequest(
            401, "invalid_api_key", "the key is unknown: use the api_key of the agent's endpoint."
        )

    async def _models(self, request: web.Request) -> web.Response:
        """The one model, in a list or, under its name, alone."""
        try:
            name = self.session_of(request).settings.model
        except RefusedRequest as refused:
            return refusal(_APIS[0], refused)
        about = {"id": name, "object": "model", "created": 0, "owned_by": "sdp-lightning"}
        is_list = "name" not in request.match_info
        return web.json_response({"object": "list", "data": [about]} if is_list else about)

    async def _nowhere(self, request: web.Request) -> web.Response:
        paths = ", ".join(f"POST {api.path}" for api in _APIS)
        told = f"there is no {request.method} {request.path[:80]}; there is {paths}."
        return refusal(_APIS[0], RefusedRequest(404, "not_found", told))


@dataclass(frozen=True)
class _Handler:
    """Answers the requests of one API."""

    gateway: Gateway
    api: Api

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The answer to one request, or its error."""
        session: AgentSession | None = None
        try:
            session = self.gateway.session_of(request)
            raw = await self._body(request)
            asked, body, digest = await call_aside_if_long(
                "reading a request", raw, self._read, raw
            )
            is_retry = request.headers.get("x-stainless-retry-count", "0") != "0"
            answering = session.answer(asked, body, digest, is_retry=is_retry)
            if asked.is_streamed:
                return await self._stream(request, session, asked, asyncio.ensure_future(answering))
            answer = await answering
            return web.json_response(self.api.write(answer, asked, session.settings.model))
        except RefusedRequest as refused:
            if session is not None:
                session.counts.refused += 1
            return refusal(self.api, refused)
        except RolloutError as error:  # of its messages; that of a sample is also its session's
            return refusal(self.api, RefusedRequest(400, "invalid_request", str(error)))
        except Exception as error:  # the sample fails with it
            if session is None:
                raise
            session.fail(error)
            return refusal(self.api, _broken(error))

    async def _body(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(_BODY_S):
                return await request.read()
        except web.HTTPRequestEntityTooLarge:
            most = f"a body may have {MAX_BODY} bytes."
            raise RefusedRequest(413, "request_too_large", most) from None
        except TimeoutError:
            late = f"the body was not sent within {_BODY_S:g} s."
            raise RefusedRequest(408, "timeout", late) from None
        except Exception as error:  # whatever is wrong with a body is its client's
            wrong = f"the body cannot be read: {type(error).__name__}."
            raise RefusedRequest(400, "invalid_request", wrong) from error

    def _read(self, raw: bytes) -> tuple[AgentRequest, Mapping[str, Any], str]:
        try:
            body: Any = json.loads(raw)
            if not isinstance(body, dict):
                raise RefusedRequest(400, "invalid_json", "the body must be a JSON object.")
            asked = self.api.read(body)  # pyright: ignore[reportUnknownArgumentType]
        except (ValueError, RecursionError) as error:
            raise RefusedRequest(400, "invalid_json", f"the body is no JSON: {error}") from None
        digest = hashlib.blake2b(self.api.path.encode() + raw, digest_size=20).hexdigest()
        return asked, body, digest  # pyright: ignore[reportUnknownVariableType]

    async def _stream(
        self,
        request: web.Request,
        session: AgentSession,
        asked: AgentRequest,
        answering: asyncio.Future[Answer],
    ) -> web.StreamResponse:
        """Server-sent events: comments until there is an answer, then all of it."""
        response = web.StreamResponse(headers={"Cache-Control": "no-cache"})
        response.content_type = "text/event-stream"
        try:
            while not (await asyncio.wait([answering], timeout=KEEP_ALIVE_S))[0]:
                if not response.prepared:
                    await response.prepare(request)
                await _send(response, ": keep-alive\n\n")
            if not response.prepared:
                answering.result()  # an error before the first byte has a status of its own
                await response.prepare(request)
            for event in self._events(session, asked, answering):
                await _send(response, _text_of(event))
            await response.write_eof()
        except (ConnectionError, TimeoutError):  # it may ask again, for the answer that is kept
            if request.transport is not None:
                request.transport.abort()
        finally:
            answering.cancel()
        return response

    def _events(
        self, session: AgentSession, asked: AgentRequest, answering: asyncio.Future[Answer]
    ) -> list[Event]:
        error = answering.exception()
        if error is None:
            model = session.settings.model
            return list(self.api.events(answering.result(), asked, model))
        refused = error if isinstance(error, RefusedRequest) else _broken(error)
        return [Event(self.api.error(refused), "error")]


def refusal(api: Api, refused: RefusedRequest) -> web.Response:
    """An error of an API, which its clients do not try again."""
    return web.json_response(
        api.error(refused), status=refused.status, headers={"x-should-retry": "false"}
    )


def _broken(error: BaseException) -> RefusedRequest:
    return RefusedRequest(500, "sample_failed", f"the sample failed: {type(error).__name__}.")


def _text_of(event: Event) -> str:
    data = event.data if isinstance(event.data, str) else json.dumps(event.data)
    return f"event: {event.name}\ndata: {data}\n\n" if event.name else f"data: {data}\n\n"


async def _send(response: web.StreamResponse, text: str) -> None:
    async with asyncio.timeout(_WRITE_S):
        await response.write(text.encode())


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


_GATEWAYS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, int], Gateway]] = (
    weakref.WeakKeyDictionary()
)


def gateway_at(host: str, port: int) -> Gateway:
    """The gateway of the running event loop at an address; it is made by the first who asks."""
    gateways = _GATEWAYS.setdefault(asyncio.get_running_loop(), {})
    if (host, port) not in gateways:
        gateways[host, port] = Gateway(host, port)
    return gateways[host, port]
