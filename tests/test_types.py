"""What a rollout is made of refuses wrong values, and derives the rest."""

from __future__ import annotations

import math
import pickle
import threading
from typing import Any

import numpy as np
import pytest

from sdp_lightning.errors import ConfigError, RolloutError, SDPError, VersionError
from sdp_lightning.types import (
    Context,
    ProximalSlot,
    SamplingParams,
    Segment,
    Trajectory,
    TrajectoryGroup,
    count_sampled_tokens,
)
from support.rollouts import make_group, make_segment, make_trajectory


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(lambda: Segment(-1, [1], [0.0]), VersionError, "got -1", id="version below 0"),
        pytest.param(lambda: Segment(True, [1], [0.0]), VersionError, "got True", id="a boolean"),
        pytest.param(lambda: Segment(1.0, [1], [0.0]), VersionError, "got 1.0", id="a float"),  # type: ignore[arg-type]
        pytest.param(lambda: Segment(0, [], []), RolloutError, "at least one", id="no tokens"),
        pytest.param(lambda: Segment(0, [[1]], [[0.0]]), RolloutError, "one dim", id="a matrix"),
        pytest.param(lambda: Segment(0, [1.5], [0.0]), RolloutError, "of 0 or more", id="no ids"),
        pytest.param(lambda: Segment(0, [-1], [0.0]), RolloutError, "0 or more", id="negative id"),
        pytest.param(
            lambda: Segment(0, [1, 2], [0.0]), RolloutError, "2 token_ids but 1", id="lengths"
        ),
        pytest.param(
            lambda: Segment(0, [1], [float("nan")]), RolloutError, "not finite", id="nan log-prob"
        ),
        pytest.param(lambda: Context([]), RolloutError, "at least one", id="empty context"),
        pytest.param(lambda: Trajectory(()), RolloutError, "begin with a Context", id="no parts"),
        pytest.param(
            lambda: Trajectory((make_segment(0),)), RolloutError, "begin with", id="no prompt"
        ),
        pytest.param(
            lambda: Trajectory((Context([1]),), reward=float("inf")),
            *(RolloutError, "must be finite"),
            id="infinite reward",
        ),
        pytest.param(
            lambda: TrajectoryGroup((), row_id="r"), RolloutError, "row 'r' has no", id="no members"
        ),
    ],
)
def test_malformed_data_is_refused_with_the_value(
    make: Any, error: type[SDPError], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": math.inf}, "temperature must be 0 .* got inf"),
        ({"temperature": math.nan}, "temperature must be 0 .* got nan"),
        ({"temperature": 1e-40}, "temperature must be 0 .* got 1e-40"),  # 1 / it is inf in float32
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.9}, "allow_truncated_sampling=True"),
        ({"top_k": 5}, "allow_truncated_sampling=True"),
    ],
)
def test_sampling_params_are_validated(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**settings)


def test_stop_texts_of_a_subclass_are_plain_texts() -> None:
    kept = type("Kept", (str,), {})("\n")
    for given in (kept, [kept]):
        (text,) = SamplingParams(stop_texts=given).stop_texts
        assert type(text) is str and text == "\n"


def test_truncated_sampling_can_be_accepted() -> None:
    assert SamplingParams(top_p=0.9, top_k=5, allow_truncated_sampling=True).top_k == 5


def test_head_and_tail_are_over_every_member_and_version_zero_counts() -> None:
    """Fault: only row 0 of a group looked at."""
    group = make_group([3, 5], [4], [0, 7])
    assert (group.head_version, group.tail_version) == (0, 7)
    assert (group.num_sampled, count_sampled_tokens([group, group])) == (10, 20)
    assert len(group.segments) == 5 and group.reward == 0.0


def test_a_trajectory_adds_up_its_parts() -> None:
    trajectory = Trajectory((Context([1, 2]), make_segment(0), Context([9]), make_segment(1, 3)))
    assert trajectory.num_tokens == 8 and trajectory.num_sampled == 5
    assert trajectory.token_ids.tolist() == [1, 2, 3, 4, 9, 3, 4, 5]
    assert Trajectory((Context([1]),)).head_version is None


def test_arrays_are_copies_that_nobody_can_write() -> None:
    tokens = np.array([1, 2])
    segment = Segment(0, tokens, [0.0, 0.0])
    tokens[0] = 99
    assert segment.token_ids[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        segment.token_ids[0] = 5
    segment.proximal.set([1.0, 2.0], 1)
    assert segment.proximal.logprobs is not None
    with pytest.raises(ValueError, match="read-only"):
        segment.proximal.logprobs[0] = 0


def test_a_score_is_stored_once_with_its_version_by_whoever_comes_first() -> None:
    slot, errors, starting = ProximalSlot(), [], threading.Barrier(8)

    def score(version: int) -> None:
        starting.wait()
        try:
            slot.set([float(version)], version)
        except VersionError as error:
            errors.append(error)

    threads = [threading.Thread(target=score, args=(v,)) for v in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 7 and slot.logprobs is not None
    assert slot.logprobs.tolist() == [slot.version]


def test_a_pickled_group_keeps_its_scores() -> None:
    scored = Trajectory((Context([1]), make_segment(0, scored=1)))
    copy = pickle.loads(pickle.dumps(TrajectoryGroup((scored, make_trajectory(0)))))
    first, second = copy.segments
    assert first.proximal.version == 1 and first.proximal.logprobs.tolist() == [-1.0, -1.0]
    assert not second.proximal.is_set and second.proximal.version is None
