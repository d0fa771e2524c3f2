"""An engine of inference servers: routing, publishing, and servers that die and come back.

The wire format is the backend's. A request that a server took down with it is sent to another one,
which is safe: what was sampled there never reached anybody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

from sdp_lightning.engines.backend import Completion, RemoteInfBackend
from sdp_lightning.engines.base import (
    GenerationRequest,
    NamedWeights,
    PublishReport,
    SegmentSink,
)
from sdp_lightning.engines.control import ServerControl, check_length, check_versions
from sdp_lightning.engines.http import HttpClient, ServerError
from sdp_lightning.engines.options import RemoteOptions
from sdp_lightning.engines.replicas import Replica, ReplicaSet
from sdp_lightning.engines.server import ManagedServers
from sdp_lightning.errors import ConfigError, EngineError, VersionError
from sdp_lightning.types import FinishReason, Segment
from sdp_lightning.weights.files import WeightFolder

logger = logging.getLogger(__name__)

_MARGIN_S = 5.0  # beyond the deadlines of the calls, which name their server
_INTERRUPTED = Completion((), "abort")


class RemoteInfEngine:
    """Samples on servers; ``pause`` interrupts what is under way there.

    Args:
        servers: ``http://host:port`` of each server, or servers to start and to end with it.
        backend: the servers' wire format.
        options: deadlines and policies.

    Raises:
        ConfigError: if there are fewer servers than ``min_replicas``.
    """

    def __init__(
        self,
        servers: Sequence[str] | ManagedServers,
        backend: RemoteInfBackend,
        *,
        options: RemoteOptions | None = None,
    ) -> None:
        self.options = options or RemoteOptions()
        managed = isinstance(servers, ManagedServers)
        count = servers.config.replicas if managed else len(servers)
        if count < self.options.min_replicas:
            raise ConfigError(
                f"{count} servers are fewer than min_replicas={self.options.min_replicas}."
            )
        self._managed = servers if managed else None
        self._set = ReplicaSet([] if managed else [url.rstrip("/") for url in servers])
        self._backend = backend
        self._client = HttpClient(api_key=self.options.api_key)
        self._control = ServerControl(self._client, backend, self.options)
        self._slots = asyncio.Semaphore(self.options.max_requests)
        self._weights: WeightFolder | None = None
        self._version: int | None = None
        self._publishing = True  # until the first publish: nobody else touches the servers
        self._error: EngineError | None = None
        self._num_generated = 0

    @property
    def version(self) -> int | None:
        return self._version

    @property
    def in_process(self) -> bool:
        return self.options.on_update == "keep"

    @property
    def num_generated(self) -> int:
        return self._num_generated

    @property
    def num_serving(self) -> int:
        """Servers that take requests."""
        return len(self._set.serving)

    def start(self) -> None:
        """Reach every server, and refuse one whose log-probs would be wrong.

        Raises:
            EngineError: naming the server, what was asked and what to do.
        """
        if self._weights is not None:
            return
        options = self.options
        try:
            if self._managed is not None:
                self._set = ReplicaSet(self._managed.start())
            self._client.start()
            self._weights = WeightFolder()
            longest = options.health_timeout_s + 2 * options.answer_timeout_s
            self._client.run(self._connect(), longest + 2 * options.control_timeout_s + _MARGIN_S)
            for replica in self._set.replicas:
                self._client.spawn(self._watch(replica)).add_done_callback(self._on_watch_end)
        except BaseException:
            self.close()
            raise

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        completion = await self._client.bridge(self._generate(request))
        for span in completion.spans:
            self._num_generated += len(span.token_ids)
            sink(
                Segment(
                    int(span.version),
                    span.token_ids,
                    span.logprobs,
                    temperature=request.params.temperature,
                    kv_on_update=self.options.kv_on_update,
                )
            )
        return completion.finish_reason

    def pause(self) -> None:
        options = self.options
        longest = options.settle_s + options.answer_timeout_s + options.abort_grace_s
        self._run_phase(self._pause_all(), options.recover_s + longest)

    def resume(self) -> None:
        self._run_phase(
            self._for_each_serving(self._control.resume, "resuming"), self.options.answer_timeout_s
        )
        self._publishing = False

    def update_weights(
        self, weights: NamedWeights, version: int, *, reset: bool = False
    ) -> PublishReport:
        if not reset and (self._version is None or version != self._version + 1):
            raise VersionError(
                f"the servers are at version {self._version}; cannot commit {version}. "
                "Versions advance by 1: was a push skipped?"
            )
        if self._weights is None:
            raise EngineError("the engine has not started. Call start().")
        start = time.monotonic()
        folder, num_bytes = self._weights.write(weights, full=reset)
        folders = [str(folder)] if num_bytes else []
        previous = None if reset else self._version
        longest = 2 * self.options.control_timeout_s + 3 * self.options.answer_timeout_s
        self._run_phase(self._update_all(folders, previous, version), longest)
        self._version = version
        return PublishReport(version, time.monotonic() - start, num_bytes)

    def close(self) -> None:
        self._client.close()
        if self._weights is not None:
            self._weights.close()
        if self._managed is not None:
            self._managed.close()

    def _run_phase(self, work: Coroutine[Any, Any, None], longest_s: float) -> None:
        """Run a phase of a publish. One that fails leaves the engine unusable."""
        if self._error is not None:
            work.close()
            self._raise_if_unusable()
        try:
            self._client.run(work, longest_s + _MARGIN_S)
        except EngineError as error:
            self._error = error
            raise

    def _raise_if_unusable(self) -> None:
        if self._error is not None:
            raise EngineError(f"the engine is unusable since: {self._error}") from self._error

    def _on_watch_end(self, watch: Future[None]) -> None:
        if not watch.cancelled() and (error := watch.exception()) is not None:
            self._error = EngineError(f"looking after the servers failed: {error!r}")
            self._error.__cause__ = error

    # In the client's loop ------------------------------------------------------------------------

    async def _connect(self) -> None:
        async def one(replica: Replica) -> None:
            try:
                await self._control.check(replica)
                await self._control.meet(replica)
            except EngineError as error:
                raise EngineError(
                    f"cannot use the {self._backend.name} server at {replica.url}: {error}"
                ) from error
            self._set.bring_in(replica)

        results = await asyncio.gather(
            *(one(replica) for replica in self._set.replicas), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _pause_all(self) -> None:
        if self._version is not None:  # those that failed lately may be on their way back
            await self._set.wait_for(self.options.min_replicas, self.options.recover_s)
        self._publishing = True
        if not self.in_process:
            await self._set.settle(self.options.settle_s)
        await self._for_each_serving(self._control.pause, "pausing")
        if not self.in_process:
            await self._set.drain(self.options.abort_grace_s)

    async def _update_all(self, folders: list[str], previous: int | None, version: int) -> None:
        async def one(replica: Replica) -> None:
            found = await self._control.get_version(replica)
            restarted = previous is not None and found != str(previous)
            mine = self._all_folders() if restarted else folders
            await self._control.load(replica, mine, version)

        await self._for_each_serving(one, f"publishing version {version}")

    def _all_folders(self) -> list[str]:
        assert self._weights is not None
        return [str(folder) for folder in self._weights.folders]

    async def _for_each_serving(
        self, work: Callable[[Replica], Awaitable[None]], phase: str
    ) -> None:
        replicas = self._set.serving
        results = await asyncio.gather(*(work(r) for r in replicas), return_exceptions=True)
        for replica, result in zip(replicas, results, strict=True):
            if isinstance(result, EngineError):
                self._set.take_out(replica, result, phase=phase)
            elif isinstance(result, BaseException):
                raise result
        if len(self._set.serving) < self.options.min_replicas:
            raise EngineError(
                f"{phase}: {len(self._set.serving)} servers are left, min_replicas is "
                f"{self.options.min_replicas}. {self._set.describe_lost()}"
            )

    async def _generate(self, request: GenerationRequest) -> Completion:
        async with self._slots:
            for _ in range(self.options.max_tries - 1):
                try:
                    return await self._try(request)
                except ServerError as error:
                    if error.is_refusal:
                        raise
            return await self._try(request)

    async def _try(self, request: GenerationRequest) -> Completion:
        """Send ``request`` to a server, which is taken out if it fails."""
        self._raise_if_unusable()
        if self._version is None:
            raise EngineError("nothing was published yet: publish with reset=True first.")
        replica = await self._set.choose(request.group_key, self.options.recover_s)
        if self._publishing and not self.in_process:
            return _INTERRUPTED  # it came after the pause: sent again, after the resume
        check_length(request, replica)
        oldest, lost = self._version, replica.lost
        try:
            with self._set.sending(replica):
                completion = await self._complete(replica, request)
            newest = self._version if self.in_process else oldest
            check_versions(completion, oldest, newest, replica)
        except ServerError as error:
            if not error.is_refusal and not lost.is_set():
                self._set.take_out(replica, error)
            raise
        return completion

    async def _complete(self, replica: Replica, request: GenerationRequest) -> Completion:
        """The completion, or ``ServerError`` as soon as the replica is lost."""
        answer = asyncio.ensure_future(self._control.complete(replica, request))
        lost = asyncio.ensure_future(replica.lost.wait())
        taken_back = asyncio.ensure_future(self._set.taken_back.wait())
        tasks = (answer, lost, taken_back)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if lost.done():
                raise ServerError(f"{replica.url} was lost: {replica.why_out}")
            return _INTERRUPTED
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, replica: Replica) -> None:
        while True:
            await asyncio.sleep(self.options.health_interval_s)
            try:
                await self._control.check(replica)
                if not replica.serving and not self._publishing and self._version is not None:
                    await self._bring_back(replica, self._version)
            except EngineError as error:
                if not self._publishing:  # a publish has deadlines of its own, and loads take long
                    self._set.take_out(replica, error)

    async def _bring_back(self, replica: Replica, version: int) -> None:
        """Bring ``replica`` to ``version``, whatever it held, and let it serve."""
        await self._control.pause(replica, "interrupt")
        await self._control.load(replica, self._all_folders(), version)
        await self._control.meet(replica)
        if not self._publishing and version == self._version:  # else the next round tries again
            logger.warning("%s is back, at version %d.", replica.url, version)
            self._set.bring_in(replica)
