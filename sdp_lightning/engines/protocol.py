"""The contract between rollouts and whatever samples tokens.

A workflow never sees an engine: it writes to an Episode, which sends requests here and receives
segments. No HTTP, no threads, no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from sdp_lightning.errors import VersionError
from sdp_lightning.types import FinishReason, FloatArray, IntArray, SamplingParams, Segment

if TYPE_CHECKING:
    from torch import Tensor

NamedWeights = Iterable[tuple[str, "Tensor"]]
SegmentSink = Callable[[Segment], None]


class StopFinder(Protocol):
    """Finds stop texts in the tokens of a completion. May be called from any thread."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The stop texts."""
        ...

    def ends(self, tokens: Sequence[int] | IntArray, begin: int, end: int) -> bool:
        """Whether ``tokens[end - 1]`` completes a text in ``tokens[begin:end]``."""
        ...

    def rests(self, tokens: Sequence[int] | IntArray) -> list[str]:
        """Ends of stop texts whose beginnings ``tokens`` end with."""
        ...


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One continuation to sample.

    Args:
        token_ids: ``[n]`` all tokens so far: contexts and tokens sampled before.
        params: sampling settings; ``max_new_tokens`` is what remains of the budget.
        seed: the random number of the token at position p comes from (seed, p) alone, so neither
            the batch that a request decodes in nor an interruption changes it.
        group_key: requests with the same key share a prompt; engines may use it for affinity.
        num_sampled: last tokens of ``token_ids`` that this completion has sampled before.
        stops: finds ``params.stop_texts`` in the tokens of the completion; None: there are none.
            The completion ends at the first token that completes one. What an engine samples beyond
            it is cut off later.
        num_tokens: token ids from this one on have no text: they have probability 0, and the
            log-probs are of the distribution over the others. None: the tokenizer does not say.
    """

    token_ids: IntArray
    params: SamplingParams
    seed: int = 0
    group_key: str = ""
    num_sampled: int = 0
    stops: StopFinder | None = None
    num_tokens: int | None = None

    @property
    def sampled_token_ids(self) -> IntArray:
        """``[num_sampled]`` the tokens that this completion has sampled before."""
        return self.token_ids[self.token_ids.size - self.num_sampled :]


@dataclass(frozen=True)
class PublishReport:
    """The cost of one weight update.

    Attributes:
        version: the version that the engine now reports.
        num_bytes: bytes of weights transferred to each server.
        transfer_s: seconds of ``stage_s``, and of loading until all servers report the version.
        paused_s: seconds in which no token was sampled: ``drain_s``, loading, and ``resume_s``.
        exposed_s: seconds that the trainer waited, from the beginning to opening the gate.
        stage_s: seconds of gathering, casting and writing, while servers sampled.
        drain_s: seconds from closing the gate until no request was under way.
        resume_s: seconds from the last server's report until the gate was open.
    """

    version: int
    num_bytes: int
    transfer_s: float = 0.0
    paused_s: float = 0.0
    exposed_s: float = 0.0
    stage_s: float = 0.0
    drain_s: float = 0.0
    resume_s: float = 0.0

    @property
    def load_s(self) -> float:
        """Seconds of ``transfer_s`` in which no token was sampled."""
        return self.transfer_s - self.stage_s

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth of the transfer; 0 if nothing had to be transferred."""
        return self.num_bytes / self.transfer_s if self.transfer_s > 0 else 0.0


class InferenceEngine(Protocol):
    """Samples from one versioned copy of the policy.

    ``version`` changes only inside ``update_weights`` and no token is sampled while it runs, so a
    segment can never straddle two versions. When ``update_weights`` returns, every token sampled
    before it has been handed to the sink of its request, stamped with the version that sampled it.

    ``start``, ``pause``, ``update_weights``, ``resume`` and ``close`` are called from the trainer's
    thread, ``generate`` from an event loop in another one. A failure in ``update_weights`` leaves
    the engine as it was or unusable (every later call raises ``EngineError``), never half-updated.

    Each rank of the trainer owns the weights of its engine, unless the engine is a
    :class:`SharedServerEngine`.
    """

    @property
    def version(self) -> int | None:
        """The version that samples now; None before the first ``update_weights``."""
        ...

    @property
    def updates_in_flight(self) -> bool:
        """Whether requests stay in flight while weights are updated.

        If False, ``pause`` makes outstanding requests return ``"abort"`` with what they have.
        """
        ...

    @property
    def num_generated(self) -> int:
        """Tokens sampled since ``start``."""
        ...

    def start(self) -> None:
        """Make the engine ready; nothing is sampled before the first ``update_weights``."""
        ...

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        """Sample until a stop or the budget; every token reaches ``sink``, once, in order.

        Segments arrive when they close: at a weight update, or at the end, before this returns. The
        sink may be called from any thread. ``"abort"`` means interrupted: resend for the rest.

        Raises:
            EngineError: if this request cannot be served; other requests continue.
        """
        ...

    def pause(self) -> None:
        """Stop sampling. New requests wait for ``resume``."""
        ...

    def update_weights(
        self, weights: NamedWeights, version: int, *, reset: bool = False
    ) -> PublishReport:
        """Copy ``weights`` in and become ``version``.

        Args:
            weights: names and tensors as in the model's ``state_dict``; with ``reset`` all of them,
                else those that changed.
            version: the current version plus 1; with ``reset`` any.
            reset: True at the start of a run, fresh or resumed.

        Raises:
            VersionError: if ``version`` is not the next one and ``reset`` is off.
            EngineError: if names or shapes do not fit, or the transfer failed.
        """
        ...

    def resume(self) -> None:
        """Continue sampling after a pause."""
        ...

    def prompt_logprobs(self, token_ids: IntArray) -> Mapping[str, FloatArray]:
        """Log-probs of a prompt's own tokens under the weights that sample now.

        Args:
            token_ids: ``[n]``, at least two.

        Returns:
            ``[n - 1]`` nats at temperature 1 for each copy of the weights, keyed by its name; fewer
            if a copy has no room for the whole prompt. One that cannot score is left out.

        Raises:
            EngineError: if no copy answers.
        """
        ...

    def close(self) -> None:
        """Stop; fail outstanding requests with ``EngineError``. Safe to call twice."""
        ...


@runtime_checkable
class SharedServerEngine(InferenceEngine, Protocol):
    """An engine of servers that the engines of all ranks share.

    Rank 0's engine leads: it alone starts, pauses, updates and resumes the servers. The engines of
    the other ranks ``join`` its servers and ``follow`` its updates. In a publish the leader calls
    ``stage_weights``, the followers ``pause`` before the leader does, every rank calls ``drain``
    after it, and the leader ``load_weights``. ``update_weights`` is both of its calls in one.
    """

    @property
    def server_urls(self) -> Sequence[str]:
        """URLs of the servers that accept requests now."""
        ...

    @property
    def lora_alpha(self) -> float | None:
        """``alpha`` of the LoRA adapters that the servers take; None: they need merged weights."""
        ...

    @property
    def stages_copies(self) -> bool:
        """Whether weights may change between ``stage_weights`` and ``load_weights``."""
        ...

    def stage_weights(self, weights: NamedWeights, version: int, *, reset: bool = False) -> None:
        """Gather, cast and write ``weights`` for :meth:`load_weights`; servers sample meanwhile.

        Arguments and errors are those of ``update_weights``; the servers' weights are unchanged.
        """
        ...

    def load_weights(self, version: int, *, reset: bool = False) -> PublishReport:
        """Let all paused servers, at once, load what was staged as ``version``."""
        ...

    def join(self, urls: Sequence[str]) -> None:
        """Make the engine ready to sample on servers that the engine of rank 0 leads."""
        ...

    def drain(self) -> None:
        """Wait until the requests that the leader's pause interrupts have returned."""
        ...

    def follow(self, version: int, urls: Sequence[str]) -> None:
        """Accept that the servers at ``urls``, and no others, now serve ``version``."""
        ...


def require_next_version(
    version: int, current: int | None, *, holder: str, reset: bool = False
) -> None:
    """Raise ``VersionError`` unless ``version`` is ``current + 1``: policy versions advance by 1.

    Args:
        version: the version to become, an integer of 0 or more.
        current: the version before; None if there is none yet.
        holder: what has the version, as the subject of the message: "the engine".
        reset: a start, fresh or resumed, which takes any version.
    """
    if isinstance(version, bool) or not isinstance(version, (int, np.integer)) or version < 0:
        raise VersionError(f"a policy version is an integer of 0 or more, got {version!r}.")
    if reset:
        return
    if current is None:
        raise VersionError(
            f"{holder} has no version yet; cannot commit {version}. Publish all weights with "
            "reset=True first."
        )
    if version != current + 1:
        raise VersionError(
            f"{holder} is at version {current}; cannot commit {version}. Versions advance by 1: "
            "was a publish skipped? After a restart publish with reset=True."
        )
