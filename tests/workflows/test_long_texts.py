"""One long prompt, row or observation is encoded aside: the rollouts of others go on meanwhile.

Not by the clock: the tokenizer waits until the event loop has turned. It would wait for ever if it
ran on the loop.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards import RewardPool, timeouts
from sdp_lightning.rewards.call_threads import CallThreads
from sdp_lightning.rewards.timeouts import LONG, is_long
from sdp_lightning.testing import FakeEngine, tiny_tokenizer
from sdp_lightning.types import SamplingParams, Trajectory
from sdp_lightning.workflows.chat_template import encode_aside
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.send_gate import SendGate
from sdp_lightning.workflows.workflow import RolloutSession
from support.reward_pools import PLACE
from support.rollouts import DEADLINE_S, CodePoints

TURNS = 100
LONG_TEXT = "x" * (LONG + 1)


class Turning:
    """Counts turns of the loop while ``wait``, in another thread, waits for ``TURNS`` of them."""

    def __init__(self) -> None:
        self.num_waits = self.num_short_aside = 0
        self.thread = threading.get_ident()
        self._asked, self._turned = threading.Event(), threading.Event()

    def wait(self) -> None:
        assert threading.get_ident() != self.thread, "on the loop"
        self.num_waits += 1
        self._turned.clear()
        self._asked.set()
        assert self._turned.wait(DEADLINE_S), "the loop stands still"

    async def turn(self) -> None:
        while True:
            for _ in range(TURNS):
                await asyncio.sleep(0)
            if self._asked.is_set():
                self._asked.clear()
                self._turned.set()
            await asyncio.sleep(0.001)


class Slow(CodePoints):
    """Takes its time for a long text, and does a short one on the loop."""

    def __init__(self, turning: Turning) -> None:
        self.turning = turning

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        if len(text) > LONG:
            self.turning.wait()
            return super().encode(text[:5])
        self.turning.num_short_aside += threading.get_ident() != self.turning.thread
        return super().encode(text)


async def run_one(workflow: sdp.RolloutWorkflow, row: Any) -> tuple[Turning, list[Trajectory]]:
    turning = Turning()
    with closing(FakeEngine()) as engine:
        engine.update_weights([], 0, reset=True)
        gate = SendGate()
        session = RolloutSession(
            Slow(turning),
            lambda n: Episode(engine, gate),
        )
        ticks = asyncio.ensure_future(turning.turn())
        try:
            result = await asyncio.wait_for(workflow.run(row, session), DEADLINE_S)
        finally:
            ticks.cancel()
    return turning, list(result or ())


class Talker(sdp.Environment):
    """Says something short or long, twice."""

    def __init__(self, opening: Any, observation: Any) -> None:
        self.opening, self.observation = opening, observation

    def reset(self, row: Any) -> Any:
        return self.opening

    def step(self, completion: str) -> Any:
        return self.observation, 1.0, False


def rlvr(**settings: Any) -> sdp.RLVRWorkflow:
    sampling = SamplingParams(max_new_tokens=4)
    return sdp.RLVRWorkflow(
        lambda completion, row: 1.0, group_size=2, sampling=sampling, **settings
    )


def talking(opening: Any, observation: Any, *, turn_format: str | None) -> sdp.MultiTurnWorkflow:
    return sdp.MultiTurnWorkflow(
        lambda: Talker(opening, observation),
        group_size=1,
        max_turns=2,
        sampling=SamplingParams(max_new_tokens=4),
        turn_format=turn_format,
    )


MANY = [{"role": "user", "content": "x" * 100}] * (LONG // 100 + 1)
CASES: dict[str, tuple[Callable[[], sdp.RolloutWorkflow], Any, int]] = {
    "a short prompt": (rlvr, "1+1=", 0),
    "a long prompt": (rlvr, LONG_TEXT, 1),
    "many short messages": (rlvr, MANY, 1),
    "a long prompt in a template": (lambda: rlvr(use_chat_template=True), LONG_TEXT, 1),
    "a short talk": (lambda: talking("?", "!", turn_format="{observation}"), "", 0),
    "a long opening": (lambda: talking(LONG_TEXT, "!", turn_format="{observation}"), "", 1),
    "a long observation": (lambda: talking("?", LONG_TEXT, turn_format="{observation}"), "", 1),
    "long in a template": (lambda: talking(MANY, MANY, turn_format=None), "", 2),
}


@pytest.mark.fault("slow", "fetch")
@pytest.mark.parametrize(("make", "prompt", "waits"), CASES.values(), ids=CASES)
def test_the_loop_turns_while_a_long_text_is_encoded_and_short_ones_stay_on_it(
    make: Callable[[], sdp.RolloutWorkflow], prompt: Any, waits: int
) -> None:
    turning, trajectories = asyncio.run(run_one(make(), {"prompt": prompt}))
    assert turning.num_waits == waits
    assert waits or not turning.num_short_aside, "short texts, and yet aside"
    assert trajectories and all(t.reward >= 1.0 for t in trajectories)


@pytest.mark.fault("corrupted data", "fetch")
@pytest.mark.parametrize(
    ("make", "prompt"),
    [
        pytest.param(rlvr, [3] * 10**6, id="a prompt"),
        pytest.param(lambda: talking("?", [3] * 10**6, turn_format=None), "", id="an observation"),
    ],
)
def test_an_error_shows_the_beginning_of_what_is_long(
    make: Callable[[], sdp.RolloutWorkflow], prompt: Any
) -> None:
    with pytest.raises(
        RolloutError, match=r"\[3, 3, .*\.\.\. is neither text nor a list"
    ) as caught:
        asyncio.run(run_one(make(), {"prompt": prompt}))
    assert len(str(caught.value)) < 500


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(test(), DEADLINE_S))  # type: ignore[arg-type]


def test_a_long_row_is_pickled_aside_for_a_reward_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[int] = []
    dumps = pickle.dumps

    def watched(value: Any) -> bytes:
        where.append(threading.get_ident())
        return dumps(value)

    monkeypatch.setattr(pickle, "dumps", watched)
    with closing(RewardPool(PLACE, num_workers=1)) as pool:

        async def main() -> None:
            assert await pool("big_row", {"text": "x" * 10**7}) == 10**7
            assert await pool("big_row", {"text": "x"}) == 1

        run(main)
    assert [each == threading.get_ident() for each in where] == [False, True]


def test_a_real_tokenizer_lets_the_loop_turn() -> None:
    """It releases the interpreter's lock while it works."""
    tokenizer: Any = tiny_tokenizer()
    text = "1+2=3 " * (2 * LONG)

    async def main() -> tuple[int, Any]:
        turns = 0
        task = asyncio.ensure_future(encode_aside(text, lambda: tokenizer.encode(text)))
        while not task.done():
            turns += 1
            await asyncio.sleep(0.001)
        return turns, task.result()

    turns, tokens = run(main)
    assert tokens.tolist() == tokenizer.encode(text) and turns > 10


def test_long_texts_wait_for_a_thread_and_an_error_in_one_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timeouts, "THREADS", CallThreads(num_threads=1))

    def refuse() -> list[int]:
        raise RolloutError("no tokens")

    async def main() -> list[Any]:
        calls = [encode_aside(LONG_TEXT, lambda n=n: [n]) for n in range(20)]
        results = await asyncio.gather(
            *calls, encode_aside(LONG_TEXT, refuse), return_exceptions=True
        )
        return results

    *tokens, error = run(main)
    assert [each.tolist() for each in tokens] == [[n] for n in range(20)]
    assert isinstance(error, RolloutError) and str(error) == "no tokens"


def test_what_is_long_is_counted_no_further_than_that() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    short = [
        "",
        "x" * LONG,
        None,
        3,
        {"a": ["x" * 100, {"b": b"x"}]},
        object(),
        ("x",) * (LONG // 2),
    ]
    long = [LONG_TEXT, LONG_TEXT.encode(), {"a": [LONG_TEXT]}, [0] * (LONG + 1), cycle]
    long += [{"a": {str(n): n for n in range(LONG + 1)}}, ["x" * LONG, "x"]]
    assert not any(map(is_long, short)) and all(map(is_long, long))
