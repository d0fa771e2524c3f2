"""An episode ends at a stop text wherever segments, interruptions and a resume cut it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from sdp_lightning.engines.protocol import GenerationRequest, SegmentSink
from sdp_lightning.errors import RolloutError
from sdp_lightning.types import FinishReason, SamplingParams, Segment
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.episode_log import Event
from sdp_lightning.workflows.send_gate import SendGate
from sdp_lightning.workflows.stop_texts import StopTexts
from support.tokenizer_kinds import byte_level

PROMPT = [9, 9]
WRITTEN = byte_level().encode(
    "é <answer>42</answer> and more, é and more.", add_special_tokens=False
)
PARAMS = SamplingParams(max_new_tokens=len(WRITTEN), stop_texts=("</answer>",))
END = next(n for n in range(len(WRITTEN)) if "</answer>" in byte_level().decode(WRITTEN[:n]))


class Careless:
    """Writes ``WRITTEN`` whatever the stops are; ``script`` says after how many tokens it aborts.

    The log-prob of the token at place p is -p, and every request has a version of its own.
    """

    def __init__(self, script: Iterator[int], on_event: Callable[[], None]) -> None:
        self.script, self.on_event = script, on_event
        self.requests: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        start = request.token_ids.size - len(PROMPT)
        count = min(next(self.script, 99), request.params.max_new_tokens)
        tokens, places = WRITTEN[start : start + count], range(start, start + count)
        if tokens:
            sink(Segment(len(self.requests), tokens, [-float(place) for place in places]))
        self.requests.append(request)
        self.on_event()
        return "length" if count == request.params.max_new_tokens else "abort"


def make_episode(engine: Any) -> Episode:
    find = partial(StopTexts, decode=byte_level().decode)
    return Episode(engine, SendGate(), find_stops=find)


def play(episode: Episode) -> FinishReason:
    episode.add_context(PROMPT)
    return asyncio.run(episode.generate(PARAMS))


def assert_whole(episode: Episode) -> None:
    segments: Sequence[Segment] = [p for p in episode.parts if isinstance(p, Segment)]
    assert episode.sampled_token_ids.tolist() == WRITTEN[:END]
    logprobs = [value for segment in segments for value in segment.logprobs.tolist()]
    assert logprobs == [-float(place) for place in range(END)]


@given(st.lists(st.integers(0, 6), max_size=12))
@settings(deadline=None)
def test_it_ends_with_the_token_that_completes_the_text_however_it_was_cut(script: list[int]):
    logs: list[tuple[Event, ...]] = []
    engine = Careless(iter(script), lambda: logs.append(episode.log))
    episode = make_episode(engine)
    assert play(episode) == "stop"
    assert_whole(episode)
    sampled = sum(r.token_ids.size for r in engine.requests[-1:]) - len(PROMPT)
    last = min([*script, *[99] * 99][len(engine.requests) - 1], len(WRITTEN) - sampled)
    assert episode.times.num_cut == sampled + last - END, "what came after the text is counted"
    for log in logs:
        again = Careless(iter(()), lambda: None)
        other = make_episode(again)
        other.restore(log)
        assert play(other) == "stop"
        assert_whole(other)
        assert all(request.num_sampled < END for request in again.requests)


def test_a_request_knows_the_tokens_that_its_completion_has_sampled():
    engine = Careless(iter([3, 2]), lambda: None)
    play(make_episode(engine))
    assert [r.sampled_token_ids.tolist() for r in engine.requests] == [
        [],
        WRITTEN[:3],
        WRITTEN[:5],
    ]
    assert [r.stops.texts for r in engine.requests if r.stops] == [("</answer>",)] * 3


def test_nothing_after_a_stop_token_is_kept_either():
    engine = Careless(iter([]), lambda: None)
    episode = make_episode(engine)
    episode.add_context(PROMPT)
    params = SamplingParams(max_new_tokens=9, stop_token_ids=(WRITTEN[2],))
    assert asyncio.run(episode.generate(params)) == "stop"
    assert episode.sampled_token_ids.tolist() == WRITTEN[: WRITTEN.index(WRITTEN[2]) + 1]
    assert episode.times.num_cut == 9 - episode.sampled_token_ids.size


def test_a_turn_does_not_end_by_the_text_of_the_turn_before():
    episode = make_episode(Careless(iter([]), lambda: None))
    assert play(episode) == "stop"
    turns = episode.parts[-1:]
    engine = Careless(iter([]), lambda: None)
    other = make_episode(engine)
    other.add_context([*PROMPT, *turns[0].token_ids[:-1]])
    params = SamplingParams(max_new_tokens=1, stop_texts=("</answer>",))
    assert asyncio.run(other.generate(params)) == "length", "its beginning stands in the context"


def test_stop_texts_without_a_tokenizer_are_refused():
    episode = Episode(Careless(iter([]), lambda: None), SendGate())  # type: ignore[arg-type]
    with pytest.raises(RolloutError, match="give the Episode find_stops"):
        play(episode)
