"""One episode that restores the log of an interrupted run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sdp_lightning.engines.protocol import GenerationRequest, SegmentSink
from sdp_lightning.errors import RolloutError
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import FinishReason, SamplingParams, Segment
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.episode_log import DivergenceError, Event
from sdp_lightning.workflows.send_gate import SendGate


class Alphabet:
    """The token at position p is p; ``script`` says after how many tokens it interrupts."""

    def __init__(self, script: Iterator[int], stop_at: int, on_event: Callable[[], None]) -> None:
        self.script, self.stop_at, self.on_event = script, stop_at, on_event
        self.sampled: list[int] = []

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        start, left = request.token_ids.size, request.params.max_new_tokens
        count = min(next(self.script, 99), left)
        if start < self.stop_at + 1 <= start + count:
            count = self.stop_at + 1 - start
        tokens = list(range(start, start + count))
        self.sampled += tokens
        if tokens:
            sink(Segment(len(self.sampled), tokens, [-1.0] * count))
        self.on_event()
        if self.stop_at in tokens:
            return "stop"
        return "length" if count == left else "abort"


Step = tuple[str, int]
STEPS = st.lists(st.tuples(st.sampled_from(["context", "generate"]), st.integers(1, 5)), max_size=6)


async def follow(episode: Episode, steps: list[Step], stop_at: int) -> list[object]:
    episode.add_context([0])
    seen: list[object] = []
    for kind, number in steps:
        if kind == "context":
            episode.add_context([100] * number)
        else:
            params = SamplingParams(max_new_tokens=number, stop_token_ids=(stop_at,))
            seen.append(await episode.generate(params))
        seen.append(episode.token_ids.tolist())
    return seen


@settings(deadline=None)
@given(STEPS, st.lists(st.integers(0, 3), max_size=9), st.integers(1, 20))
def test_an_episode_interrupted_anywhere_ends_as_it_would_have(
    steps: list[Step], script: list[int], stop_at: int
) -> None:
    logs: list[tuple[Event, ...]] = []

    def keep() -> None:
        logs.append(episode.log)

    engine = Alphabet(iter(script), stop_at, keep)
    episode = Episode(engine, SendGate())  # type: ignore[arg-type]
    keep()
    seen = asyncio.run(follow(episode, steps, stop_at))
    keep()
    for log in logs:
        again = Alphabet(iter([1, 0]), stop_at, lambda: None)
        other = Episode(again, SendGate())  # type: ignore[arg-type]
        other.restore(log)
        assert other.log == log and not other.parts
        assert asyncio.run(follow(other, steps, stop_at)) == seen
        saved = [e for e in log if isinstance(e, Segment)]
        kept = [p for p in other.parts if isinstance(p, Segment)][: len(saved)]
        assert all(a is b for a, b in zip(kept, saved, strict=True)), "with their proximal slots"
        assert len(again.sampled) == len(engine.sampled) - sum(map(len, saved))
        assert not other.is_restoring and not other.divergence


class Unreliable(Alphabet):
    """Fails once, after as many tokens as it is told."""

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        for count in self.script:
            if count:
                sink(Segment(0, range(count), [-1.0] * count))
            raise ValueError("down")
        return await super().generate(request, sink)


async def try_twice(episode: Episode) -> None:
    params = SamplingParams(max_new_tokens=5)
    episode.add_context([0])
    try:
        await episode.generate(params)
    except ValueError:
        await episode.generate(params)


@pytest.mark.parametrize("sampled", [0, 2])
def test_a_call_that_raised_is_forgotten_if_it_sampled_nothing_and_else_not_repeated(
    sampled: int,
) -> None:
    engine = Unreliable(iter([sampled]), 99, lambda: None)
    episode = Episode(engine, SendGate())  # type: ignore[arg-type]
    asyncio.run(try_twice(episode))
    other = Episode(Alphabet(iter([]), 99, lambda: None), SendGate())  # type: ignore[arg-type]
    other.restore(episode.log)
    if sampled:
        with pytest.raises(
            DivergenceError, match=r"generated with .* where there had been CallStart"
        ):
            asyncio.run(try_twice(other))
    else:
        asyncio.run(try_twice(other))
        assert np.array_equal(other.token_ids, episode.token_ids)


def test_a_log_is_restored_before_anything_else() -> None:
    episode = Episode(FakeEngine(), SendGate())
    episode.add_context([1])
    with pytest.raises(RolloutError, match="before the first add_context"):
        episode.restore(episode.log)
