"""An engine that samples on inference servers; ``server_pool`` does the work."""

from __future__ import annotations

import time
from collections.abc import Coroutine, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np

from sdp_lightning.config.server_keys import key_source, read_key
from sdp_lightning.engines.protocol import (
    GenerationRequest,
    NamedWeights,
    PublishReport,
    SegmentSink,
    require_next_version,
)
from sdp_lightning.engines.remote.addresses import (
    check_api_key,
    check_proxy,
    is_far,
    same_server,
    server_url,
    tls_context,
)
from sdp_lightning.engines.remote.backend import Completion, RemoteInfBackend, sampled
from sdp_lightning.engines.remote.http_client import HttpClient
from sdp_lightning.engines.remote.make_transport import make_transport
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.replicas import Replica, served_type
from sdp_lightning.engines.remote.server_client import ServerClient
from sdp_lightning.engines.remote.server_pool import ServerPool
from sdp_lightning.engines.servers.managed import ManagedServers, ServerConfig
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.types import FinishReason, FloatArray, IntArray, Segment
from sdp_lightning.weights.protocol import WeightTransport

_MARGIN_S = 5.0  # added to the timeouts of calls, whose errors name the server


class RemoteInfEngine:
    """Samples on servers that the engines of all ranks share.

    Args:
        servers: ``http://host:port`` or ``https://host:port`` of each server, or servers that the
            engine starts and ends.
        backend: wire format of the servers.
        options: deadlines and policies.

    Raises:
        ConfigError: if there are fewer servers than ``min_replicas``, a duplicate, an address or
            key that cannot be, a server on another host without an ``api_key``, or managed servers
            with another transport.
    """

    def __init__(
        self,
        servers: Sequence[str] | ManagedServers,
        backend: RemoteInfBackend,
        *,
        options: RemoteOptions | None = None,
    ) -> None:
        self.options = options or RemoteOptions()
        self._managed = servers if isinstance(servers, ManagedServers) else None
        self._urls = [] if self._managed else [server_url(str(url)) for url in servers]  # type: ignore
        _check_servers(self._urls, self.options)
        if self._managed and (ready := self._managed.config.transport) != self.options.transport:
            raise ConfigError(
                f"the servers are started for transport={ready!r}, but the engine's is "
                f"{self.options.transport!r}: they must be the same."
            )
        count = self._managed.config.replicas if self._managed else len(self._urls)
        if count < self.options.min_replicas:
            raise ConfigError(
                f"{count} servers are fewer than min_replicas={self.options.min_replicas}."
            )
        tls = tls_context(self.options.ca_file, self._urls)
        if self.options.use_proxy:
            check_proxy(self._urls)
        self._key = read_key(self.options.api_key)
        if self._key is not None:
            check_api_key(key_source(self.options.api_key), self._key)
        self._http = HttpClient(api_key=self._key, tls=tls, use_proxy=self.options.use_proxy)
        self._client = ServerClient(self._http, backend, self.options)
        self._transport: WeightTransport | None = None
        self._pool: ServerPool | None = None
        self._num_generated = 0
        self._is_closed = False
        self._staged = 0, 0.0  # bytes, and the seconds that staging them took

    @property
    def version(self) -> int | None:
        return None if self._pool is None else self._pool.version

    @property
    def updates_in_flight(self) -> bool:
        return self.options.on_update == "keep"

    @property
    def num_generated(self) -> int:
        return self._num_generated

    @property
    def server_config(self) -> ServerConfig | None:
        """Settings of the servers that this engine starts; None if they run already."""
        return None if self._managed is None else self._managed.config

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest sequence that all servers take; None before ``start``."""
        replicas = [] if self._pool is None else self._pool.replicas
        return min((r.info.max_length for r in replicas if r.info is not None), default=None)

    @property
    def num_serving(self) -> int:
        """Number of servers that accept requests now."""
        return 0 if self._pool is None else self._pool.num_serving

    @property
    def lora_alpha(self) -> float | None:
        return self.options.lora_alpha

    def use_vocabulary(self, num_tokens: int) -> None:
        """Refuse tokens of ``num_tokens`` or more from now on, unless ``vocab_size`` is set."""
        if self.options.vocab_size is None:
            self._client.vocab_size = num_tokens

    @property
    def server_urls(self) -> Sequence[str]:
        return [] if self._pool is None else self._pool.serving_urls

    def start(self) -> None:
        """Connect to the servers; leave out one whose log-probs would be wrong.

        Raises:
            EngineError: if fewer than ``min_replicas`` are well, naming one that is not, the
                request and the remedy.
            ConfigError: the same, if that server does not support the options.
        """
        self._start(())

    def join(self, urls: Sequence[str]) -> None:
        """See the protocol. Raises what ``start`` raises."""
        self._start(urls)

    def _start(self, joined_urls: Sequence[str]) -> None:
        if self._pool is not None:
            return
        options = self.options
        try:
            if joined_urls:
                self._urls = list(joined_urls)
            elif self._managed is not None:
                self._urls = self._managed.start(self._key)
            self._http.start()
            if not joined_urls:
                self._transport = make_transport(options, self._urls)
            explain = _nothing if self._managed is None else self._managed.explain
            self._pool = pool = ServerPool(
                self._urls, self._client, self._transport, options, explain
            )
            longest = options.health_timeout_s + 3 * options.answer_timeout_s
            self._http.run(pool.connect(), longest + 4 * options.control_timeout_s + _MARGIN_S)
            self._watch(pool.replicas)
        except BaseException:
            self.close()
            raise

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        completion = await self._http.bridge(self._running().generate(request))
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
        return "abort" if _stops_early(request, completion) else completion.finish_reason

    def pause(self) -> None:
        options = self.options
        longest = options.settle_s + options.answer_timeout_s + options.recover_s
        self._run_phase(self._running().pause(), longest)
        if self._transport is not None:
            self.drain()

    def drain(self) -> None:
        self._run_phase(self._running().drain(), self.options.abort_grace_s)

    def follow(self, version: int, urls: Sequence[str]) -> None:
        longest = len(urls) * (2 * self.options.answer_timeout_s + self.options.control_timeout_s)
        pool = self._running()
        num_known = len(pool.replicas)
        self._run_phase(pool.follow(version, list(urls)), longest)
        self._watch(pool.replicas[num_known:])

    def resume(self) -> None:
        options = self.options  # includes the handshakes of servers that have returned
        longest = 4 * options.answer_timeout_s + 4 * options.control_timeout_s
        self._run_phase(self._running().resume(), longest)

    def update_weights(
        self, weights: NamedWeights, version: int, *, reset: bool = False
    ) -> PublishReport:
        self.stage_weights(weights, version, reset=reset)
        return self.load_weights(version, reset=reset)

    @property
    def stages_copies(self) -> bool:
        return self._transport is not None and not self._transport.is_live

    def stage_weights(self, weights: NamedWeights, version: int, *, reset: bool = False) -> None:
        pool = self._running()
        pool.raise_if_unusable()
        require_next_version(version, pool.version, holder="the pool of servers", reset=reset)
        assert self._transport is not None
        start = time.monotonic()
        if reset:
            self._client.served_type = served_type(pool.replicas)
        with self._unless_closed():
            num_bytes = self._transport.stage(weights, full=reset, dtype=self._client.served_type)
        self._staged = num_bytes, time.monotonic() - start

    def load_weights(self, version: int, *, reset: bool = False) -> PublishReport:
        pool, options, start = self._running(), self.options, time.monotonic()
        require_next_version(version, pool.version, holder="the pool of servers", reset=reset)
        assert self._transport is not None
        (num_bytes, stage_s), self._staged = self._staged, (0, 0.0)
        previous = None if reset else pool.version
        longest = 2 * options.control_timeout_s + 5 * options.answer_timeout_s
        with self._unless_closed():
            self._transport.activate()
            self._run_phase(pool.update(previous, version), longest)
        transfer_s = stage_s + time.monotonic() - start
        return PublishReport(version, num_bytes, transfer_s=transfer_s, stage_s=stage_s)

    def prompt_logprobs(self, token_ids: IntArray) -> Mapping[str, FloatArray]:
        work = self._running().prompt_logprobs([int(token) for token in token_ids])
        answers = self._http.run(work, self.options.control_timeout_s + _MARGIN_S)
        return {url: np.asarray(logprobs, dtype=np.float32) for url, logprobs in answers.items()}

    def close(self) -> None:
        self._is_closed = True
        self._http.close()
        if self._transport is not None:
            self._transport.close()
        if self._managed is not None:
            self._managed.close()

    @contextmanager
    def _unless_closed(self) -> Generator[None]:
        """Context of work on weights, whose files ``close`` removes under it, in another thread."""
        try:
            yield
        except EngineError as error:
            if self._is_closed:
                raise EngineError("the engine was closed meanwhile.") from error
            raise

    def _running(self) -> ServerPool:
        if self._pool is None:
            raise EngineError("the engine has not started. Call start().")
        return self._pool

    def _run_phase(self, work: Coroutine[Any, Any, None], longest_s: float) -> None:
        """Run a phase of a publish. If it fails, the engine is unusable."""
        pool = self._running()
        if pool.error is not None:
            work.close()
            pool.raise_if_unusable()
        try:
            self._http.run(work, longest_s + _MARGIN_S)
        except Exception as error:
            pool.error = EngineError(str(error) or repr(error))
            raise

    def _watch(self, replicas: Sequence[Replica]) -> None:
        for replica in replicas:
            watch = self._http.spawn(self._running().watch(replica))
            watch.add_done_callback(self._on_watch_end)

    def _on_watch_end(self, watch: Future[None]) -> None:
        if not watch.cancelled() and (error := watch.exception()) is not None:
            pool = self._running()
            pool.error = EngineError(f"the health checks of the servers failed: {error!r}")
            pool.error.__cause__ = error


def _stops_early(request: GenerationRequest, completion: Completion) -> bool:
    """Whether a server stopped at a text that the completion does not hold as a whole.

    It has decoded the tokens otherwise, or after other ones: the rest is asked for again.
    """
    if completion.stop_text is None or request.stops is None:
        return False
    tokens = sampled(request, *completion.spans)
    by_token = tokens[-1] in request.params.stop_token_ids
    return not by_token and not request.stops.ends(tokens, 0, len(tokens))


def _nothing(url: str) -> str:
    return ""


def _check_servers(urls: list[str], options: RemoteOptions) -> None:
    servers = [same_server(url) for url in urls]
    if twice := [url for n, url in enumerate(urls) if servers[n] in servers[:n]]:
        raise ConfigError(f"{', '.join(twice)} is named twice: name each server once.")
    far = [url for url in urls if is_far(url)]
    if far and read_key(options.api_key) is None:
        raise ConfigError(
            f"{', '.join(far)} is on another host. Start it with VLLM_API_KEY in its environment, "
            "and give the key by api_key or SDP_API_KEY. vLLM asks for it where it samples, "
            "but not on its routes for weights: keep its port within a private network."
        )
    if far and options.transport == "ipc":
        raise ConfigError(
            f"{', '.join(far)} is on another host, and transport='ipc' shares a GPU's memory: use "
            "'nccl' or 'tcp'."
        )
    by_files = options.transport in ("files", "lora") or (
        options.transport == "delta" and options.delta_over == "files"
    )
    if far and by_files and options.weight_folder is None:
        raise ConfigError(
            f"{', '.join(far)} is on another host and cannot see weights in this one's shared "
            "memory: use transport='tcp' or 'nccl' (or delta_over='tcp'), or name a weight_folder "
            "that all hosts share."
        )
