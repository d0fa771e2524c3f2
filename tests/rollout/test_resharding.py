"""Checkpoints of some ranks on another number of them: every row exactly once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from sdp_lightning.prompts.stream import PromptStream
from sdp_lightning.rollout.checkpoint.resharding import reshard

Place = tuple[int, int]


def make_stream(num_rows: int, rank: int, num_ranks: int, epochs: int | None) -> PromptStream:
    rows = [{"id": str(index)} for index in range(num_rows)]
    return PromptStream(rows, seed=3, num_epochs=epochs, rank=rank, num_ranks=num_ranks)


def group(place: Place, order: int, version: int = 0) -> dict[str, Any]:
    return {"epoch": place[0], "index": place[1], "order": order, "created_version": version}


def state_of(
    stream: PromptStream, pending: list[dict[str, Any]], running: list[dict[str, Any]]
) -> dict[str, Any]:
    orders = [g["order"] for g in (*pending, *running)]
    return {
        "prompts": stream.state_dict(),
        "next_order": max(orders, default=-1) + 1,
        "pending": pending,
        "running": running,
    }


def take(stream: PromptStream, count: int) -> list[Place]:
    rows = [stream.next() for _ in range(count)]
    return [(row.epoch, row.index) for row in rows if row is not None]


@given(
    num_rows=st.integers(1, 13),
    taken=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    num_ranks=st.integers(1, 5),
    data=st.data(),
)
def test_all_rows_of_all_epochs_come_exactly_once(
    num_rows: int, taken: list[int], num_ranks: int, data: st.DataObject
) -> None:
    epochs = 3
    streams = [make_stream(num_rows, r, len(taken), epochs) for r in range(len(taken))]
    seen: list[Place] = []
    parts: list[dict[str, Any]] = []
    for stream, count in zip(streams, taken, strict=True):
        begun = take(stream, count)
        trained = data.draw(st.integers(0, len(begun)))
        seen += begun[:trained]
        left = [group(place, order) for order, place in enumerate(begun) if order >= trained]
        cut = data.draw(st.integers(0, len(left)))
        parts.append(state_of(stream, left[:cut], left[cut:]))
    for rank, part in enumerate(reshard(parts, num_ranks)):
        stream = make_stream(num_rows, rank, num_ranks, epochs)
        stream.load_state_dict(part["prompts"])
        seen += [(g["epoch"], g["index"]) for g in (*part["pending"], *part["running"])]
        seen += take(stream, epochs * num_rows + 1)
    assert sorted(seen) == [(e, i) for e in range(epochs) for i in range(num_rows)]


def test_groups_keep_the_order_of_their_creation_and_get_places_of_their_own() -> None:
    streams = [make_stream(10, rank, 2, None) for rank in range(2)]
    first = state_of(streams[0], [group((0, 1), 4, 1)], [group((0, 2), 7, 2)])
    second = state_of(streams[1], [group((0, 3), 4, 0)], [group((0, 4), 5, 1)])
    (whole,) = reshard([first, second], 1)
    found = sorted((g["order"], g["index"]) for g in (*whole["pending"], *whole["running"]))
    assert found == [(0, 3), (1, 1), (2, 4), (3, 2)]
    assert whole["next_order"] == 4
    assert [g["index"] for g in whole["pending"]] == [3, 1]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_same_number_of_ranks_gets_back_what_it_had(num_ranks: int) -> None:
    streams = [make_stream(5, rank, num_ranks, None) for rank in range(num_ranks)]
    parts = [state_of(stream, [], [group((0, 1), 2)]) for stream in streams]
    assert reshard(parts, num_ranks) == parts
