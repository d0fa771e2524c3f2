"""What an episode writes down: calls, contexts and segments, in order, and what they took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sdp_lightning.errors import RolloutError
from sdp_lightning.types import (
    Context,
    FinishReason,
    SamplingParams,
    Segment,
)


@dataclass(frozen=True)
class CallStart:
    """A ``generate`` began, with these settings."""

    params: SamplingParams


@dataclass(frozen=True)
class CallEnd:
    """The ``generate`` before it returned this."""

    finish_reason: FinishReason


Event = Context | Segment | CallStart | CallEnd


@dataclass(frozen=True)
class EpisodeTimes:
    """What trajectories took, in seconds added up; not what was replayed.

    Args:
        num: trajectories.
        sample_s: in ``generate``: for requests that wait and run.
        tool_s: between one ``generate`` and the next, for what the workflow does there.
        reward_s: after the last ``generate``.
    """

    num: int = 0
    sample_s: float = 0.0
    tool_s: float = 0.0
    reward_s: float = 0.0

    def __add__(self, other: EpisodeTimes) -> EpisodeTimes:
        return EpisodeTimes(
            self.num + other.num,
            self.sample_s + other.sample_s,
            self.tool_s + other.tool_s,
            self.reward_s + other.reward_s,
        )


def parts_of(log: Iterable[Event]) -> tuple[Context | Segment, ...]:
    """The tokens of a log."""
    return tuple(event for event in log if isinstance(event, Context | Segment))


class ReplayError(RolloutError):
    """A workflow that was run again did something else than the run that is replayed."""


def describe_event(event: Event) -> str:
    """An event as an error message shows it."""
    if isinstance(event, Context | Segment):
        return f"{type(event).__name__}({event.token_ids.tolist()})"
    return repr(event)
