"""What one server is told and asked, in the order that keeps it alive and honest.

No routing and no state: which servers there are is :mod:`sdp_lightning.engines.replicas`'.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdp_lightning.engines.backend import Call, Completion, OnUpdate, RemoteInfBackend
from sdp_lightning.engines.base import GenerationRequest
from sdp_lightning.engines.http import HttpClient, ServerError
from sdp_lightning.engines.options import RemoteOptions
from sdp_lightning.engines.replicas import Replica
from sdp_lightning.errors import EngineError


class ServerControl:
    """Calls in the client's loop. Each has a deadline, and its error names server and path."""

    def __init__(
        self, client: HttpClient, backend: RemoteInfBackend, options: RemoteOptions
    ) -> None:
        self._client, self._backend, self._options = client, backend, options

    async def check(self, replica: Replica) -> None:
        """Ask whether it lives."""
        await self._call(replica, self._backend.health(), self._options.health_timeout_s)

    async def meet(self, replica: Replica) -> None:
        """Learn what it serves, and refuse it if its log-probs would be wrong.

        It is resumed first: it may have been left paused.
        """
        backend, options = self._backend, self._options
        await self.resume(replica)
        answer = await self._call(replica, backend.describe(), options.answer_timeout_s)
        info = backend.read_description(answer)
        answers = [
            await self._call(replica, backend.probe(info, temperature), options.control_timeout_s)
            for temperature in (1.0, 0.5)
        ]
        backend.read_probe(*answers)
        replica.info = info

    async def pause(self, replica: Replica, on_update: OnUpdate | None = None) -> None:
        """Stop sampling there, in the configured way or as ``on_update`` says."""
        call = self._backend.pause(on_update or self._options.on_update, self._options.kv_on_update)
        await self._tell(replica, call)

    async def resume(self, replica: Replica) -> None:
        """Let it sample."""
        await self._tell(replica, self._backend.resume())

    async def load(self, replica: Replica, folders: Sequence[str], version: int) -> None:
        """Load ``folders`` in order, label it ``version``, and see that it says so."""
        for folder in folders:
            call = self._backend.load_folder(folder)
            await self._tell(replica, call, self._options.control_timeout_s)
        await self._tell(replica, self._backend.set_version(version))
        found = await self.get_version(replica)
        if found != str(version):
            raise ServerError(f"{replica.url} reports version {found!r} instead of {version}.")

    async def get_version(self, replica: Replica) -> str:
        """The version that it says it holds."""
        call = self._backend.get_version()
        answer = await self._call(replica, call, self._options.answer_timeout_s)
        return self._backend.read_version(answer)

    async def complete(self, replica: Replica, request: GenerationRequest) -> Completion:
        """What it samples. An answer of another form is the server's fault: ``ServerError``."""
        assert replica.info is not None
        call = self._backend.generate(request, replica.info)
        answer = await self._call(replica, call, self._options.request_timeout_s)
        try:
            return self._backend.read_completion(answer)
        except EngineError as error:
            raise ServerError(f"{replica.url}: {error}") from error

    async def _tell(self, replica: Replica, call: Call, timeout_s: float | None = None) -> None:
        """Have something done, and see that the answer says so."""
        limit = self._options.answer_timeout_s if timeout_s is None else timeout_s
        self._backend.read_done(call, await self._call(replica, call, limit))

    async def _call(self, replica: Replica, call: Call, timeout_s: float) -> object:
        return await self._client.request(replica.url, call, timeout_s=timeout_s)


def check_length(request: GenerationRequest, replica: Replica) -> None:
    """Refuse a request that is longer than the server allows."""
    assert replica.info is not None
    tokens, budget = int(request.token_ids.size), request.params.max_new_tokens
    if tokens + budget > replica.info.max_length:
        raise EngineError(
            f"a prompt of {tokens} tokens and max_new_tokens={budget} do not fit the "
            f"{replica.info.max_length} tokens of {replica.url}. Shorten one of them, or start the "
            "server with a larger --max-model-len."
        )


def check_versions(completion: Completion, oldest: int, newest: int, replica: Replica) -> None:
    """Refuse tokens of a version that the server could not have held."""
    possible = {str(version) for version in range(oldest, newest + 1)}
    for span in completion.spans:
        if span.version not in possible:
            raise ServerError(
                f"{replica.url} sampled under version {span.version!r} and not under {oldest} to "
                f"{newest}: it was restarted, or another client updates it."
            )
