"""Rollouts of two processes: rows, versions, lags and metrics are those of one."""

from __future__ import annotations

from typing import Any

import pytest

from support.network_page import check, places
from support.rank_runs import Launcher, Results, assert_same_weights

STRATEGIES = ("ddp", "fsdp")
ALONE = ("on policy", "to the end", "a stream")


UNEVEN = {
    str(i): {"turns": 2 + i % 3, **({"reject": True} if i % 5 == 0 else {})}
    for i in range(1, 80, 2)
}
LAST = {  # rows of each rank, batch by batch
    "short": ([["row0", "row2"], ["row4", "row6"], ["row8", "row10"]], [["row1", "row3"], [], []]),
    "fill": (
        [["row0", "row2"], ["row4", "row6"], ["row8", "row10"]],
        [["row1", "row3"]] * 3,
    ),
    "drop": ([["row0", "row2"]], [["row1", "row3"]]),
}
ENDS_FIRST = {
    "steps": 0,
    "num_rows": 12,
    "num_epochs": 1,
    "minibatches": 2,
    "rows": {str(i): {"reject": True} for i in range(5, 12, 2)},
}
ROLLOUTS: dict[str, dict[str, Any]] = {
    "on policy": {
        "num_val": 5,
        "summary": True,
        "trouble": {"what": "port scan", "rank": 1, "step": 1},
    },
    "to the end": {"steps": 0, "num_rows": 15, "num_epochs": 1},
    "epochs": {
        "steps": 0,
        "num_rows": 7,
        "num_val": 5,
        "flags": {"max_epochs": 3, "limit_val_batches": 1},
    },
    "a stream": {"steps": 0, "num_rows": 15, "num_epochs": 1, "stream": True},
    **{f"rank 1 ends first: {last}": ENDS_FIRST | {"last_batch": last} for last in LAST},
    "rank 1 is late": {
        "rows": {str(i): {"slow_s": 0.2} for i in range(1, 40, 2)},
        "trouble": {"what": "port scan", "rank": 0},
    },
    "uneven": {
        "max_head_lag": 3,
        "steps": 6,
        "num_rows": 80,
        "rows": UNEVEN,
        "engine": {"latency_s": 0.1, "chunks": 4},
    },
}


@pytest.fixture(scope="module")
def alone(launcher: Launcher) -> dict[str, Any]:
    """What one process sees of the first three."""
    cases = {name: {"kind": "rollouts", **ROLLOUTS[name]} for name in ALONE}
    # A port scan on the ranks has to change nothing.
    return launcher.run(1, cases)[0]


@pytest.fixture(scope="module", params=STRATEGIES)
def both(request: pytest.FixtureRequest, launcher: Launcher) -> Results:
    """What two processes see of all of them."""
    cases = {
        name: {"kind": "rollouts", "strategy": request.param, **case}
        for name, case in ROLLOUTS.items()
    }
    return launcher.run(2, cases)


def test_ranks_listen_where_the_page_of_the_network_says(both: Results) -> None:
    first, second = (rank["to the end"] for rank in both)
    every = places("backend gloo", "every rank")
    check(second["listening"], every)
    named, port = [*every, *places("several processes", "rank 0")], first["MASTER_PORT"]
    check(first["listening"], named, MASTER_PORT=port)


@pytest.mark.fault("corrupted data", "stranger")
@pytest.mark.parametrize("name", ALONE)
def test_rollouts_of_ranks_are_those_of_one_process(
    both: Results, alone: dict[str, Any], name: str
) -> None:
    expected, found = alone[name], [rank[name] for rank in both]
    for rank in found:
        assert_same_weights(rank, expected)
        assert rank["versions"] == expected["versions"]
    for step, rows in enumerate(expected["rows"]):
        assert found[0]["rows"][step] == rows[0::2] and found[1]["rows"][step] == rows[1::2]
    local = ("time/", "rollout_time/", "speed/", "wait", "rollout/running", "rollout/pending")
    for first, second, one in zip(*(f["metrics"] for f in (*found, expected)), strict=True):
        spent = {key for key in one if key.startswith("publish/") and key.endswith("_s")}
        names = [key for key in one if not key.startswith(local) and key not in spent]
        assert first.keys() == one.keys()
        assert {key: first[key] for key in names} == {key: second[key] for key in names}
        for key in names:
            assert first[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key


def test_a_step_meets_three_times_and_adds_up_once(both: Results) -> None:
    lightning = "broadcast"  # whether rank 0 got SIGTERM
    step = [lightning, "taking", "counting", "all_reduce", "publishing"]
    for rank in both:
        assert rank["rank 1 is late"]["collectives"][1:] == [step] * 3


def test_on_policy_every_lag_is_0_on_every_rank(both: Results) -> None:
    for rank in both:
        for name in ("on policy", "to the end", "rank 1 is late"):
            assert {lag for step in rank[name]["lags"] for lag in step} == {0}


def test_every_row_is_trained_on_once_by_one_rank(both: Results) -> None:
    for name in set(ROLLOUTS) - {"rank 1 ends first: fill", "epochs"}:
        rows = [row for rank in both for step in rank[name]["rows"] for row in step]
        assert len(rows) == len(set(rows)), name
        assert all(
            int(row.removeprefix("row")) % 2 == number
            for number, rank in enumerate(both)
            for step in rank[name]["rows"]
            for row in step
        )


def test_the_last_rows_are_a_batch_of_which_ranks_have_unlike_shares(both: Results) -> None:
    """15 rows: 8 for rank 0, 7 for rank 1, and 2 a step for each."""
    assert [rank["to the end"]["rows"][3] for rank in both] == [["row12", "row14"], ["row13"]]
    for rank in both:
        assert rank["to the end"]["versions"] == [1, 2, 3, 4]


def test_ranks_end_their_epochs_together_and_each_row_is_trained_so_often(both: Results) -> None:
    """7 rows, 2 a step for each rank: epochs reach into the next, and of 21 one is left over."""
    first, second = (rank["epochs"] for rank in both)
    for number, found in enumerate((first, second)):
        rows = [f"row{place % 7}" for place in range(number, 21, 2)]
        assert found["rows"] == [rows[start : start + 2] for start in range(0, 12, 2)]
    assert first["digest"] == second["digest"]
    assert [version for _, version in first["val"]] == [2, 4, 6] and first["val"] == second["val"]
    assert sorted({*first["val_rows"], *second["val_rows"]}) == ["val0", "val1", "val2", "val3"]


@pytest.mark.parametrize("last", LAST)
def test_ranks_end_together_also_if_one_has_no_row_left(both: Results, last: str) -> None:
    found = [rank[f"rank 1 ends first: {last}"] for rank in both]
    assert tuple(rank["rows"] for rank in found) == LAST[last]
    assert found[0]["digest"] == found[1]["digest"]
    for rank in found:
        assert rank["versions"] == list(range(1, 1 + len(LAST[last][0])))
    rewards = [[step["train/reward"] for step in rank["metrics"]] for rank in found]
    assert rewards[0] == rewards[1]


@pytest.mark.fault("slow", "gather")
def test_ranks_stay_together_whatever_each_has_to_wait_for_and_to_score(both: Results) -> None:
    first, second = (rank["uneven"] for rank in both)
    assert first["versions"] == second["versions"] == [1, 2, 3, 4, 5, 6]
    assert first["digest"] == second["digest"]
    for rank in (first, second):
        assert max(lag for step in rank["lags"] for lag in step) <= 3
    assert max(lag for step in second["lags"] for lag in step) >= 2, "the case is too easy"
    for mine, *lags in zip(first["metrics"], first["lags"], second["lags"], strict=True):
        assert mine["lag/max"] == max(map(max, lags))
    assert second["scored"] > 0
    late = [rank["rank 1 is late"] for rank in both]
    assert late[0]["digest"] == late[1]["digest"]
    assert [len(step) for rank in late for step in rank["rows"]] == [2] * 8


@pytest.mark.fault("corrupted data", "gather")
def test_strangers_on_every_port_of_rank_0_change_nothing(both: Results) -> None:
    """They say nothing, HTTP, or nonsense, and stay connected to the end."""
    first, second = (rank["rank 1 is late"] for rank in both)
    assert first["scanned"], "the store of torch.distributed at least"
    assert first["versions"] == second["versions"] == [1, 2, 3, 4]
    assert first["digest"] == second["digest"]


def test_where_weights_are_sharded_all_ranks_score_when_one_does(
    both: Results, request: pytest.FixtureRequest
) -> None:
    calls = [rank["uneven"]["score_calls"] for rank in both]
    if "fsdp" in request.node.name:
        assert calls == [5, 5]  # at every step but that of version 0
    else:
        assert calls[1] > 0


def test_every_evaluation_row_is_rolled_out_once_and_all_ranks_log_the_same(
    both: Results, alone: dict[str, Any]
) -> None:
    first, second = (rank["on policy"] for rank in both)
    assert sorted(first["val_rows"] + second["val_rows"]) == sorted(
        f"val{i}" for i in range(5) for _ in range(4)
    )
    assert first["val"] == second["val"]
    rewards = [reward for reward, _ in alone["on policy"]["val"]]
    assert [reward for reward, _ in first["val"]] == pytest.approx(rewards)
    assert [version for _, version in first["val"]] == [1, 2, 3, 4]


def test_one_rank_writes_the_summary(both: Results) -> None:
    assert [rank["on policy"]["page"] for rank in both] == [["reward.png"], []]


def test_every_token_has_the_version_that_sampled_it(both: Results) -> None:
    assert all(exact for rank in both for case in rank.values() for exact in case["exact"])
