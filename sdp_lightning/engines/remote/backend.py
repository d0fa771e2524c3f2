"""The differences between kinds of inference servers: how to write calls and read answers.

Pure functions: no HTTP, no state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.errors import EngineError
from sdp_lightning.types import FinishReason, KVPolicy
from sdp_lightning.weights.protocol import Instruction, ServedType

OnUpdate = Literal["interrupt", "keep"]
_ROUNDING = 1e-3  # nats above 0 that a log-prob may have
_LARGEST = 3.4e38  # below the largest float32
_MAX_TOKENS = 2**31  # token ids, where the vocabulary is not known


@dataclass(frozen=True)
class Call:
    """One HTTP request to a server.

    Attributes:
        body: sent as JSON; None sends no body.
        answer: format of the answer.
    """

    method: Literal["GET", "POST"]
    path: str
    body: Mapping[str, Any] | None = None
    answer: Literal["json", "text"] = "json"


@dataclass(frozen=True)
class Span:
    """Tokens of one completion that one version sampled; ``version`` is the server's label."""

    version: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Completion:
    """The tokens sampled for one request. ``"abort"`` is an interruption: resend for the rest.

    Attributes:
        stop_text: the stop text at which the server ended it, by what it decoded.
    """

    spans: tuple[Span, ...]
    finish_reason: FinishReason
    stop_text: str | None = None


@dataclass(frozen=True)
class Chunk:
    """A part of a completion, as a server sends it.

    Attributes:
        token_ids: tokens after those of the previous chunk, integers from 0 to 2**31 - 1.
        logprobs: log-probs of these tokens, nats: finite, and 0 or less but for rounding.
        finish_reason: None in all chunks but the last.
        edges: ``(version, start, end)`` of each span, counted over all chunks: in the last chunk of
            a server that reports versions.
        stop_text: the stop text that ended the completion, in the last chunk.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None = None
    edges: tuple[tuple[str, int, int], ...] | None = None
    stop_text: str | None = None

    def __post_init__(self) -> None:
        """Raise ``EngineError`` if these are not tokens with one log-prob each."""
        if len(self.token_ids) != len(self.logprobs):
            raise EngineError(
                f"the server answered {len(self.token_ids)} tokens, {len(self.logprobs)} log-probs "
                "and they must agree."
            )
        if not self.token_ids:
            return
        integers = set(map(type, self.token_ids)) <= {int}
        if not integers or min(self.token_ids) < 0 or max(self.token_ids) >= _MAX_TOKENS:
            raise EngineError(
                f"the server answered tokens that are not integers from 0 to {_MAX_TOKENS - 1}."
            )
        check_logprobs(self.logprobs)


def check_logprobs(logprobs: Sequence[float]) -> None:
    """Raise ``EngineError`` unless all are log-probs: finite as float32, and at most 0."""
    odd = [value for value in logprobs if not -_LARGEST <= value <= _ROUNDING]
    if odd:
        raise EngineError(f"the server answered {odd[0]} as the log-prob of a token.")


def assemble(chunks: Sequence[Chunk], version: int) -> Completion:
    """Join chunks to a completion; without a finish reason it counts as interrupted.

    Args:
        chunks: all chunks in order.
        version: version that the request was sent under; labels all tokens if there are no edges.

    Raises:
        EngineError: if tokens and edges do not agree.
    """
    tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
    logprobs = tuple(logprob for chunk in chunks for logprob in chunk.logprobs)
    last = chunks[-1] if chunks else Chunk((), ())
    edges = ((str(version), 0, len(tokens)),) if last.edges is None else last.edges
    cuts = [0, *(end for _, _, end in edges)]
    whole = cuts[:-1] == [start for _, start, _ in edges] and cuts == sorted(cuts)
    if cuts[-1] != len(tokens) or not whole:
        raise EngineError(
            f"the server answered {len(tokens)} tokens and the versions {list(edges[:8])}: they "
            "must agree."
        )
    spans = tuple(
        Span(label, tokens[start:end], logprobs[start:end])
        for label, start, end in edges
        if end > start
    )
    return Completion(spans, last.finish_reason or "abort", last.stop_text)


def server_stop_texts(request: GenerationRequest) -> list[str]:
    """Texts that a server is told to stop at; it decodes what it samples itself, and no more.

    So a stop text of which a part was sampled before is also named without that part.
    """
    if request.stops is None:
        return []
    return list(dict.fromkeys((*request.stops.texts, *request.stops.rests(sampled(request)))))


def without_text(request: GenerationRequest, info: ServerInfo) -> dict[str, float]:
    """The bias of tokens that must not be sampled: servers take -100, which leaves them 1e-44."""
    if request.num_tokens is None or info.num_embeddings is None:
        return {}
    return {str(token): -100.0 for token in range(request.num_tokens, info.num_embeddings)}


def sampled(request: GenerationRequest, *spans: Span) -> list[int]:
    """The tokens of a completion: those of ``request``, and of ``spans`` that go on with it."""
    before: list[int] = request.sampled_token_ids.tolist()
    return [*before, *(token for span in spans for token in span.token_ids)]


@dataclass(frozen=True)
class ServerInfo:
    """A server's description of itself.

    Attributes:
        model: name of the served model.
        max_length: tokens of a sequence, prompt included.
        num_workers: number of processes that hold its weights.
        has_spans: whether it reports which version sampled which token. If not, a completion has
            the version that it was sent under, and requests must not outlive a weight update.
        streams_deltas: whether a chunk of a streamed answer holds new tokens only.
        num_embeddings: number of token ids that it may sample; None: it is not known.
        served_type: the one type of its floating-point weights; None: several, or not known.
    """

    model: str
    max_length: int
    num_workers: int = 1
    has_spans: bool = True
    streams_deltas: bool = True
    num_embeddings: int | None = None
    served_type: ServedType | None = None


class RemoteInfBackend(Protocol):
    """The wire format of one kind of server.

    Every ``read_*`` raises ``EngineError``, saying what was expected, if the answer has another
    form. No method keeps state.
    """

    @property
    def name(self) -> str:
        """Name of the kind of server: ``vllm`` or ``sglang``."""
        ...

    def health(self) -> Call:
        """Call that is answered with status 200 when the server can serve."""
        ...

    def remedy(self, call: Call) -> str:
        """How to start a server that answered ``call`` with an error; empty if unknown."""
        ...

    def describe(self) -> Sequence[Call]:
        """Calls whose answers :meth:`read_description` reads."""
        ...

    def read_description(self, replies: Sequence[Any]) -> ServerInfo:
        """Read the answers to the calls of :meth:`describe`, in order."""
        ...

    def fallback(self, info: ServerInfo) -> ServerInfo | None:
        """Fewer abilities to try if the server lacks the route of a probe; None: there are none."""
        ...

    def probe(self, info: ServerInfo, temperature: float) -> Call:
        """Call that samples one token, whose answer :meth:`read_probe` reads."""
        ...

    def read_probe(self, info: ServerInfo, at_one: Any, at_half: Any) -> None:
        """Refuse a server whose log-probs are not those of the distribution it samples from.

        Args:
            info: the server's description.
            at_one: answer to a probe at temperature 1.
            at_half: answer to a probe at temperature 0.5.
        """
        ...

    def generate(self, request: GenerationRequest, info: ServerInfo, *, stream: bool) -> Call:
        """Call that samples a continuation; with ``stream`` the answer comes in chunks.

        Raises:
            EngineError: if the server cannot give the log-probs that such a request needs.
        """
        ...

    def read_completion(self, answer: Any, info: ServerInfo, version: int) -> Completion:
        """Read the answer to :meth:`generate`.

        Args:
            answer: a whole answer, not streamed.
            info: the server's description.
            version: version that the request was sent under, for a server that reports none.
        """
        ...

    def read_chunk(self, answer: Any, info: ServerInfo) -> Chunk:
        """Read one chunk of a streamed answer."""
        ...

    def prompt_logprobs(self, token_ids: Sequence[int], info: ServerInfo) -> Call:
        """Call that asks for the log-probs of a prompt's own tokens at temperature 1."""
        ...

    def read_prompt_logprobs(self, answer: Any, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Log-probs of every token but the first, nats."""
        ...

    def pause(self, on_update: OnUpdate, kv_on_update: KVPolicy) -> Call:
        """Call that stops sampling: requests return what they have, or wait for ``resume``."""
        ...

    def resume(self) -> Call:
        """Call that continues sampling."""
        ...

    def load(self, instruction: Instruction) -> Call:
        """Call that makes the server load weights.

        Raises:
            ConfigError: if servers of this kind cannot.
        """
        ...

    def set_version(self, label: str) -> Call:
        """Call that sets the version label of tokens sampled from now on."""
        ...

    def read_done(self, call: Call, answer: Any) -> None:
        """Refuse an answer to pause, resume, load or set_version that does not confirm it."""
        ...

    def count_sampled(self) -> Call:
        """Call for the tokens sampled since the server started, so that progress shows."""
        ...

    def get_version(self) -> Call:
        """Call that asks for the version label."""
        ...

    def read_version(self, answer: Any) -> str:
        """Read the version label."""
        ...
