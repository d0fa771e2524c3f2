"""Calls to one server, in the order that keeps it alive and its versions right.

No routing and no state: :mod:`sdp_lightning.engines.remote.replicas` keeps the servers.
"""

from __future__ import annotations

from contextlib import aclosing

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote.backend import (
    Call,
    Chunk,
    Completion,
    OnUpdate,
    RemoteInfBackend,
    ServerInfo,
    assemble,
)
from sdp_lightning.engines.remote.http_client import HttpClient, ServerError
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.replicas import Replica
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.weights.protocol import Instruction, LoadAdapter, Target, WeightTransport

LOADING = "loading"  # version label of a server whose weights are incomplete
_NO_ROUTE = (403, 404, 405)


class ServerClient:
    """Calls in the client's event loop. Each has a timeout; errors name server and path."""

    def __init__(self, http: HttpClient, backend: RemoteInfBackend, options: RemoteOptions) -> None:
        self._http, self._backend, self._options = http, backend, options

    @property
    def kind(self) -> str:
        """Backend name: ``vllm`` or ``sglang``."""
        return self._backend.name

    async def check(self, replica: Replica) -> None:
        """Check the health of ``replica``."""
        await self._call(replica, self._backend.health(), self._options.health_timeout_s)

    async def handshake(self, replica: Replica, *, resume: bool = True) -> None:
        """Read the server's description; refuse it if its samples could not be trained on.

        Args:
            replica: a server; its ``info`` is set.
            resume: whether to resume it first, as it may have been left paused.

        Raises:
            ConfigError: if the server does not support the options.
        """
        backend, options = self._backend, self._options
        if options.on_update == "keep" and options.transport == "lora":
            raise ConfigError(
                "vLLM reads the adapter of a request again at every step, from the folder that it "
                "had when the request came, so on_update='keep' would sample with old adapters "
                "under new versions. Use on_update='interrupt' with transport='lora'."
            )
        if resume:
            await self.resume(replica)
        info = await self.describe(replica)
        try:
            await self._probe(replica, info)
        except ServerError as error:
            reduced = backend.fallback(info)
            if reduced is None or error.status not in _NO_ROUTE:
                raise
            info = reduced
            await self._probe(replica, info)
        if options.on_update == "keep" and not info.has_spans:
            raise ConfigError(
                f"{replica.url} does not report which version sampled which token, which "
                "on_update='keep' needs. Use on_update='interrupt', or vLLM 0.32 with "
                "--enable-scale-out."
            )
        replica.info, replica.handshake_done = info, True

    async def describe(self, replica: Replica) -> ServerInfo:
        """Read the server's description, without sampling."""
        limit = self._options.answer_timeout_s
        answers = [await self._call(replica, call, limit) for call in self._backend.describe()]
        replica.info = self._backend.read_description(answers)
        return replica.info

    async def _probe(self, replica: Replica, info: ServerInfo) -> None:
        answers = [
            await self._call(
                replica, self._backend.probe(info, temperature), self._options.control_timeout_s
            )
            for temperature in (1.0, 0.5)
        ]
        self._backend.read_probe(info, *answers)

    async def pause(self, replica: Replica, on_update: OnUpdate | None = None) -> None:
        """Stop sampling on ``replica``, as configured or as ``on_update`` says."""
        call = self._backend.pause(on_update or self._options.on_update, self._options.kv_on_update)
        await self._tell(replica, call)

    async def resume(self, replica: Replica) -> None:
        """Continue sampling on ``replica``."""
        await self._tell(replica, self._backend.resume())

    async def load(
        self, replica: Replica, transport: WeightTransport, version: int, *, whole: bool
    ) -> None:
        """Load the staged weights, set the version label, and check that it is reported.

        Args:
            replica: a server that samples nothing meanwhile.
            transport: carries the weights.
            version: version of the weights.
            whole: send all weights, because the server's state is unknown.
        """

        async def tell(instruction: Instruction) -> None:
            call = self._backend.load(instruction)
            await self._tell(replica, call, self._options.control_timeout_s)
            if isinstance(instruction, LoadAdapter):
                replica.adapter = instruction.name

        num_workers = 1 if replica.info is None else replica.info.num_workers
        if whole:
            replica.adapter = None
        await self._tell(replica, self._backend.set_version(LOADING))
        await transport.deliver(Target(replica.url, num_workers, tell), whole=whole)
        await self._tell(replica, self._backend.set_version(str(version)))
        reported = await self.get_version(replica)
        if reported != str(version):
            raise ServerError(f"{replica.url} reports version {reported!r} instead of {version}.")

    async def get_version(self, replica: Replica) -> str:
        """The version label that ``replica`` reports."""
        call = self._backend.get_version()
        answer = await self._call(replica, call, self._options.answer_timeout_s)
        return self._backend.read_version(answer)

    async def prompt_logprobs(self, replica: Replica, token_ids: list[int]) -> tuple[float, ...]:
        """Log-probs of a prompt's own tokens but the first, nats at temperature 1."""
        call = self._backend.prompt_logprobs(token_ids, replica.serves)
        answer = await self._call(replica, call, self._options.control_timeout_s)
        return self._backend.read_prompt_logprobs(answer, token_ids)

    async def complete(
        self, replica: Replica, request: GenerationRequest, version: int, chunks: list[Chunk]
    ) -> Completion:
        """Sample a completion.

        Args:
            replica: the server to sample on.
            request: the prompt and how to continue it.
            version: version that the request is sent under.
            chunks: receives the chunks of a streamed answer as they arrive.

        Raises:
            ServerError: also if the answer has an unexpected form.
        """
        backend, info, limit = self._backend, replica.serves, self._options.request_timeout_s
        call = backend.generate(request, info, stream=self._options.stream)
        try:
            if not self._options.stream:
                answer = await self._call(replica, call, limit)
                return backend.read_completion(answer, info, version)
            async with aclosing(self._http.stream(replica.url, call, timeout_s=limit)) as stream:
                async for data in stream:
                    chunks.append(backend.read_chunk(data, info))
            return assemble(chunks, version)
        except ServerError:
            raise
        except EngineError as error:
            raise ServerError(f"{replica.url}: {error}") from error

    async def _tell(self, replica: Replica, call: Call, timeout_s: float | None = None) -> None:
        """Send a call that changes the server; check that the answer confirms it."""
        limit = self._options.answer_timeout_s if timeout_s is None else timeout_s
        self._backend.read_done(call, await self._call(replica, call, limit))

    async def _call(self, replica: Replica, call: Call, timeout_s: float) -> object:
        try:
            return await self._http.request(replica.url, call, timeout_s=timeout_s)
        except ServerError as error:
            remedy = self._backend.remedy(call)
            if error.status is None or not remedy:
                raise
            raise ServerError(f"{error} {remedy}", error.status) from error


def check_length(request: GenerationRequest, replica: Replica) -> None:
    """Refuse a request that is longer than the server allows."""
    assert replica.info is not None
    tokens, budget = int(request.token_ids.size), request.params.max_new_tokens
    if tokens + budget > replica.info.max_length:
        raise EngineError(
            f"a prompt of {tokens} tokens and max_new_tokens={budget} do not fit the "
            f"{replica.info.max_length} tokens of {replica.url}. Shorten one of them, or start the "
            "server with a larger --max-model-len (vLLM) or --context-length (SGLang)."
        )


def check_versions(completion: Completion, oldest: int, newest: int, replica: Replica) -> None:
    """Refuse tokens whose version is not among ``oldest`` to ``newest``."""
    possible = {str(version) for version in range(oldest, newest + 1)}
    for span in completion.spans:
        if span.version not in possible:
            raise ServerError(
                f"{replica.url} sampled under version {span.version!r} and not under {oldest} to "
                f"{newest}: it was restarted, or another client updates it."
            )
