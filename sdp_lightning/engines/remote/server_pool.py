"""Routing, publishing and recovery for all servers of an engine, in the client's event loop.

A request that is lost with its server is sent to another one. That is safe: tokens that were not
streamed never reached anybody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote.backend import Chunk, Completion
from sdp_lightning.engines.remote.completion_checks import (
    assemble_valid,
    check_length,
    check_progress,
    check_versions,
)
from sdp_lightning.engines.remote.open_files import OpenFilesError, connections_allowed
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.prompt_scores import score_prompt
from sdp_lightning.engines.remote.replicas import Replica, ReplicaSet
from sdp_lightning.engines.remote.responses import ServerError, ServerLost
from sdp_lightning.engines.remote.server_client import OPEN_FILES_S, ServerClient
from sdp_lightning.engines.remote.silence import SEVERAL, ServerSilent, Silence, Tries
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.weights.protocol import WeightTransport

logger = logging.getLogger(__name__)

_INTERRUPTED = Completion((), "abort")
_MOST_DOUBLINGS = 5
_COUNT_S = 30.0  # between two looks at the count of a server whose requests take long


class ServerPool:
    """The servers of one engine. Every coroutine runs in one event loop.

    Args:
        urls: URL of each server.
        client: sends calls to one server.
        transport: carries weights; None where another rank leads: its engine alone pauses, updates
            and resumes the servers.
        options: deadlines and policies.
        explain: gives more details on the server at a URL, for errors.

    Attributes:
        version: the version that the servers sample; None before the first publish.
        publishing: True during a publish, and before the first one: health checks then change
            nothing at the servers.
        error: the failure that made the engine unusable.
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
        self._patience_s = min(_COUNT_S, options.request_timeout_s / 4)
        self._slots = asyncio.Semaphore(connections_allowed(options.max_requests))
        self._interrupted = asyncio.Event()  # set while a publish takes requests back

    @property
    def replicas(self) -> list[Replica]:
        """All servers, serving or not."""
        return self._set.replicas

    @property
    def num_serving(self) -> int:
        """Number of servers that accept requests now."""
        return len(self._set.serving)

    @property
    def serving_urls(self) -> list[str]:
        """URLs of the servers that accept requests now."""
        return [replica.url for replica in self._set.serving]

    def raise_if_unusable(self) -> None:
        """Raise ``EngineError`` after a failed publish."""
        if self.error is not None:
            raise EngineError(f"the engine is unusable since: {self.error}") from self.error

    # Starting, publishing ------------------------------------------------------------------------

    async def connect(self) -> None:
        """Connect to the servers, of which ``min_replicas`` must have samples to train on."""
        await self._bring_in_well(self.replicas, self._client.connect)

    async def _bring_in_well(
        self, replicas: list[Replica], greet: Callable[[Replica], Awaitable[None]]
    ) -> None:
        """Bring in servers that are new, and name in a warning those that are not well."""
        failed = dict[Replica, Exception]()

        async def work(replica: Replica) -> None:
            try:
                await greet(replica)
            except OpenFilesError:
                raise
            except (EngineError, ConfigError) as error:
                failed[replica] = error
            else:
                self._set.bring_in(replica)

        await asyncio.gather(*map(work, replicas))
        for replica in filter(failed.__contains__, replicas):
            if self.num_serving < self._options.min_replicas:
                raise failed[replica]
            self._set.leave_out(replica, failed[replica])

    async def pause(self) -> None:
        """Stop sampling on all servers; where another rank leads, only let requests arrive."""
        options = self._options
        if self.version is not None and self._transport is not None:
            # Servers that failed recently may be coming back.
            await self._set.wait_for(options.min_replicas, options.recover_s)
        self.publishing = True
        if options.on_update != "keep":
            self._interrupted.set()
            await self._set.settle(options.settle_s)
        if self._transport is not None:
            await self._for_each_serving(self._client.pause, "pausing")

    async def drain(self) -> None:
        """Wait for interrupted requests; cancel those that had not arrived before the pause."""
        if self._options.on_update != "keep":
            await self._set.drain(self._options.abort_grace_s)

    async def follow(self, version: int, urls: list[str]) -> None:
        """Accept that the servers at ``urls``, and no others, now serve ``version``.

        One that this rank has not checked waits for ``resume``, as servers do not sample now.
        """
        self._set.add(urls)
        for replica in self.replicas:
            if replica.url not in urls:
                self._set.take_out(replica, EngineError("the leading rank took it out."))
            elif not replica.handshake_done:
                replica.waits_for_publish = True
            elif not replica.serving:
                self._set.bring_in(replica)  # the leading rank has checked it again
        self.version = version

    async def update(self, previous: int | None, version: int) -> None:
        """Bring every server to ``version``.

        Args:
            previous: version that servers hold; one that reports another gets all weights. None:
                their state is unknown, so all get all weights.
            version: version of the staged weights.
        """
        transport = self._transport
        assert transport is not None
        for replica in self.replicas:
            if replica.waits_for_publish and not replica.serving:
                await self._take_in(replica)

        async def work(replica: Replica) -> None:
            held = await self._client.get_version(replica)
            whole = previous is None or held != str(previous)  # another one: it was restarted
            await self._client.load(replica, transport, version, whole=whole)

        await self._for_each_serving(work, f"publishing version {version}")
        self.version = version

    async def _take_in(self, replica: Replica) -> None:
        """Include a returning server in a publish; ``resume`` does its handshake."""
        try:
            await self._client.pause(replica)
        except EngineError as error:
            self._set.take_out(replica, error)
        else:
            self._set.bring_in(replica)

    async def resume(self) -> None:
        """Continue sampling on all servers."""

        async def work(replica: Replica) -> None:
            await self._client.resume(replica)
            if not replica.handshake_done:
                try:
                    await self._client.handshake(replica, resume=False)
                except ConfigError as error:  # it costs this server, not the run
                    raise EngineError(str(error)) from error

        if self._transport is not None:
            await self._for_each_serving(work, "resuming")
        else:
            new = [replica for replica in self.replicas if replica.waits_for_publish]
            await self._bring_in_well(new, partial(self._client.handshake, resume=False))
        self.publishing = False
        self._interrupted.clear()

    async def prompt_logprobs(self, token_ids: list[int]) -> dict[str, tuple[float, ...]]:
        """See :func:`~sdp_lightning.engines.remote.prompt_scores.score_prompt`."""
        return await score_prompt(self._client, self._set.serving, token_ids)

    async def _for_each_serving(
        self, work: Callable[[Replica], Awaitable[None]], phase: str
    ) -> None:
        replicas = self._set.serving
        results = await asyncio.gather(*map(work, replicas), return_exceptions=True)
        for replica, result in zip(replicas, results, strict=True):
            if isinstance(result, EngineError) and not isinstance(result, OpenFilesError):
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
        """Sample on a server; if it fails, take it out and try another one.

        A server that is busy is asked again when it says, within ``request_timeout_s``. What one
        server refuses is asked of another one before it is taken for the request's fault.
        """
        async with self._slots:
            tries = Tries()
            deadline = monotonic() + self._options.request_timeout_s
            while True:
                await self._set.rest(deadline, self._interrupted)
                try:
                    completion = await self._try(request, tries)
                except OpenFilesError:  # others close theirs
                    if monotonic() > deadline:
                        raise
                    await asyncio.sleep(OPEN_FILES_S)
                except ServerLost:
                    continue  # not the fault of this request; choosing a server has a deadline
                except ServerError as error:
                    tries.num_failed += error.retry_after_s is None
                    if error.is_refusal and tries.has_asked(self._set.serving):
                        raise
                    if tries.num_failed == self._options.max_tries:
                        raise
                else:
                    for replica, error in tries.refusals.items() if completion.spans else ():
                        self._set.take_out(replica, error)  # another one accepts it
                    return completion

    async def _try(self, request: GenerationRequest, tries: Tries) -> Completion:
        self.raise_if_unusable()
        if self.version is None:
            raise EngineError("nothing was published yet: publish with reset=True first.")
        replica = await self._set.choose(request.group_key, self._options.recover_s, tries.to_avoid)
        if self._interrupted.is_set():
            return _INTERRUPTED  # it came after the pause: resent after the resume
        check_length(request, replica)
        oldest, num_losses, chunks = self.version, replica.num_losses, list[Chunk]()
        try:
            silence = Silence(replica, request, tries, self._options.request_timeout_s)
            completion = await silence.complete(self._client, self._set, oldest, chunks)
            newest = self.version if self._options.on_update == "keep" else oldest
            check_versions(completion, oldest, newest, replica)
            if self._transport is not None and not self.publishing:
                check_progress(completion, replica)  # else another rank may have paused it
            replica.num_returns = 0
            replica.hear()
        except ServerError as error:
            if isinstance(error, ServerSilent):
                self._note_silence(replica, error)
            elif error.is_refusal:
                tries.refusals[replica] = error
            elif error.retry_after_s is not None:
                self._set.leave_alone(replica, error, error.retry_after_s)
            elif replica.num_losses == num_losses:
                self._set.take_out(replica, error)
            cut_off = chunks and chunks[-1].finish_reason is None
            if not cut_off or self.version != oldest:  # another version may have sampled since
                raise
            completion = assemble_valid(chunks, oldest, replica)
            check_versions(completion, oldest, oldest, replica)
        return completion

    def _note_silence(self, replica: Replica, error: ServerError) -> None:
        """The request is sent again, alone: its server is out only if several say the same."""
        if len(replica.silent) < SEVERAL:
            logger.warning("%s The request alone is sent again.", error)
        elif replica.serving:
            several = f"{len(replica.silent)} requests in a row were silent. The latest: {error}"
            self._set.take_out(replica, EngineError(several))

    # Health --------------------------------------------------------------------------------------

    async def watch(self, replica: Replica) -> None:
        """Check the health of one server until cancelled; bring it back if it was out."""
        while True:
            await asyncio.sleep(self._options.health_interval_s)
            try:
                await self._client.check(replica)
                if not self.publishing and self._is_overdue(replica):
                    await self._client.listen(replica)
                if not replica.serving and not self.publishing and self.version is not None:
                    await self._bring_back(replica, self.version)
            except OpenFilesError as error:
                logger.warning("%s was not asked whether it is well: %s", replica.url, error)
            except (EngineError, ConfigError) as error:
                if not self.publishing:  # a publish has its own deadlines, and loads take long
                    self._set.take_out(replica, error)

    def _is_overdue(self, replica: Replica) -> bool:
        """Whether requests wait at ``replica``, which has given no sign of sampling for a while."""
        latest_s = max(replica.heard_s, replica.counted_s)
        return bool(replica.outstanding) and latest_s + self._patience_s < monotonic()

    async def _bring_back(self, replica: Replica, version: int) -> None:
        """Bring ``replica`` to ``version``, whatever it held, and let it serve.

        If a publish starts meanwhile, the next publish includes it, or the next try, whichever
        comes first. A server that completes nothing between two returns is tried less and less
        often while enough others serve.
        """
        if self._transport is None or (self._transport.is_live and replica.waits_for_publish):
            return  # without a transport: the leading rank does, see ``follow``
        rest_s = self._options.health_interval_s * 2 ** min(replica.num_returns, _MOST_DOUBLINGS)
        is_needed = self.num_serving < self._options.min_replicas or not replica.num_returns
        if not is_needed and monotonic() < replica.tried_s + rest_s:
            return
        replica.num_returns += 1
        replica.tried_s, replica.waits_for_publish = monotonic(), False
        await self._client.pause(replica, "interrupt")
        if replica.info is None:  # it was not well at the start
            await self._client.describe(replica)
        replica.handshake_done = False
        if not self._transport.is_live:  # a live transport sends tensors that may be changing now
            await self._client.load(replica, self._transport, version, whole=True)
            if not self.publishing and version == self.version:
                await self._client.handshake(replica)
            if not self.publishing and version == self.version:
                logger.warning("%s is back, at version %d.", replica.url, version)
                self._set.bring_in(replica)
                return
        replica.waits_for_publish = True  # only now: two loads at once would mix versions
