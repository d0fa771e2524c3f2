"""Groups packed into a few tensors come back as they were, and their number of tensors is fixed."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import sdp_lightning as sdp
from sdp_lightning.rollout.checkpoint.group_state import group_to_dict, groups_as_dicts, read_groups
from sdp_lightning.rollout.checkpoint.packed_groups import pack_groups
from sdp_lightning.rollout.checkpoint.resharding import reshard
from sdp_lightning.rollout.checkpoint.saved_group import SavedGroup, SavedResult
from sdp_lightning.types import Context, SamplingParams, Segment
from sdp_lightning.types.named_rewards import weighted_sum
from sdp_lightning.workflows.episode_log import CallEnd, CallStart, Event

token_lists = st.lists(st.integers(0, 2**40), min_size=1, max_size=5)
names = st.sampled_from(["correct", "form", "speed"])
texts = st.text(max_size=5).filter(lambda text: text.isprintable())


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    tokens = draw(token_lists)
    floats = st.floats(-100, 0, width=32)
    rows = st.lists(floats, min_size=len(tokens), max_size=len(tokens))
    kv: Any = draw(st.sampled_from(["recompute", "keep"]))
    segment = Segment(draw(st.integers(0, 99)), tokens, draw(rows), draw(st.floats(0.1, 2)), kv)
    if draw(st.booleans()):
        segment.proximal.set(draw(rows), draw(st.integers(0, 99)))
    return segment


params = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 9),
    temperature=st.just(0.0) | st.floats(1e-6, 2),
    stop_token_ids=st.lists(st.integers(0, 9), max_size=3).map(tuple),
)
contexts = st.builds(Context, token_lists)
ends = st.sampled_from(["stop", "length"]).map(lambda reason: CallEnd(reason))  # type: ignore[arg-type]
under_way = st.lists(st.one_of(contexts, segments(), params.map(CallStart), ends), max_size=6)
trajectories = st.tuples(contexts, st.lists(st.one_of(contexts, segments()), max_size=4)).map(
    lambda parts: [parts[0], *parts[1]]
)


@st.composite
def group_lists(draw: st.DrawFn, *, finished: bool) -> list[SavedGroup]:
    groups: list[SavedGroup] = []
    for order in range(draw(st.integers(0, 4))):
        logs: list[list[Event]] = draw(
            st.lists(trajectories if finished else under_way, min_size=int(finished), max_size=3)
        )
        reasons: Any = st.sampled_from(["stop", "length", "abort"])
        results = None
        if finished:
            finite, named = st.floats(-9, 9), draw(st.dictionaries(names, st.floats(-9, 9)))
            results = []
            for _ in logs:
                values = {name: draw(finite) for name in named}
                reward = weighted_sum(values, named) if named else draw(finite)
                sample = draw(st.none() | st.integers(0, 3))
                results.append(SavedResult(reward, draw(reasons), values, named, sample))
        place = draw(st.integers(0, 3)), draw(st.integers(0, 2**40))
        version = draw(st.integers(0, 9))
        groups.append(SavedGroup(*place, draw(texts), order, version, logs, results))
    return groups


def through_torch(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def plain(value: Any) -> Any:
    """Equal if bits are."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return (str(value.dtype), value.tolist()) if isinstance(value, torch.Tensor) else value


def as_dicts(groups: list[SavedGroup]) -> list[Any]:
    return [plain(group_to_dict(group)) for group in groups]


@settings(deadline=None)
@given(finished=st.booleans(), data=st.data())
def test_all_that_is_known_of_groups_comes_back_bit_for_bit(
    finished: bool, data: st.DataObject
) -> None:
    groups = data.draw(group_lists(finished=finished))
    packed = through_torch(pack_groups(groups))
    read = read_groups(packed, finished=finished)
    assert as_dicts(read) == as_dicts(groups)
    found, expected = ([[r.sample for r in g.results or ()] for g in x] for x in (read, groups))
    assert found == expected


@settings(deadline=None)
@given(groups=group_lists(finished=True))
def test_the_form_of_earlier_versions_is_read_as_the_packed_one_is(
    groups: list[SavedGroup],
) -> None:
    old = through_torch([group_to_dict(group) for group in groups])
    assert as_dicts(read_groups(old, finished=True)) == as_dicts(groups)
    assert [group.finished().row_id for group in read_groups(old, finished=True)] == [
        group.row_id for group in groups
    ]


def make_groups(count: int, num_logs: int = 2) -> list[SavedGroup]:
    logs: list[list[Event]] = [
        [
            CallStart(SamplingParams(max_new_tokens=4)),
            Context([1, 2]),
            Segment(0, [3, 4], [-1.0, -2.0]),
        ]
        for _ in range(num_logs)
    ]
    return [SavedGroup(0, i, f"row{i}", i, 0, logs, None) for i in range(count)]


def count_tensors(value: Any) -> int:
    values = value.values() if isinstance(value, dict) else value
    if isinstance(value, torch.Tensor):
        return 1
    return sum(map(count_tensors, values)) if isinstance(value, dict | list) else 0


def test_the_number_of_tensors_and_settings_is_that_of_one_group() -> None:
    one, many = pack_groups(make_groups(1)), pack_groups(make_groups(300))
    assert count_tensors(one) == count_tensors(many) <= 15
    assert len(many["params"]) == 1 and many["texts"] == ["recompute"]


def test_what_is_read_does_not_hold_on_to_the_whole() -> None:
    (group,) = read_groups(through_torch(pack_groups(make_groups(1))), finished=False)
    _, context, segment = group.logs[1]
    assert isinstance(context, Context) and isinstance(segment, Segment)
    for array in (context.token_ids, segment.token_ids, segment.logprobs):
        assert array.flags.owndata and not array.flags.writeable


@pytest.mark.fault("corrupted data", "resume")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("num_logs", lambda tensor: tensor[:-1]),
        ("num_logs", lambda tensor: tensor - 1),
        ("num_events", lambda tensor: tensor + 1),
        ("num_events", lambda tensor: tensor - 1),
        ("segments", lambda tensor: tensor[:-1]),
        ("events", lambda tensor: tensor[:-1]),
        ("events", lambda tensor: tensor * 0 + 2),
        ("temperatures", lambda tensor: tensor[:-1]),
        ("places", lambda tensor: tensor[:, :3]),
        ("token_ids", lambda tensor: tensor[:-1]),
        ("logprobs", lambda tensor: tensor[:-1]),
        ("texts", lambda texts: []),
        ("params", lambda params: []),
        ("row_ids", lambda names: [*names, "more"]),
        ("rewards", None),
        ("num_named", lambda tensor: tensor.new_ones(1)),
    ],
)
def test_parts_that_do_not_fit_are_one_named_error(name: str, change: Any) -> None:
    packed = pack_groups(make_groups(3))
    if change is None:
        del packed[name]
    else:
        packed[name] = change(packed[name])
    with pytest.raises((sdp.CheckpointError, sdp.RolloutError)):
        read_groups(packed, finished=False)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_packed_states_of_two_ranks_are_shared_by_another_number(num_ranks: int) -> None:
    prompts = {"epoch": 0, "position": 8, "num_rows": 9, "seed": 0, "shuffle": False}
    groups = make_groups(6)
    parts = [
        {
            "prompts": prompts | {"position": 8 + rank, "returned": []},
            "next_order": 6,
            "pending": pack_groups([]),
            "running": pack_groups(groups[rank::2]),
        }
        for rank in range(2)
    ]
    states = through_torch(reshard(through_torch(parts), num_ranks))
    found = [group for state in states for group in read_groups(state["running"], finished=False)]
    assert sorted(group.row_id for group in found) == [group.row_id for group in groups]
    logs = {group["row_id"]: plain(group["logs"]) for group in map(group_to_dict, found)}
    assert all(logs[group["row_id"]] == group["logs"] for group in as_dicts(groups))
    assert [groups_as_dicts(state["pending"], finished=True) for state in states] == (
        [[]] * num_ranks
    )
    assert np.unique([group.order for group in found]).size == 6
