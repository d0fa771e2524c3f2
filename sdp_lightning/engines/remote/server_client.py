"""Calls to one server, in the order that keeps it alive and its versions right.

No routing and no state: :mod:`sdp_lightning.engines.remote.replicas` keeps the servers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from logging import getLogger
from math import inf
from time import monotonic
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote import answers
from sdp_lightning.engines.remote.backend import (
    Call,
    Chunk,
    Completion,
    OnUpdate,
    RemoteInfBackend,
    ServerInfo,
)
from sdp_lightning.engines.remote.completion_checks import assemble_valid, check_budget
from sdp_lightning.engines.remote.http_client import HttpClient
from sdp_lightning.engines.remote.open_files import OpenFilesError
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.replicas import Replica
from sdp_lightning.engines.remote.responses import MAX_BYTES, ServerError, describe, reading_answer
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.weights.protocol import (
    Instruction,
    LoadAdapter,
    ServedType,
    Target,
    WeightTransport,
)

logger = getLogger(__name__)

T = TypeVar("T")
OPEN_FILES_S = 0.2  # before another call, while this process has too many files open
LOADING = "loading"  # version label of a server whose weights are incomplete
_NO_ROUTE = (403, 404, 405)
_TOKEN_BYTES = 2048  # most that an answer needs for a token, with its log-prob, text and framing
_PROMPT_TOKEN_BYTES = 32  # for a token of the prompt, which some answers repeat


class ServerClient:
    """Calls in the client's event loop. Each has a timeout; errors name server and path.

    Attributes:
        vocab_size: number of token ids of the model; None: it is not known.
        served_type: the type in which weights are sent; None: as they are.
    """

    def __init__(self, http: HttpClient, backend: RemoteInfBackend, options: RemoteOptions) -> None:
        self.vocab_size = options.vocab_size
        self.served_type: ServedType | None = None
        self._http, self._backend, self._options = http, backend, options

    @property
    def kind(self) -> str:
        """Backend name: ``vllm`` or ``sglang``."""
        return self._backend.name

    async def check(self, replica: Replica) -> None:
        """Check the health of ``replica``."""
        await self._ask(replica, self._backend.health(), self._options.health_timeout_s, _as_it_is)

    async def connect(self, replica: Replica) -> None:
        """Make the first calls to ``replica``; what fails is an error with the remedy."""
        try:
            await self.check(replica)
            if await self.get_version(replica) == LOADING:
                # Its last load failed: sampling now would kill it, so probe it later.
                await self.describe(replica)
                replica.handshake_done = False
            else:
                await self.handshake(replica)
        except OpenFilesError:
            raise
        except EngineError as error:
            raise EngineError(
                f"cannot use the {self.kind} server at {replica.url}: {error} {_port(replica)}"
                "Is it running there? `sdp-lightning doctor --config FILE` asks; engine="
                "'vllm://launch' starts one, and 'embedded' needs none."
            ) from error

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
        limit, calls = self._options.answer_timeout_s, self._backend.describe()
        answers = [await self._ask(replica, call, limit, _as_it_is) for call in calls]
        with reading_answer(replica.url):
            replica.info = self._backend.read_description(answers)
        return replica.info

    async def _probe(self, replica: Replica, info: ServerInfo) -> None:
        limit = self._options.control_timeout_s
        calls = [self._backend.probe(info, temperature) for temperature in (1.0, 0.5)]
        at_one, at_half = [await self._ask(replica, call, limit, _as_it_is) for call in calls]
        with reading_answer(replica.url):
            self._backend.read_probe(info, at_one, at_half)

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

        if whole:
            replica.adapter = None
            await self._check_type(replica)
        num_workers = 1 if replica.info is None else replica.info.num_workers
        await self._tell(replica, self._backend.set_version(LOADING))
        await transport.deliver(Target(replica.url, num_workers, tell), whole=whole)
        await self._tell(replica, self._backend.set_version(str(version)))
        reported = await self.get_version(replica)
        if reported != str(version):
            raise ServerError(
                f"{replica.url} reports version {describe(reported)} instead of {version}."
            )

    async def _check_type(self, replica: Replica) -> None:
        """Refuse a server that would hold other values than those that the others are sent."""
        if self.served_type is None:
            return
        held = (await self.describe(replica)).served_type
        if held != self.served_type:
            raise ServerError(
                f"{replica.url} holds weights in {held or 'several types'}, and all others of this "
                f"run in {self.served_type}: start it with --dtype {self.served_type}."
            )

    async def get_version(self, replica: Replica) -> str:
        """The version label that ``replica`` reports."""
        call, limit = self._backend.get_version(), self._options.answer_timeout_s
        return await self._ask(replica, call, limit, self._backend.read_version)

    async def prompt_logprobs(self, replica: Replica, token_ids: list[int]) -> tuple[float, ...]:
        """Log-probs of a prompt's own tokens but the first, nats at temperature 1.

        Of a prompt that is longer than the server allows, those of its beginning.
        """
        token_ids = token_ids[: replica.serves.max_length - 1]  # it samples one token more

        def read(answer: Any) -> tuple[float, ...]:
            return self._backend.read_prompt_logprobs(answer, token_ids)

        call = self._backend.prompt_logprobs(token_ids, replica.serves)
        max_bytes = MAX_BYTES + len(token_ids) * _TOKEN_BYTES
        limit = self._options.control_timeout_s
        return await self._ask(replica, call, limit, read, max_bytes=max_bytes)

    async def listen(self, replica: Replica) -> None:
        """Note whether ``replica`` has sampled since it was last asked, by its own count."""
        limit, call = self._options.answer_timeout_s, self._backend.count_sampled()
        replica.counted_s = monotonic()
        try:
            num_sampled = await self._ask(replica, call, limit, answers.read_sampled)
        except ServerError as error:
            logger.info("%s does not count what it samples: %s", replica.url, error)
            replica.num_sampled, replica.counted_s = None, inf
            return
        if replica.num_sampled is not None and num_sampled != replica.num_sampled:
            replica.hear()
        replica.num_sampled = num_sampled

    async def complete(
        self,
        replica: Replica,
        request: GenerationRequest,
        version: int,
        chunks: list[Chunk],
        on_chunk: Callable[[Chunk], None] = lambda _: None,
    ) -> Completion:
        """Sample a completion. It has no deadline here: the caller cancels it.

        Args:
            replica: the server to sample on.
            request: the prompt and how to continue it.
            version: version that the request is sent under.
            chunks: receives the chunks of a streamed answer as they arrive.
            on_chunk: called with each of them.

        Raises:
            ServerError: also if the answer has an unexpected form, or says what cannot be.
        """
        backend = self._backend
        info = replace(replica.serves, num_embeddings=self.vocab_size)
        call = backend.generate(request, info, stream=self._options.stream)
        budget = request.params.max_new_tokens
        max_bytes = MAX_BYTES + budget * _TOKEN_BYTES + request.token_ids.size * _PROMPT_TOKEN_BYTES
        if not self._options.stream:
            answer = await self._send(replica, call, None, max_bytes)
            with reading_answer(replica.url):
                completion = backend.read_completion(answer, info, version)
                for span in completion.spans:
                    self._check_tokens(span.token_ids, request)
        else:
            answers = self._http.stream(replica.url, call, timeout_s=None, max_bytes=max_bytes)
            async with aclosing(answers) as stream:
                async for data in stream:
                    with reading_answer(replica.url):
                        chunk = backend.read_chunk(data, info)
                        self._check_tokens(chunk.token_ids, request)
                        budget -= len(chunk.token_ids)
                        if budget < 0 or (chunks and chunks[-1].finish_reason is not None):
                            chunks.clear()  # none of it is believed
                            raise EngineError("the server goes on after the end of a completion.")
                        chunks.append(chunk)
                        on_chunk(chunk)
            completion = assemble_valid(chunks, version, replica)
        check_budget(completion, request, replica)
        return completion

    def _check_tokens(self, token_ids: Sequence[int], request: GenerationRequest) -> None:
        if not token_ids or self.vocab_size is None:
            return
        if (largest := max(token_ids)) >= self.vocab_size:
            raise EngineError(
                f"the server answered token {largest}, but the model's vocabulary has "
                f"{self.vocab_size}: it serves another model."
            )
        if request.num_tokens is not None and largest >= request.num_tokens:
            raise EngineError(
                f"the server answered token {largest}, which has no text, in spite of logit_bias."
            )

    async def _tell(self, replica: Replica, call: Call, timeout_s: float | None = None) -> None:
        """Send a call that changes the server; check that the answer confirms it."""

        def read(answer: Any) -> None:
            self._backend.read_done(call, answer)

        limit = self._options.answer_timeout_s if timeout_s is None else timeout_s
        await self._ask(replica, call, limit, read)

    async def _ask(
        self,
        replica: Replica,
        call: Call,
        timeout_s: float,
        read: Callable[[Any], T],
        *,
        max_bytes: int = MAX_BYTES,
    ) -> T:
        """Send ``call`` and read the answer; ask again when a server says that it is busy."""
        deadline = monotonic() + timeout_s
        while True:
            try:
                answer = await self._send(
                    replica, call, max(0.01, deadline - monotonic()), max_bytes
                )
            except (ServerError, OpenFilesError) as error:
                is_ours = isinstance(error, OpenFilesError)
                rest_s = OPEN_FILES_S if is_ours else error.retry_after_s
                if rest_s is None or monotonic() + rest_s >= deadline:
                    raise
                await asyncio.sleep(rest_s)
            else:
                with reading_answer(replica.url):
                    return read(answer)

    async def _send(
        self, replica: Replica, call: Call, timeout_s: float | None, max_bytes: int
    ) -> Any:
        try:
            return await self._http.request(
                replica.url, call, timeout_s=timeout_s, max_bytes=max_bytes
            )
        except ServerError as error:
            remedy = self._backend.remedy(call)
            if error.status is None or error.wants_key or not remedy:
                raise
            text = f"{error} {remedy}"
            raise ServerError(text, error.status, error.retry_after_s) from error


def _port(replica: Replica) -> str:
    parts = urlsplit(replica.url)
    return "" if parts.port else f"Without a port in its address it is {parts.scheme}'s own. "


def _as_it_is(answer: Any) -> Any:
    return answer
