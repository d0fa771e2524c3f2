"""A failure on one rank ends all of them within seconds, and is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from support.paths import SUPPORT
from support.rank_runs import LIMIT_S, Launcher, running_in_group
from support.waiting import wait_for

DIED = {"kill": -9, "stopped": -9}
FAILURES = [
    # what, rank, what the failing one says, what the other one says
    ("reward", 1, "ValueError: no such letter", "rank 1 failed while taking the batch"),
    ("training step", 1, "no such gradient", "rank 1 failed: ValueError: no such gradient"),
    (
        "training step",
        0,
        "It was raised in on_train_batch_start of Troublemaker, a callback.",
        "rank 0 failed: ValueError: no such gradient",
    ),
    ("kill", 1, "", "rank 1 failed: its process has ended."),
    ("kill", 0, "", "rank 0 failed: its process has ended."),
    ("stopped", 1, "", "rank 1 failed: it has been stopped (SIGSTOP) for 90 s."),
    ("stopped", 0, "", "rank 0 failed: it has been stopped (SIGSTOP) for 90 s."),
    ("rollout hangs", 1, "waited 5.0 s for 2 groups", "rank 1 failed while taking the batch of"),
    ("publish", 1, "no such weight", "rank 1 failed while publishing version 1: EngineError"),
    (
        "publish hangs",
        1,
        "exiting with status 1",
        "waited 8.0 s for rank 1 while publishing version 1;",
    ),
]


def fail(launcher: Launcher, strategy: str, what: str, rank: int) -> tuple[Any, list[str]]:
    trouble = {"what": what, "rank": rank, "step": 1}
    limits = {"timeout_s": 5.0, "margin_s": 3.0} if "hangs" in what else {}
    settings = {"strategy": strategy, "trouble": trouble} | limits
    answer, logs, _ = launcher.launch(2, {"it": {"kind": "rollouts", **settings}})
    return answer, logs


def check_failure(launcher: Launcher, strategy: str, case: tuple[str, int, str, str]) -> None:
    what, rank, own, others = case
    answer, logs = fail(launcher, strategy, what, rank)
    assert not answer["late"], f"{what}: ranks {answer['late']} did not end"
    assert answer["codes"][rank] == DIED.get(what, 1)
    assert answer["codes"][1 - rank] == 1
    assert own in logs[rank], logs[rank]
    assert others in logs[1 - rank], logs[1 - rank]
    assert max(answer["seconds"]) < LIMIT_S


def name_failure(case: tuple[str, int, str, str]) -> str:
    return f"{case[0]}, rank {case[1]}"


@pytest.mark.parametrize("case", FAILURES, ids=name_failure)
@pytest.mark.fault("exception", "reward", only="^reward,")
@pytest.mark.fault("exception", "train step", only="^training step,")
@pytest.mark.fault("process killed", "train step", only="^kill,")
@pytest.mark.fault("hang", "gather", only="^(rollout hangs|stopped),")
@pytest.mark.fault("exception", "publish", only="^publish,")
@pytest.mark.fault("hang", "publish", only="^publish hangs,")
def test_a_failure_on_one_rank_ends_all_within_seconds_and_is_named(
    launcher: Launcher, case: tuple[str, int, str, str]
) -> None:
    check_failure(launcher, "ddp", case)


SHARDED = FAILURES[:-1]  # there the others wait in gloo


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case[:2] == ("kill", 1) else pytest.mark.slow)
        for case in SHARDED
    ],
    ids=name_failure,
)
@pytest.mark.fault("exception", "reward", only="^reward,")
@pytest.mark.fault("exception", "train step", only="^training step,")
@pytest.mark.fault("process killed", "train step", only="^kill,")
@pytest.mark.fault("hang", "gather", only="^(rollout hangs|stopped),")
@pytest.mark.fault("exception", "publish", only="^publish,")
def test_so_does_a_failure_where_weights_are_sharded(
    launcher: Launcher, case: tuple[str, int, str, str]
) -> None:
    check_failure(launcher, "fsdp", case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in FAILURES if case[0] in ("training step", "kill")], ids=name_failure
)
def test_no_process_is_left_of_ranks_that_lightning_started(
    model_folder: str, case: tuple[str, int, str, str]
) -> None:
    what, rank, _, others = case
    settings = {"kind": "rollouts", "trouble": {"what": what, "rank": rank, "step": 1}}
    order = {"folder": model_folder, "size": 2, "cases": [("it", settings)]}
    script = str(SUPPORT / "many_ranks_run.py")
    first = subprocess.Popen(
        [sys.executable, script, json.dumps(order)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    words, _ = first.communicate(timeout=200.0)  # to the end of all that hold its output
    assert first.returncode not in (0, None)
    assert others in words
    # A process closes its output a moment before it has ended.
    wait_for(lambda: not running_in_group(first.pid), lambda: running_in_group(first.pid))
