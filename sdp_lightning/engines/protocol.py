"""The contract between rollouts and whatever samples tokens.

A workflow never sees an engine: it writes to an Episode, which sends requests here and receives
segments. No HTTP, no threads, no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sdp_lightning.types import FinishReason, FloatArray, IntArray, SamplingParams, Segment

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
        num_bytes: of weights transferred, to each server.
        transfer_s: from the first byte to the version that all of them report.
        paused_s: how long no token was sampled.
        exposed_s: how long the trainer waited, from the gate's closing to its opening.
    """

    version: int
    num_bytes: int
    transfer_s: float = 0.0
    paused_s: float = 0.0
    exposed_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Of the transfer; 0 where nothing had to be transferred."""
        return self.num_bytes / self.transfer_s if self.transfer_s > 0 else 0.0


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
    def updates_in_flight(self) -> bool:
        """Whether requests stay in flight while weights are updated.

        If False, ``pause`` makes outstanding requests return ``"abort"`` with what they have.
        """
        ...

    @property
    def is_shared(self) -> bool:
        """Whether the engines of all ranks sample on the same servers.

        Then rank 0's alone changes them, and the others :meth:`follow`.
        """
        ...

    @property
    def lora_alpha(self) -> float | None:
        """Of the LoRA adapters that it samples with; None: it needs adapters merged."""
        ...

    @property
    def num_generated(self) -> int:
        """Tokens sampled since ``start``."""
        ...

    def start(self, *, servers: Sequence[str] = ()) -> Sequence[str]:
        """Make ready to serve; nothing is sampled before the first ``update_weights``.

        Args:
            servers: that another rank's engine has started and leads; none: this one leads.

        Returns:
            The servers that it samples on; none if it samples in this process.
        """
        ...

    @property
    def servers(self) -> Sequence[str]:
        """Those that take requests now; none if it samples in this process."""
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
        """Stop sampling. New requests wait for ``resume``.

        Where another rank leads, it stops the servers after this has returned on all others.
        """
        ...

    def drain(self) -> None:
        """Where another rank leads: wait until the requests that its pause interrupts are back."""
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

    def follow(self, version: int, servers: Sequence[str]) -> None:
        """The leading rank has brought ``servers`` to ``version``; the others are out."""
        ...

    def resume(self) -> None:
        """Go on sampling."""
        ...

    def echo(self, token_ids: IntArray) -> Mapping[str, FloatArray]:
        """Log-probs of a text's own tokens under the weights that sample now.

        Args:
            token_ids: ``[n]``, at least two.

        Returns:
            For each copy of the weights, under its name: ``[n - 1]`` nats at temperature 1.
        """
        ...

    def close(self) -> None:
        """Stop; fail what is outstanding with ``EngineError``. Safe to call twice."""
        ...
