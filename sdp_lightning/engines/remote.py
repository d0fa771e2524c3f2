"""An engine of inference servers: routing, publishing, and servers that die and come back.

The wire format is the backend's. A request that a server took down with it is sent to another one,
which is safe: what was sampled there never reached anybody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from sdp_lightning.engines.backend import Call, Completion, RemoteInfBackend
from sdp_lightning.engines.base import (
    GenerationRequest,
    NamedWeights,
    PublishReport,
    SegmentSink,
)
from sdp_lightning.engines.http import HttpClient, ServerError
from sdp_lightning.engines.options import RemoteOptions
from sdp_lightning.engines.replicas import Replica, ReplicaSet
from sdp_lightning.engines.server import ManagedServers
from sdp_lightning.errors import ConfigError, EngineError, VersionError
from sdp_lightning.types import FinishReason, Segment
from sdp_lightning.weights.files import WeightFolder

logger = logging.getLogger(__name__)


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
        self._urls = [] if managed else [url.rstrip("/") for url in servers]
        self._backend = backend
        self._client = HttpClient(api_key=self.options.api_key)
        self._set: ReplicaSet | None = None
        self._weights: WeightFolder | None = None
        self._version: int | None = None
        self._publishing = True  # until the first publish: nobody else touches the servers
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
        return 0 if self._set is None else len(self._set.serving)

    def start(self) -> None:
        """Reach every server, and refuse one whose log-probs would be wrong.

        Raises:
            EngineError: naming the server, what was asked and what to do.
        """
        if self._set is not None:
            return
        if self._managed is not None:
            self._urls = self._managed.start()
        self._client.start()
        self._weights = WeightFolder()
        self._client.run(self._connect(), self.options.control_timeout_s * 2)
        self._client.spawn(self._watch())

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
        self._publishing = True
        self._client.run(
            self._pause_all(),
            self.options.control_timeout_s + 5,
        )

    def resume(self) -> None:
        self._client.run(self._on_all(self._backend.resume()), self.options.control_timeout_s + 5)
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
        self._client.run(self._update_all(folders, version), 3 * self.options.control_timeout_s + 5)
        self._version = version
        return PublishReport(version, time.monotonic() - start, num_bytes)

    def close(self) -> None:
        self._client.close()
        if self._weights is not None:
            self._weights.close()
        if self._managed is not None:
            self._managed.close()

    # In the client's loop ------------------------------------------------------------------------

    async def _call(self, replica: Replica, call: Call, timeout_s: float | None = None) -> object:
        limit = self.options.control_timeout_s if timeout_s is None else timeout_s
        return await self._client.request(replica.url, call, timeout_s=limit)

    async def _connect(self) -> None:
        self._set = ReplicaSet(self._urls)
        for replica in self._set.replicas:
            try:
                await self._call(replica, self._backend.health())
                await self._introduce(replica)
            except ServerError as error:
                raise EngineError(
                    f"cannot use the {self._backend.name} server at {replica.url}: {error}"
                ) from error
            await self._set.bring_in(replica)

    async def _introduce(self, replica: Replica) -> None:
        backend = self._backend
        await self._call(replica, backend.resume())  # it may have been left paused
        replica.info = backend.read_description(await self._call(replica, backend.describe()))
        answers = [
            await self._call(replica, backend.probe(replica.info, temperature))
            for temperature in (1.0, 0.5)
        ]
        backend.read_probe(*answers)

    async def _pause_all(self) -> None:
        assert self._set is not None
        if self.in_process:
            await self._on_all(self._pause_call())
            return
        await self._set.settle(self.options.settle_s)
        await self._on_all(self._pause_call())
        await self._set.drain(self.options.abort_grace_s)

    def _pause_call(self) -> Call:
        return self._backend.pause(self.options.on_update, self.options.kv_on_update)

    async def _generate(self, request: GenerationRequest) -> Completion:
        assert self._set is not None
        for tries in range(1, self.options.max_tries + 1):
            replica = await self._set.choose(request.group_key, self.options.recover_s)
            version = self._version
            if version is None:
                raise EngineError("nothing was published yet: publish with reset=True first.")
            _check_length(request, replica)
            replica.num_outstanding += 1
            replica.last_sent_s = time.monotonic()
            try:
                completion = await self._complete(replica, request)
                newest = version if not self.in_process else self._version or version
                _check_versions(completion, version, newest, replica)
                return completion
            except ServerError as error:
                if error.is_refusal or tries == self.options.max_tries:
                    raise
                logger.warning("%s is taken out: %s", replica.url, error)
                self._set.take_out(replica, error)
            finally:
                replica.num_outstanding -= 1
        raise AssertionError("the last try returns or raises")

    async def _complete(self, replica: Replica, request: GenerationRequest) -> Completion:
        """The completion, or ``ServerError`` as soon as the replica is lost."""
        assert replica.info is not None and self._set is not None
        call = self._backend.generate(request, replica.info)
        answer = asyncio.ensure_future(
            self._call(replica, call, timeout_s=self.options.request_timeout_s)
        )
        lost = asyncio.ensure_future(replica.lost.wait())
        taken_back = asyncio.ensure_future(self._set.taken_back.wait())
        tasks = (answer, lost, taken_back)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and not lost.done():
                return Completion((), "abort")
            if not answer.done():
                raise ServerError(f"{replica.url} was lost: {replica.why_out}")
            return self._backend.read_completion(answer.result())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _on_all(self, call: Call) -> None:
        async def one(replica: Replica) -> None:
            await self._call(replica, call)

        await self._for_each_serving(one, f"{call.path.partition('?')[0]}")

    async def _update_all(self, folders: list[str], version: int) -> None:
        async def one(replica: Replica) -> None:
            await self._load(replica, folders, version)

        await self._for_each_serving(one, f"publishing version {version}")

    async def _load(self, replica: Replica, folders: list[str], version: int) -> None:
        for folder in folders:
            await self._call(replica, self._backend.load_folder(folder))
        await self._call(replica, self._backend.set_version(version))
        answer = await self._call(replica, self._backend.get_version())
        found = self._backend.read_version(answer)
        if found != str(version):
            raise ServerError(f"{replica.url} reports version {found!r} instead of {version}.")

    async def _for_each_serving(
        self, work: Callable[[Replica], Awaitable[None]], phase: str
    ) -> None:
        assert self._set is not None
        replicas = self._set.serving
        tasks = [work(replica) for replica in replicas]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for replica, result in zip(replicas, results, strict=True):
            if isinstance(result, EngineError):
                logger.warning("%s is taken out while %s: %s", replica.url, phase, result)
                self._set.take_out(replica, result)
            elif isinstance(result, BaseException):
                raise result
        if len(self._set.serving) < self.options.min_replicas:
            raise EngineError(
                f"{phase}: {len(self._set.serving)} servers are left, min_replicas is "
                f"{self.options.min_replicas}. {self._set.describe_lost()}"
            )

    async def _watch(self) -> None:
        assert self._set is not None
        while True:
            await asyncio.sleep(self.options.health_interval_s)
            await asyncio.gather(*(self._look_after(r) for r in self._set.replicas))

    async def _look_after(self, replica: Replica) -> None:
        assert self._set is not None
        try:
            await self._call(replica, self._backend.health(), self.options.health_timeout_s)
            if replica.serving or self._publishing or self._weights is None:
                return
            version = self._version
            if version is None:
                return
            await self._call(replica, self._pause_call())
            await self._load(replica, [str(f) for f in self._weights.folders], version)
            await self._introduce(replica)
        except EngineError as error:
            self._set.take_out(replica, error)
            return
        if not self._publishing and version == self._version:
            logger.warning("%s is back, at version %d.", replica.url, version)
            await self._set.bring_in(replica)


def _check_length(request: GenerationRequest, replica: Replica) -> None:
    assert replica.info is not None
    tokens, budget = int(request.token_ids.size), request.params.max_new_tokens
    if tokens + budget > replica.info.max_length:
        raise EngineError(
            f"a prompt of {tokens} tokens and max_new_tokens={budget} do not fit the "
            f"{replica.info.max_length} tokens of {replica.url}. Shorten one of them, or start the "
            "server with a larger --max-model-len."
        )


def _check_versions(completion: Completion, oldest: int, newest: int, replica: Replica) -> None:
    possible = {str(version) for version in range(oldest, newest + 1)}
    for span in completion.spans:
        if span.version not in possible:
            raise ServerError(
                f"{replica.url} sampled under version {span.version!r} and not under {oldest} to "
                f"{newest}: it was restarted, or another client updates it."
            )
