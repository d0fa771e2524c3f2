"""CONTRACT section 2: which groups are too old."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, RolloutError, VersionError
from sdp_lightning.rollout import factory
from sdp_lightning.rollout.groups.staleness import SegmentWisePPOStrategy, StandardPPOStrategy
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup
from support.rollouts import make_group, make_segment


@pytest.mark.parametrize(
    ("members", "H", "version", "stale"),
    [
        pytest.param([[3]], 2, 5, False, id="head lag of H is kept"),
        pytest.param([[2]], 2, 5, True, id="head lag above H is stale"),
        pytest.param([[5], [5], [2]], 2, 5, True, id="the last member counts, too"),
        pytest.param([[2, 5]], 2, 5, True, id="the oldest segment of a trajectory decides"),
        pytest.param([[5]], 0, 5, False, id="H=0 keeps lag 0"),
        pytest.param([[5], [4, 5]], 0, 5, True, id="H=0 drops anything older"),
        pytest.param([[0]], 2, 2, False, id="version 0 is a version like any other: kept"),
        pytest.param([[0]], 2, 3, True, id="version 0 is a version like any other: stale"),
        pytest.param([[0]], 0, 0, False, id="version 0 trained at 0"),
    ],
)
def test_head_lag_decides(
    members: Sequence[Sequence[int]], H: int, version: int, stale: bool
) -> None:
    assert SegmentWisePPOStrategy(max_head_lag=H).is_stale(make_group(*members), version) is stale
    assert not StandardPPOStrategy().is_stale(make_group(*members), version)


@pytest.mark.parametrize(
    ("missing", "stale"),
    [("behavior", False), ("loglinear", False), ("decoupled", False), ("drop", True)],
)
def test_an_unscored_segment_of_lag_two_is_stale_only_under_drop(missing: str, stale: bool) -> None:
    strategy = factory.create_staleness_strategy(
        sdp.RolloutConfig(max_head_lag=4, missing_proximal=missing)  # pyright: ignore
    )
    assert strategy.is_stale(make_group([3, 5]), 5) is stale
    assert not strategy.is_stale(make_group([4, 5]), 5), "lag 1 needs no score"
    scored = Trajectory((Context([1]), make_segment(3, scored=4), make_segment(5)))
    assert not strategy.is_stale(TrajectoryGroup((scored,)), 5)


def test_context_tokens_do_not_count() -> None:
    trajectory = Trajectory((Context([1]), make_segment(5), Context([1]), make_segment(5)))
    assert not SegmentWisePPOStrategy(max_head_lag=0).is_stale(TrajectoryGroup((trajectory,)), 5)


def test_masking_judges_by_the_newest_token() -> None:
    strategy = SegmentWisePPOStrategy(max_head_lag=1, mask_overdue=True)
    assert not strategy.is_stale(make_group([0, 4]), 5)
    assert strategy.is_stale(make_group([0, 3]), 5)


@pytest.mark.parametrize(
    "strategy",
    [SegmentWisePPOStrategy(max_head_lag=2), StandardPPOStrategy()],
    ids=["segment-wise", "standard"],
)
@pytest.mark.fault("corrupted data", "queue")
def test_malformed_versions_are_an_error_that_names_the_group(
    strategy: SegmentWisePPOStrategy | StandardPPOStrategy,
) -> None:
    """Fault: broad except and keep."""
    with pytest.raises(VersionError, match="group 7 of row 'r9' holds a token of version 6"):
        strategy.is_stale(make_group([6], order=7, row_id="r9"), 5)
    empty = TrajectoryGroup((Trajectory((Context([1]),)),), row_id="r9", order=7)
    with pytest.raises(RolloutError, match="group 7 of row 'r9' has no sampled tokens"):
        strategy.is_stale(empty, 5)


def test_a_verdict_costs_the_same_for_long_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    group = make_group(*[[1, 2, 3]] * 50)

    def refuse(self: TrajectoryGroup) -> tuple[Segment, ...]:
        raise AssertionError("walked over all segments")

    monkeypatch.setattr(TrajectoryGroup, "segments", property(refuse))
    monkeypatch.setattr(Trajectory, "segments", property(refuse))
    assert not SegmentWisePPOStrategy(max_head_lag=2).is_stale(group, 3)
    assert SegmentWisePPOStrategy(max_head_lag=2).is_stale(group, 4)


def test_a_running_group_is_overdue_beyond_the_bound() -> None:
    strategy = SegmentWisePPOStrategy(max_head_lag=2)
    assert [strategy.is_overdue(3, 5, c) for c in (5, 6)] == [False, True]
    assert not StandardPPOStrategy().is_overdue(0, 0, 99)


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ConfigError, match="got -1"):
        SegmentWisePPOStrategy(max_head_lag=-1)


def test_the_switch_chooses_strategy_modifier_and_recomputer() -> None:
    on, off = sdp.RolloutConfig(), sdp.RolloutConfig(enable_segment_wise_ppo=False)
    assert isinstance(factory.create_staleness_strategy(on), SegmentWisePPOStrategy)
    assert isinstance(factory.create_staleness_strategy(off), StandardPPOStrategy)
    assert len(factory.create_capacity_modifiers(on)) == 1
    assert factory.create_capacity_modifiers(off) == ()
    assert factory.create_recomputer(on) is not None and factory.create_recomputer(off) is None
