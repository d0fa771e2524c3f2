"""Micro-batches and minibatches: they cover every row once, within the budget, at a level cost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sdp_lightning.errors import ConfigError
from sdp_lightning.training.batch import (
    AttentionCosts,
    Layout,
    collate,
    pack_microbatches,
    pad_microbatches,
    share_microbatches,
    split_minibatches,
)
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup

torch.set_num_threads(1)
untimed = settings(deadline=None)
ROWS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), min_size=1, max_size=25)


def shared_cost(rows: list[int], lengths: list[int], groups: list[int], prefix: list[int]) -> int:
    own = sum(lengths[row] - prefix[row] for row in rows)
    return own + sum({groups[row]: prefix[row] for row in rows}.values())


def prefix_of(lengths: list[int], groups: list[int]) -> list[int]:
    shortest = {g: min(n for n, h in zip(lengths, groups, strict=True) if h == g) for g in groups}
    return [shortest[g] // 2 for g in groups]


@untimed
@given(rows=ROWS, budget=st.integers(1, 80))
def test_padded_pieces_cover_every_row_once_within_the_budget(
    rows: list[tuple[int, int]], budget: int
) -> None:
    lengths = [length for length, _ in rows]
    plan = pad_microbatches(lengths, budget)
    assert sorted(row for piece in plan for row in piece) == list(range(len(lengths)))
    for piece in plan:
        assert len(piece) == 1 or len(piece) * max(lengths[row] for row in piece) <= budget
    assert plan == pad_microbatches(lengths, budget)


@untimed
@given(rows=ROWS, budget=st.integers(1, 80))
def test_shared_pieces_keep_a_group_whole_where_it_fits(
    rows: list[tuple[int, int]], budget: int
) -> None:
    lengths, groups = [length for length, _ in rows], [group for _, group in rows]
    prefix = prefix_of(lengths, groups)
    plan = share_microbatches(lengths, prefix, groups, budget)
    assert sorted(row for piece in plan for row in piece) == list(range(len(lengths)))
    for piece in plan:
        assert len(piece) == 1 or shared_cost(piece, lengths, groups, prefix) <= budget
    for group in set(groups):
        members = [row for row, other in enumerate(groups) if other == group]
        if shared_cost(members, lengths, groups, prefix) <= budget:
            assert sum(any(row in piece for row in members) for piece in plan) == 1


def test_a_shared_prefix_counts_once() -> None:
    # Two groups of 4 rows, prompt 10, 3 tokens each: 22 a group instead of 52.
    lengths, groups, prefix = [13] * 8, [0] * 4 + [1] * 4, [10] * 8
    plan = share_microbatches(lengths, prefix, groups, 44)
    assert plan == [list(range(8))]
    plan = share_microbatches(lengths, prefix, groups, 43)
    assert plan == [[0, 1, 2, 3], [4, 5, 6, 7]]
    plan = share_microbatches(lengths, prefix, groups, 17)
    assert plan == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_pieces_are_level_instead_of_full_with_a_rest() -> None:
    assert [len(piece) for piece in pad_microbatches([10] * 9, 80)] == [5, 4]


@untimed
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    budget=st.integers(20, 120),
    pair_share=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_no_other_cut_into_as_few_pieces_costs_less_at_its_dearest(
    lengths: list[int], budget: int, pair_share: float
) -> None:
    def cost(piece: Sequence[int]) -> float:
        width = max(lengths[row] for row in piece)
        return len(piece) * (width + pair_share * width**2)

    def fits(piece: Sequence[int]) -> bool:
        return len(piece) == 1 or len(piece) * max(lengths[row] for row in piece) <= budget

    plan = pad_microbatches(lengths, budget, AttentionCosts(pair=pair_share))
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    best: dict[int, float] = {}
    for cuts in itertools.product((False, True), repeat=len(order) - 1):
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(order)]
        pieces = [order[a:b] for a, b in itertools.pairwise(ends)]
        if all(map(fits, pieces)):
            dearest = max(map(cost, pieces))
            best[len(pieces)] = min(best.get(len(pieces), dearest), dearest)
    assert len(plan) == min(best)
    assert max(map(cost, plan)) <= best[len(plan)] + 0.5


def test_pieces_are_level_by_pairs_of_tokens_too() -> None:
    # By tokens 4 x 40 and 8 x 20 are 160 each; by pairs 3 x 40 cost more than 9 x 20 already.
    lengths = [40] * 3 + [20] * 9
    assert [len(piece) for piece in pad_microbatches(lengths, 180)] == [4, 8]
    assert [len(piece) for piece in pad_microbatches(lengths, 180, AttentionCosts(pair=1.0))] == [
        3,
        9,
    ]


def test_rows_of_like_length_are_padded_together() -> None:
    plan = pad_microbatches([2, 20, 2, 20, 2], 40)
    assert [sorted(piece) for piece in plan] == [[1, 3], [0, 2, 4]]


def test_microbatches_of_a_batch_count_what_is_computed() -> None:
    # Prompt 3, one sampled token each: the token is scored from the prompt, nothing of its own.
    groups = [
        TrajectoryGroup(
            tuple(Trajectory((Context([4, 5, 6]), Segment(0, [k], [-1.0]))) for k in (7, 8, 9))
        )
    ]
    batch = collate(groups, version=0)
    assert batch.microbatches(3, "shared_prefix") == [[0, 1, 2]]
    assert batch.microbatches(3, "padded") == [[0], [1], [2]]


def test_a_budget_below_one_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens must be at least 1, got 0"):
        pad_microbatches([3], 0)


@untimed
@given(
    groups=st.lists(st.integers(0, 6), min_size=1, max_size=30),
    num_minibatches=st.integers(1, 7),
    seed=st.none() | st.integers(0, 99),
)
def test_minibatches_cover_every_row_once_and_keep_groups_whole(
    groups: list[int], num_minibatches: int, seed: int | None
) -> None:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if num_minibatches > len(set(groups)):
        with pytest.raises(ConfigError, match=f"{len(set(groups))} groups .* {num_minibatches} "):
            split_minibatches(groups, num_minibatches, generator=generator)
        return
    parts = split_minibatches(torch.tensor(groups), num_minibatches, generator=generator)
    assert sorted(row for part in parts for row in part) == list(range(len(groups)))
    owners = [{groups[row] for row in part} for part in parts]
    assert sum(len(owner) for owner in owners) == len(set(groups))
    sizes = [len(owner) for owner in owners]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_minibatches_are_shuffled_by_the_generator_alone() -> None:
    def split(seed: int) -> list[list[int]]:
        return split_minibatches(list(range(8)), 2, generator=torch.Generator().manual_seed(seed))

    assert split(1) == split(1)
    assert split(1) != split(2)
    assert split_minibatches(list(range(8)), 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@untimed
@given(rows=ROWS, budget=st.integers(1, 80), pair=st.sampled_from([0.0, 0.1]))
def test_packed_pieces_cover_every_row_once_within_the_budget(
    rows: list[tuple[int, int]], budget: int, pair: float
) -> None:
    lengths = [length for length, _ in rows]
    plan = pack_microbatches(lengths, budget, AttentionCosts(pair=pair))
    assert sorted(row for piece in plan for row in piece) == list(range(len(lengths)))
    for piece in plan:
        tokens = [lengths[row] for row in piece if lengths[row]]
        assert len(tokens) <= 1 or sum(tokens) <= budget
    assert plan == pack_microbatches(lengths, budget, AttentionCosts(pair=pair))
    if max(lengths) <= budget:  # two of the pieces, together, are more than one can hold
        assert len(plan) <= 1 + 2 * sum(lengths) // budget


def test_long_and_short_rows_are_packed_together() -> None:
    assert pack_microbatches([9, 9, 1, 1], 10) == [[0, 2], [1, 3]]
    assert pack_microbatches([30, 4, 0, 4], 10) == [[0], [1, 3, 2]]


def test_packs_are_level_by_pairs_of_tokens_too() -> None:
    # By tokens 16 and 14; by pairs the one row of 10, 100, outweighs all others, 70.
    lengths = [10, 5, 5, 2, 2, 2, 2, 2]
    assert pack_microbatches(lengths, 20) == [[0, 3, 5, 7], [1, 2, 4, 6]]
    by_pairs = pack_microbatches(lengths, 20, AttentionCosts(pair=1.0))
    assert by_pairs == [[0], [1, 2, 3, 4, 5, 6, 7]]


COSTS = AttentionCosts(pair=0.01, span=5.0)


@pytest.mark.parametrize(
    ("prompt", "answers", "costs", "cheapest"),
    [
        (14, [4] * 8, COSTS, "shared_prefix"),
        (1, [200, 10, 200, 10], COSTS, "packed"),  # the pairs of 200 with 200 are for nothing
        (1, [200] * 4, COSTS, "padded"),
        (1, [200, 150, 200, 150], dataclasses.replace(COSTS, by_span=False), "padded"),
    ],
)
def test_the_cheapest_layout_depends_on_padding_prompts_and_pairs(
    prompt: int, answers: list[int], costs: AttentionCosts, cheapest: str
) -> None:
    start = Context(range(3, 3 + prompt))
    members = [Trajectory((start, Segment(0, [5] * n, [-1.0] * n))) for n in answers]
    batch = collate([TrajectoryGroup(tuple(members))], version=0)
    layouts: tuple[Layout, ...] = ("padded", "packed", "shared_prefix")
    cost = {layout: batch.cost(4096, layout, costs) for layout in layouts}
    assert min(cost, key=lambda layout: cost[layout]) == cheapest, cost


def test_what_a_layout_costs() -> None:
    # Rows of 2 + 3 and 2 + 5 tokens, the last of each not computed.
    start = Context([3, 4])
    members = [Trajectory((start, Segment(0, [5] * n, [-1.0] * n))) for n in (3, 5)]
    batch = collate([TrajectoryGroup(tuple(members))], version=0)
    costs = AttentionCosts(pair=0.5, span=10.0)
    assert batch.cost(99, "padded", costs) == 2 * (6 + 0.5 * 36) + 10
    assert batch.cost(99, "packed", costs) == 10 + 0.5 * (16 + 36) + 2 * 10
    assert batch.cost(99, "shared_prefix", costs) == 8 + 0.5 * 64 + 10
    whole = dataclasses.replace(costs, by_span=False)
    assert batch.cost(99, "packed", whole) == 10 + 0.5 * 100 + 10
    assert batch.cost(4, "packed", whole) == 4 + 0.5 * 16 + 10 + 6 + 0.5 * 36 + 10
