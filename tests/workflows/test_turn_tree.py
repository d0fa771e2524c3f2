"""The tree of turns: what continues what, and that every sampled token is trained exactly once."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sdp_lightning.errors import EngineError
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import SamplingParams, Segment
from sdp_lightning.workflows.agent.tree import Turn, TurnTree
from support.agents import FIRST_SAMPLED, CountingEngine, ids, make_tree

PARAMS = SamplingParams(max_new_tokens=2)


def play(tree: TurnTree, *requests: Any, params: SamplingParams = PARAMS) -> list[Turn]:
    """All requests at once."""

    async def run() -> list[Turn]:
        turns = (tree.take_turn(tokens, params) for tokens in requests)
        return list(await asyncio.gather(*turns))

    return asyncio.run(run())


def kinds(tree: TurnTree) -> list[list[tuple[str, list[int]]]]:
    """Runs of contexts and of segments of each trajectory."""
    found: list[list[tuple[str, list[int]]]] = []
    for trajectory in tree.trajectories(0.0, {}, sample=0):
        runs: list[tuple[str, list[int]]] = []
        for part in trajectory.parts:
            kind, tokens = type(part).__name__, part.token_ids.tolist()
            if runs and runs[-1][0] == kind:
                runs[-1][1].extend(tokens)
            else:
                runs.append((kind, tokens))
        found.append(runs)
    return found


def test_what_extends_a_turn_goes_on_in_its_branch_and_an_edited_history_begins_one() -> None:
    tree = make_tree(CountingEngine())
    [first] = play(tree, ids(1, 2))
    [second] = play(tree, np.append(first.token_ids, 3))
    play(tree, np.append(second.token_ids[:1], [9, *second.sampled]))  # its prompt was edited
    play(tree, np.append(first.token_ids, 4))  # the second turn was dropped
    assert kinds(tree) == [
        [
            *[("Context", [1, 2]), ("Segment", [1000, 1001])],
            *[("Context", [3]), ("Segment", [1002, 1003])],
        ],
        [("Context", [1, 9, 1002, 1003]), ("Segment", [1004, 1005])],
        [("Context", [1, 2, 1000, 1001, 4]), ("Segment", [1006, 1007])],
    ]


def test_equal_requests_at_once_and_one_that_waits_for_none_are_branches_of_their_own() -> None:
    tree = make_tree(CountingEngine())
    play(tree, ids(1), ids(1))
    play(tree, ids(1))
    assert [runs[0] for runs in kinds(tree)] == [("Context", [1])] * 3
    assert [len(runs) for runs in kinds(tree)] == [2] * 3


def test_tokens_that_end_where_a_turn_ended_are_continued_without_a_context() -> None:
    tree = make_tree(CountingEngine())
    [first] = play(tree, ids(1))
    play(tree, first.token_ids)
    assert kinds(tree) == [[("Context", [1]), ("Segment", [1000, 1001, 1002, 1003])]]


def test_side_requests_have_no_trajectory_and_what_follows_them_trains_none_of_their_tokens() -> (
    None
):
    tree = make_tree(CountingEngine())

    async def run() -> None:
        side = await tree.take_turn(ids(1), PARAMS, is_side=True)
        await tree.take_turn(np.append(side.token_ids, 2), PARAMS)

    asyncio.run(run())
    assert kinds(tree) == [[("Context", [1, 1000, 1001, 2]), ("Segment", [1002, 1003])]]


def test_a_turn_that_is_ended_or_fails_is_not_trained_and_nothing_continues_its_branch() -> None:
    engine = FakeEngine(4, manual=True)
    engine.update_weights([], 0, reset=True)
    tree = make_tree(engine)
    first: list[Turn] = []

    async def run() -> None:
        waiting = asyncio.ensure_future(tree.take_turn(ids(1), SamplingParams(max_new_tokens=4)))
        while not engine.num_in_flight:
            await asyncio.sleep(0)
        engine.advance(4, awaiting=1)
        first.append(await waiting)
        longer = np.append(first[0].token_ids, 2)
        waiting = asyncio.ensure_future(tree.take_turn(longer, SamplingParams(max_new_tokens=4)))
        while not engine.num_in_flight:
            await asyncio.sleep(0)
        engine.advance(2, awaiting=1)
        engine.update_weights([], 1)  # closes a segment of the turn that is ended
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        engine.fail("gone")
        with pytest.raises(EngineError, match="gone"):
            await tree.take_turn(longer, PARAMS)

    asyncio.run(run())
    [trajectory] = tree.trajectories(0.0, {}, sample=0)
    assert trajectory.token_ids.tolist() == first[0].token_ids.tolist()
    assert tree.num_unfinished == 2 and tree.num_turns == 1


def test_an_interrupted_sample_repeats_its_turns_until_one_differs() -> None:
    before = make_tree(CountingEngine())
    [first] = play(before, ids(1))
    play(before, np.append(first.token_ids, 2))
    play(before, ids(8))
    logs = [branch.episode.log for branch in before._branches]

    engine = CountingEngine()
    engine.next = 5000
    tree = make_tree(engine, saved=logs)
    [same] = play(tree, ids(1))
    assert same.token_ids.tolist() == first.token_ids.tolist()
    [other] = play(tree, np.append(same.token_ids, 3))  # a tool answered otherwise
    [third] = play(tree, ids(8))
    tree.forget()
    assert other.sampled == [5000, 5001] and third.sampled == [1004, 1005]
    assert tree.num_diverged == 1
    assert not any(branch.episode.is_restoring for branch in tree._branches)


# Random trees -------------------------------------------------------------------------------------

REQUESTS = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, 30),  # which earlier turn it is about
            st.sampled_from(["extend", "again", "drop", "edit", "fresh"]),
            st.lists(st.integers(1, 3), max_size=2),
            st.booleans(),  # a side request
        ),
        min_size=1,
        max_size=4,
    ),
    max_size=6,
)


def tokens_of(turns: list[Turn], which: int, how: str, added: list[int]) -> list[int]:
    if how == "fresh" or not turns:
        return [7, *added]
    turn = turns[which % len(turns)]
    whole: list[int] = turn.token_ids.tolist()
    if how == "again":
        return whole[: turn.num_read]
    if how == "drop":
        return [*whole[: turn.num_read // 2], *whole[turn.num_read :], *added]
    return [*(whole if how == "extend" else [whole[0] + 50, *whole[1:]]), *added]


@given(REQUESTS, st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_in_any_tree_each_sampled_token_is_trained_once_after_exactly_what_was_read(
    rounds: list[list[tuple[int, str, list[int], bool]]], length: int
) -> None:
    engine = CountingEngine(length)
    tree = make_tree(engine)
    params = SamplingParams(max_new_tokens=length)
    turns: list[Turn] = []
    trained: dict[int, list[int]] = {}  # by the first sampled token of a turn: what was read

    async def run() -> None:
        for requests in rounds:
            read = [tokens_of(turns, which, how, added) for which, how, added, _ in requests]
            new = await asyncio.gather(
                *(
                    tree.take_turn(ids(*tokens), params, is_side=is_side)
                    for tokens, (*_, is_side) in zip(read, requests, strict=True)
                )
            )
            for turn, tokens, (*_, is_side) in zip(new, read, requests, strict=True):
                assert turn.token_ids[: turn.num_read].tolist() == tokens
                if not is_side:
                    trained[turn.sampled[0]] = tokens
            turns.extend(new)

    asyncio.run(run())
    counts: Counter[int] = Counter()
    for trajectory in tree.trajectories(1.0, {}, sample=0):
        whole, at = trajectory.token_ids.tolist(), 0
        for part in trajectory.parts:
            first = int(part.token_ids[0])
            if isinstance(part, Segment):
                counts.update(part.token_ids.tolist())
                if first in trained:
                    assert whole[:at] == trained[first]
            at += part.token_ids.size
    sampled = {token for turn in turns for token in turn.sampled if turn.sampled[0] in trained}
    assert counts == Counter(dict.fromkeys(sampled, 1))
    assert min(counts, default=FIRST_SAMPLED) >= FIRST_SAMPLED
