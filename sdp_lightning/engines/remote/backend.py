"""What differs between inference servers: pure functions from requests to calls, and back.

No HTTP, no state. A backend is a table of what to send and how to read the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.errors import EngineError
from sdp_lightning.types import FinishReason, KVPolicy
from sdp_lightning.weights.protocol import Instruction

OnUpdate = Literal["interrupt", "keep"]


@dataclass(frozen=True)
class Call:
    """One HTTP request to a server.

    Attributes:
        body: sent as JSON; None sends no body.
        answer: what comes back.
    """

    method: Literal["GET", "POST"]
    path: str
    body: Mapping[str, Any] | None = None
    answer: Literal["json", "text"] = "json"


@dataclass(frozen=True)
class Span:
    """Tokens of one completion that one version sampled.

    Attributes:
        version: as the server says, in text.
    """

    version: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Completion:
    """What a server sampled for one request. ``"abort"`` is an interruption: ask for the rest."""

    spans: tuple[Span, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Chunk:
    """Some tokens of a completion, as a server sends them.

    Attributes:
        token_ids: those that follow the chunk before.
        logprobs: theirs.
        finish_reason: in the last chunk, why there are no more.
        edges: in the last chunk, of a server that knows: which version sampled the tokens from
            ``start`` to ``end``, counted over all chunks, as ``(version, start, end)``.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None = None
    edges: tuple[tuple[str, int, int], ...] | None = None


def assemble(chunks: Sequence[Chunk], version: int) -> Completion:
    """The completion that ``chunks`` are, one that was cut off as an interrupted one.

    Args:
        chunks: in order.
        version: that the request was sent under: of all tokens, if no chunk has edges.

    Raises:
        EngineError: if tokens, log-probs and edges do not agree.
    """
    tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
    logprobs = tuple(logprob for chunk in chunks for logprob in chunk.logprobs)
    last = chunks[-1] if chunks else Chunk((), ())
    edges = ((str(version), 0, len(tokens)),) if last.edges is None else last.edges
    cuts = [0, *(end for _, _, end in edges)]
    whole = cuts[:-1] == [start for _, start, _ in edges] and cuts == sorted(cuts)
    if len(tokens) != len(logprobs) or cuts[-1] != len(tokens) or not whole:
        raise EngineError(
            f"the server answered {len(tokens)} tokens, {len(logprobs)} log-probs and the versions "
            f"{list(edges)}: they must agree."
        )
    spans = tuple(
        Span(label, tokens[start:end], logprobs[start:end])
        for label, start, end in edges
        if end > start
    )
    return Completion(spans, last.finish_reason or "abort")


@dataclass(frozen=True)
class ServerInfo:
    """What a server told about itself.

    Attributes:
        model: the name that it serves.
        max_length: tokens of a sequence, prompt included.
        num_workers: processes that hold its weights.
        has_spans: whether it says which version sampled which token. If not, a completion is of
            the version that it was sent under, and requests must not outlive a weight update.
        streams_deltas: whether a chunk of a streamed answer holds new tokens only.
    """

    model: str
    max_length: int
    num_workers: int = 1
    has_spans: bool = True
    streams_deltas: bool = True


class RemoteInfBackend(Protocol):
    """The wire format of one kind of server.

    Every ``read_*`` raises ``EngineError``, saying what was expected, if the answer has another
    form. None of them keeps anything.
    """

    @property
    def name(self) -> str:
        """Of the kind of server."""
        ...

    def health(self) -> Call:
        """Answers 200 when the server can serve."""
        ...

    def remedy(self, call: Call) -> str:
        """What a server needs that answered ``call`` with an error; empty if nothing is known."""
        ...

    def describe(self) -> Sequence[Call]:
        """Asks for what :meth:`read_description` reads."""
        ...

    def read_description(self, answers: Sequence[Any]) -> ServerInfo:
        """What the server serves, from one answer for each call."""
        ...

    def fallback(self, info: ServerInfo) -> ServerInfo | None:
        """The server with fewer abilities, for when it does not know the route of a probe."""
        ...

    def probe(self, info: ServerInfo, temperature: float) -> Call:
        """A one-token request whose answer :meth:`read_probe` reads."""
        ...

    def read_probe(self, info: ServerInfo, at_one: Any, at_half: Any) -> None:
        """Refuse a server whose log-probs are not of the distribution that it samples from.

        Args:
            info: of the server.
            at_one: the answer to a probe at temperature 1.
            at_half: the same at temperature 0.5.
        """
        ...

    def generate(self, request: GenerationRequest, info: ServerInfo, *, stream: bool) -> Call:
        """Samples a continuation; with ``stream`` the answer comes in chunks.

        Raises:
            EngineError: if the server cannot give the log-probs that such a request needs.
        """
        ...

    def read_completion(self, answer: Any, info: ServerInfo, version: int) -> Completion:
        """What was sampled, span by span.

        Args:
            answer: to :meth:`generate`.
            info: of the server.
            version: that the request was sent under: the label where the server gives none.
        """
        ...

    def read_chunk(self, answer: Any, info: ServerInfo) -> Chunk:
        """One chunk of a streamed answer."""
        ...

    def prompt_logprobs(self, token_ids: Sequence[int], info: ServerInfo) -> Call:
        """Asks for the log-probs of a prompt's own tokens at temperature 1."""
        ...

    def read_prompt_logprobs(self, answer: Any, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Of every token but the first, in nats."""
        ...

    def pause(self, on_update: OnUpdate, kv_on_update: KVPolicy) -> Call:
        """Stops sampling: requests return what they have, or are kept for the resume."""
        ...

    def resume(self) -> Call:
        """Lets requests run again."""
        ...

    def load(self, instruction: Instruction) -> Call:
        """Has the server take in weights.

        Raises:
            ConfigError: if servers of this kind cannot.
        """
        ...

    def set_version(self, label: str) -> Call:
        """Labels what is sampled from now on."""
        ...

    def read_done(self, call: Call, answer: Any) -> None:
        """Refuse an answer to a pause, resume, load or set version that does not say it is done."""
        ...

    def get_version(self) -> Call:
        """Asks for the label."""
        ...

    def read_version(self, answer: Any) -> str:
        """The label."""
        ...
