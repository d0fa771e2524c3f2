"""What an engine does with its servers, in the client's event loop: routing, publishing, repair.

A request that a server took down with it is sent to another one, which is safe: what was sampled
there and not streamed never reached anybody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import monotonic

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote.backend import Chunk, Completion, assemble
from sdp_lightning.engines.remote.http_client import ServerError, ServerLost
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.replicas import Replica, ReplicaSet
from sdp_lightning.engines.remote.server_client import (
    LOADING,
    ServerClient,
    check_length,
    check_versions,
)
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.weights.protocol import WeightTransport

logger = logging.getLogger(__name__)

_INTERRUPTED = Completion((), "abort")
_MOST_DOUBLINGS = 5


class ServerPool:
    """The servers of one engine. Every coroutine runs in one event loop.

    Args:
        urls: one for each server.
        control: tells and asks one server.
        transport: carries weights; None where another rank leads: its engine alone pauses, loads
            and resumes the servers.
        options: deadlines and policies.
        explain: what is known of a server that is out, beyond the error.

    Attributes:
        version: that the servers sample; None before the first publish.
        publishing: nobody else touches the servers meanwhile; so it is until the first publish.
        error: why the engine is unusable.
    """

    def __init__(
        self,
        urls: list[str],
        client: ServerClient,
        transport: WeightTransport | None,
        options: RemoteOptions,
        explain: Callable[[str], str] = lambda _: "",
    ) -> None:
        self.version: int | None = None
        self.publishing = True
        self.error: EngineError | None = None
        self._set = ReplicaSet(urls, explain)
        self._client, self._transport, self._options = client, transport, options
        self._slots = asyncio.Semaphore(options.max_requests)

    @property
    def replicas(self) -> list[Replica]:
        """All of them."""
        return self._set.replicas

    @property
    def num_serving(self) -> int:
        """Servers that take requests."""
        return len(self._set.serving)

    @property
    def serving_urls(self) -> list[str]:
        """Theirs."""
        return [replica.url for replica in self._set.serving]

    def raise_if_unusable(self) -> None:
        """``EngineError`` after a publish that failed."""
        if self.error is not None:
            raise EngineError(f"the engine is unusable since: {self.error}") from self.error

    # Starting, publishing ------------------------------------------------------------------------

    async def connect(self) -> None:
        """Reach every server, and refuse one that could not be trained on."""

        async def one(replica: Replica) -> None:
            try:
                await self._client.check(replica)
                if await self._client.get_version(replica) == LOADING:
                    # Its last load failed: whatever it samples now would kill it.
                    await self._client.describe(replica)
                    replica.handshake_done = False
                else:
                    await self._client.handshake(replica)
            except ConfigError:
                raise
            except EngineError as error:
                raise EngineError(
                    f"cannot use the {self._client.kind} server at {replica.url}: {error} Is it "
                    "running there? `sdp-lightning doctor --config FILE` asks; engine="
                    "'vllm://launch' starts one, and 'embedded' needs none."
                ) from error
            self._set.bring_in(replica)

        results = await asyncio.gather(*map(one, self.replicas), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def pause(self) -> None:
        """Stop sampling everywhere; where another rank leads, only let requests arrive."""
        options = self._options
        if self.version is not None and self._transport is not None:
            # Those that failed lately may be on their way back.
            await self._set.wait_for(options.min_replicas, options.recover_s)
        self.publishing = True
        keep = options.on_update == "keep"
        if not keep:
            await self._set.settle(options.settle_s)
        if self._transport is not None:
            await self._for_each_serving(self._client.pause, "pausing")

    async def drain(self) -> None:
        """Wait for what a pause interrupted; take back what had not arrived before it."""
        if self._options.on_update != "keep":
            await self._set.drain(self._options.abort_grace_s)

    async def follow(self, version: int, urls: list[str]) -> None:
        """The leading rank has brought the servers at ``urls`` to ``version``."""
        for replica in self.replicas:
            if replica.url not in urls:
                self._set.take_out(replica, EngineError("the leading rank took it out."))
            elif not replica.serving:
                self._set.bring_in(replica)  # the leading rank has met it again
        self.version = version

    async def update(self, previous: int | None, version: int) -> None:
        """Bring every server from ``previous`` to ``version``; None is from anything."""
        transport = self._transport
        assert transport is not None
        for replica in self.replicas:
            if replica.waits_for_publish and not replica.serving:
                await self._take_in(replica)

        async def one(replica: Replica) -> None:
            found = await self._client.get_version(replica)
            whole = previous is None or found != str(previous)  # another one: it was restarted
            await self._client.load(replica, transport, version, whole=whole)

        await self._for_each_serving(one, f"publishing version {version}")
        self.version = version

    async def _take_in(self, replica: Replica) -> None:
        """Let a returning server have part in a publish; it is met once it has been resumed."""
        try:
            await self._client.pause(replica)
        except EngineError as error:
            self._set.take_out(replica, error)
        else:
            self._set.bring_in(replica)

    async def resume(self) -> None:
        """Sample again."""

        async def one(replica: Replica) -> None:
            await self._client.resume(replica)
            if not replica.handshake_done:
                await self._client.handshake(replica, resume=False)

        if self._transport is not None:
            await self._for_each_serving(one, "resuming")
        self.publishing = False

    async def prompt_logprobs(self, token_ids: list[int]) -> dict[str, tuple[float, ...]]:
        """What every server that serves makes of ``token_ids``, under its URL."""
        found: dict[str, tuple[float, ...]] = {}

        async def one(replica: Replica) -> None:
            found[replica.url] = await self._client.prompt_logprobs(replica, token_ids)

        await self._for_each_serving(one, "echoing a text")
        return found

    async def _for_each_serving(
        self, work: Callable[[Replica], Awaitable[None]], phase: str
    ) -> None:
        replicas = self._set.serving
        results = await asyncio.gather(*map(work, replicas), return_exceptions=True)
        for replica, result in zip(replicas, results, strict=True):
            if isinstance(result, EngineError):
                self._set.take_out(replica, result, phase=phase)
            elif isinstance(result, BaseException):
                raise result
        if self.num_serving < self._options.min_replicas:
            raise EngineError(
                f"{phase}: {self.num_serving} servers are left, min_replicas is "
                f"{self._options.min_replicas}. {self._set.describe_lost()}"
            )

    # Sampling ------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample on some server; one that fails is taken out, and another one tried."""
        async with self._slots:
            tries = 0
            while True:
                try:
                    return await self._try(request)
                except ServerLost:
                    continue  # not its own doing; choosing another server has a deadline
                except ServerError as error:
                    tries += 1
                    if error.is_refusal or tries == self._options.max_tries:
                        raise

    async def _try(self, request: GenerationRequest) -> Completion:
        self.raise_if_unusable()
        if self.version is None:
            raise EngineError("nothing was published yet: publish with reset=True first.")
        replica = await self._set.choose(request.group_key, self._options.recover_s)
        keep = self._options.on_update == "keep"
        if self.publishing and not keep:
            return _INTERRUPTED  # it came after the pause: sent again, after the resume
        check_length(request, replica)
        oldest, num_losses = self.version, replica.num_losses
        chunks: list[Chunk] = []
        try:
            completion = await self._complete(replica, request, oldest, chunks)
            check_versions(completion, oldest, self.version if keep else oldest, replica)
            replica.num_returns = 0
        except ServerError as error:
            if not error.is_refusal and replica.num_losses == num_losses:
                self._set.take_out(replica, error)
            cut_off = chunks and chunks[-1].finish_reason is None
            if cut_off and self.version == oldest:  # no server has sampled under another one since
                return assemble(chunks, oldest)
            raise
        return completion

    async def _complete(
        self, replica: Replica, request: GenerationRequest, version: int, chunks: list[Chunk]
    ) -> Completion:
        """The completion, or ``ServerError`` as soon as the replica is lost."""
        work = self._client.complete(replica, request, version, chunks)
        answer = asyncio.ensure_future(work)
        with self._set.sending(replica, answer):
            try:
                return await answer
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                if not replica.serving:
                    raise ServerLost(f"{replica.url} was lost: {replica.why_out}") from None
                return assemble(chunks, version)  # taken back

    # Health --------------------------------------------------------------------------------------

    async def watch(self, replica: Replica) -> None:
        """Look after one server, for ever."""
        while True:
            await asyncio.sleep(self._options.health_interval_s)
            try:
                await self._client.check(replica)
                if not replica.serving and not self.publishing and self.version is not None:
                    await self._bring_back(replica, self.version)
            except (EngineError, ConfigError) as error:
                if not self.publishing:  # a publish has deadlines of its own, and loads take long
                    self._set.take_out(replica, error)

    async def _bring_back(self, replica: Replica, version: int) -> None:
        """Bring ``replica`` to ``version``, whatever it held, and let it serve.

        If a publish comes between, it waits for the next one, which takes it in. One that completes
        nothing between two returns is tried less and less often while others are enough.
        """
        if self._transport is None or replica.waits_for_publish:
            return  # without a transport, the leading rank does, and says so when it publishes
        rest_s = self._options.health_interval_s * 2 ** min(replica.num_returns, _MOST_DOUBLINGS)
        is_needed = self.num_serving < self._options.min_replicas or not replica.num_returns
        if not is_needed and monotonic() < replica.tried_s + rest_s:
            return
        replica.num_returns += 1
        replica.tried_s = monotonic()
        await self._client.pause(replica, "interrupt")
        replica.handshake_done = False
        if not self._transport.is_live:  # else what it would be sent now may be changing
            await self._client.load(replica, self._transport, version, whole=True)
            if not self.publishing and version == self.version:
                await self._client.handshake(replica)
            if not self.publishing and version == self.version:
                logger.warning("%s is back, at version %d.", replica.url, version)
                self._set.bring_in(replica)
                return
        replica.waits_for_publish = True  # only now: two loads at once would mix versions
