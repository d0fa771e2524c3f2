"""The log of an episode: calls, contexts and segments in order, and their durations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sdp_lightning.errors import RolloutError
from sdp_lightning.types import Context, FinishReason, SamplingParams, Segment


@dataclass(frozen=True)
class CallStart:
    """Start of a ``generate`` with these settings."""

    params: SamplingParams


@dataclass(frozen=True)
class CallEnd:
    """End of a ``generate``, and what it returned."""

    finish_reason: FinishReason


Event = Context | Segment | CallStart | CallEnd


@dataclass(frozen=True)
class EpisodeTimes:
    """Durations in seconds and a count, added up over trajectories; before a resume is left out.

    Args:
        num: number of trajectories.
        sample_s: time in ``generate``, for requests that wait and run.
        tool_s: time of the workflow between one ``generate`` and the next.
        reward_s: time after the last ``generate``.
        num_cut: tokens that the engine returned after the end of a completion, and that were cut.
    """

    num: int = 0
    sample_s: float = 0.0
    tool_s: float = 0.0
    reward_s: float = 0.0
    num_cut: int = 0

    def __add__(self, other: EpisodeTimes) -> EpisodeTimes:
        return EpisodeTimes(
            self.num + other.num,
            self.sample_s + other.sample_s,
            self.tool_s + other.tool_s,
            self.reward_s + other.reward_s,
            self.num_cut + other.num_cut,
        )


VersionRange = tuple[int, int] | None  # oldest and newest; None if nothing was sampled


def versions_of(log: Iterable[Event]) -> VersionRange:
    """Oldest and newest version of the tokens of a log."""
    return widest((e.version, e.version) for e in log if isinstance(e, Segment))


def widest(ranges: Iterable[VersionRange]) -> VersionRange:
    """The range that covers all ``ranges``."""
    known = [each for each in ranges if each is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def log_parts(log: Iterable[Event]) -> tuple[Context | Segment, ...]:
    """Contexts and segments of a log."""
    return tuple(event for event in log if isinstance(event, Context | Segment))


class DivergenceError(RolloutError):
    """A workflow that runs again after a resume diverged from its interrupted run."""


def describe_event(event: Event) -> str:
    """Text of an event in an error message."""
    if isinstance(event, Context | Segment):
        return f"{type(event).__name__}({event.token_ids.tolist()})"
    return repr(event)
