"""The contract between rollouts and whatever samples tokens.

A workflow never sees an engine: it writes to an Episode, which sends requests here and receives
segments. No HTTP, no threads, no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sdp_lightning.types import FinishReason, IntArray, SamplingParams, Segment

if TYPE_CHECKING:
    from torch import Tensor

NamedWeights = Iterable[tuple[str, "Tensor"]]
SegmentSink = Callable[[Segment], None]


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One continuation to sample.

    Args:
        token_ids: ``[n]`` everything so far: contexts and tokens sampled before.
        params: ``max_new_tokens`` is what is left of the budget.
        seed: the random number of the token at position p comes from (seed, p) alone, so neither
            the batch that a request decodes in nor an interruption changes it.
        group_key: requests that share it share a prompt; engines may use it for affinity.
    """

    token_ids: IntArray
    params: SamplingParams
    seed: int = 0
    group_key: str = ""


@dataclass(frozen=True)
class PublishReport:
    """What one weight update cost.

    Attributes:
        version: the version that the engine now reports.
        paused_s: how long no token was sampled.
        num_bytes: of weights transferred.
    """

    version: int
    paused_s: float
    num_bytes: int


class InferenceEngine(Protocol):
    """Samples from one versioned copy of the policy.

    ``version`` changes only inside ``update_weights`` and no token is sampled while it runs, so a
    segment can never straddle two versions. When ``update_weights`` returns, every token sampled
    before it has been handed to the sink of its request, stamped with the version that sampled it.

    ``start``, ``pause``, ``update_weights``, ``resume`` and ``close`` are called from the trainer's
    thread, ``generate`` from an event loop in another one. A failure in ``update_weights`` leaves
    the engine as it was or unusable (every later call raises ``EngineError``), never half-updated.
    """

    @property
    def version(self) -> int | None:
        """The version that samples now; None before the first ``update_weights``."""
        ...

    @property
    def in_process(self) -> bool:
        """Whether requests stay in flight while weights are updated.

        If False, ``pause`` makes outstanding requests return ``"abort"`` with what they have.
        """
        ...

    @property
    def num_generated(self) -> int:
        """Tokens sampled since ``start``."""
        ...

    def start(self) -> None:
        """Make ready to serve; nothing is sampled before the first ``update_weights``."""
        ...

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        """Sample until a stop token or the budget; every token reaches ``sink``, once, in order.

        Segments arrive when they close: at a weight update, or at the end, before this returns. The
        sink may be called from any thread. ``"abort"`` means interrupted: resend for the rest.

        Raises:
            EngineError: if this request cannot be served; others go on.
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
            version: the current one plus 1; with ``reset`` any.
            reset: a start, fresh or resumed.

        Raises:
            VersionError: if ``version`` is not the next one and ``reset`` is off.
            EngineError: if names or shapes do not fit, or the transfer failed.
        """
        ...

    def resume(self) -> None:
        """Go on sampling."""
        ...

    def close(self) -> None:
        """Stop; fail what is outstanding with ``EngineError``. Safe to call twice."""
        ...
