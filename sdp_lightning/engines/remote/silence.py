"""How long one request may be silent before it is sent again: its own deadlines, not its server's.

Times in seconds. A sign of sampling is a token of the request, where answers are streamed; until
its first one, and without streams, it is any answer of the same server to a request, or progress of
the server's own count of sampled tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote.backend import Chunk, Completion
from sdp_lightning.engines.remote.completion_checks import assemble_valid
from sdp_lightning.engines.remote.replicas import Replica, ReplicaSet
from sdp_lightning.engines.remote.responses import ServerError, ServerLost
from sdp_lightning.engines.remote.server_client import ServerClient

SEVERAL = 3  # silent requests without a sign between them that take their server out
_UNSEEN_TOKEN_S = 0.1  # for each token, of a server that does not count what it samples
_TOKEN_S = 1.0  # for each token, of a request that is not answered while others are


class ServerSilent(ServerError):
    """A request got no token for too long. Its server may be well."""


@dataclass(eq=False)
class Tries:
    """What became of one request so far.

    Attributes:
        num_failed: number of times that it was sent and failed.
        refusals: servers that refused it, and how.
        silent: servers on which it was silent, once for each time.
    """

    num_failed: int = 0
    refusals: dict[Replica, ServerError] = field(default_factory=dict[Replica, ServerError])
    silent: list[Replica] = field(default_factory=list[Replica])

    def has_asked(self, serving: Sequence[Replica]) -> bool:
        """Whether what was refused once was refused by another server too, or is by all."""
        return len(self.refusals) > 1 or self.refusals.keys() >= {*serving}

    @property
    def to_avoid(self) -> set[Replica]:
        """Servers that get it again only if there is no other one."""
        return {*self.refusals, *self.silent}


class Silence:
    """The deadlines of one try, which double whenever the request was silent before.

    Args:
        replica: the server that the request is sent to now.
        request: its ``max_new_tokens`` extend the deadlines.
        tries: what became of it before.
        timeout_s: ``request_timeout_s``.
    """

    def __init__(
        self, replica: Replica, request: GenerationRequest, tries: Tries, timeout_s: float
    ) -> None:
        self._replica, self._tries, self._timeout_s = replica, tries, timeout_s
        self._request, self._budget = request, request.params.max_new_tokens
        self._factor = 2.0 ** len(tries.silent)
        self._sent_s = self._token_s = monotonic()
        self._has_tokens = False

    async def complete(
        self, client: ServerClient, replicas: ReplicaSet, version: int, chunks: list[Chunk]
    ) -> Completion:
        """Await the completion.

        Args:
            client: sends the request.
            replicas: count it as outstanding, and may cancel it.
            version: version that the request is sent under.
            chunks: receives the chunks of a streamed answer as they arrive.

        Raises:
            ServerError: also as soon as the request is silent, or its server lost.
        """
        replica = self._replica
        work = client.complete(replica, self._request, version, chunks, self._on_chunk)
        answer = asyncio.ensure_future(work)
        is_silent = False
        with replicas.sending(replica, answer):
            try:
                if is_silent := await self._passes(answer):
                    answer.cancel()
                return await answer
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    answer.cancel()
                    await asyncio.wait({answer})
                    raise
                if is_silent:
                    raise self._error(chunks) from None
                if not replica.serving:
                    raise ServerLost(f"{replica.url} was lost: {replica.why_out}") from None
                return assemble_valid(chunks, version, replica)  # cancelled by ``drain``

    def _on_chunk(self, chunk: Chunk) -> None:
        """Note a chunk of a streamed answer."""
        if chunk.token_ids:
            self._has_tokens, self._token_s = True, monotonic()
            self._replica.hear()

    async def _passes(self, answer: asyncio.Future[Completion]) -> bool:
        """Wait for ``answer``; returns whether it was silent for too long, with a note of it."""
        while not answer.done():
            rest_s = self.due_s - monotonic()
            if rest_s <= 0:
                self._tries.silent.append(self._replica)
                self._replica.silent.add(self._tries)
                return True
            # The first token may bring the time forward.
            await asyncio.wait({answer}, timeout=min(rest_s, self._timeout_s / 4))
        return False

    def _error(self, chunks: Sequence[Chunk]) -> ServerSilent:
        """The error for the request, with the setting to change."""
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        since = f"after {num_tokens} of them" if num_tokens else "since it was sent"
        return ServerSilent(
            f"{self._replica.url} sampled no token of a request for "
            f"{monotonic() - self._token_s:.1f} s {since} "
            f"(request_timeout_s={self._timeout_s:g}, max_new_tokens={self._budget}). If "
            "completions take so long here, raise request_timeout_s, or lower max_requests."
        )

    @property
    def due_s(self) -> float:
        """Time at which the request is given up, unless there is a sign before."""
        silence_s = self._factor * self._timeout_s
        if self._has_tokens:
            return self._token_s + silence_s
        if self._replica.num_sampled is None:
            silence_s += self._factor * _UNSEEN_TOKEN_S * self._budget
        last_s = self._sent_s + self._factor * (self._timeout_s + _TOKEN_S * self._budget)
        return min(max(self._sent_s, self._replica.heard_s) + silence_s, last_s)
