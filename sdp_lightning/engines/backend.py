"""What differs between inference servers: pure functions from requests to calls, and back.

No HTTP, no state. A backend is a table of what to send and how to read the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sdp_lightning.engines.base import GenerationRequest
from sdp_lightning.types import FinishReason, KVPolicy

OnUpdate = Literal["interrupt", "keep"]


@dataclass(frozen=True)
class Call:
    """One HTTP request to a server.

    Attributes:
        body: sent as JSON; None sends no body.
    """

    method: Literal["GET", "POST"]
    path: str
    body: Mapping[str, Any] | None = None


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
class ServerInfo:
    """What a server told about itself.

    Attributes:
        model: the name that it serves.
        max_length: tokens of a sequence, prompt included.
    """

    model: str
    max_length: int


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

    def describe(self) -> Call:
        """Asks for what :meth:`read_description` reads."""
        ...

    def read_description(self, answer: Any) -> ServerInfo:
        """What the server serves."""
        ...

    def probe(self, info: ServerInfo, temperature: float) -> Call:
        """A one-token request whose answer :meth:`read_probe` reads."""
        ...

    def read_probe(self, at_one: Any, at_half: Any) -> None:
        """Refuse a server that stamps no versions, or with log-probs not of what is sampled.

        Args:
            at_one: the answer to a probe at temperature 1.
            at_half: the same at temperature 0.5.
        """
        ...

    def generate(self, request: GenerationRequest, info: ServerInfo) -> Call:
        """Samples a continuation."""
        ...

    def read_completion(self, answer: Any) -> Completion:
        """What was sampled, span by span."""
        ...

    def pause(self, on_update: OnUpdate, kv_on_update: KVPolicy) -> Call:
        """Stops sampling: requests return what they have, or are kept for the resume."""
        ...

    def resume(self) -> Call:
        """Lets requests run again."""
        ...

    def load_folder(self, folder: str) -> Call:
        """Loads the weights files of a folder that the server can see; others stay as they are."""
        ...

    def set_version(self, version: int) -> Call:
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
