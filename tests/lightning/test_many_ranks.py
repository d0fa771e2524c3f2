"""Two processes train as one does, with DDP and with FSDP2, and end together when one fails.

The ranks are forked from one process that has the libraries loaded: ``many_ranks_run.py``.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from transformers import AutoModelForCausalLM

import sdp_lightning as sdp
from sdp_lightning.training.batch import Layout, collate
from sdp_lightning.training.policy.forward import sequence_logprobs
from support.fake_servers import Server, servers
from support.paths import SUPPORT
from support.rank_runs import LIMIT_S, Launcher, Results, assert_same_weights, running_in_group
from support.real_vllm import assert_gone
from support.steps import VERSION, make_trajectories
from support.trainers import make_module, make_trainer

STRATEGIES = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def launcher(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    running = Launcher(model_folder, tmp_path_factory.mktemp("ranks"))
    yield running
    running.close()


# The same numbers as one process ------------------------------------------------------------------

RECORDED: dict[str, dict[str, Any]] = {
    "padded": {"layout": "padded"},
    "packed": {"layout": "packed", "minibatches": 2},
    "shared prefix, several minibatches": {"layout": "shared_prefix", "minibatches": 2},
    "partly trained, checkpointed": {
        "layout": "shared_prefix",
        "trainable": r"layers\.1\.|norm",
        "gradient_checkpointing": True,
    },
    "second moment": {
        "loss": {
            "surrogate": "unclipped",
            "trust_region": "behavior",
            "second_moment_cap": 0.01,
        }
    },
    "adapter, reference below it": {
        "layout": "shared_prefix",
        "lora": {"rank": 4, "alpha": 8.0},
        "loss": {"kl_coefficient": 0.5},
        "minibatches": 2,
        "gradient_checkpointing": True,
    },
}
MORE: dict[str, dict[str, Any]] = {
    "padded, float64": {"layout": "padded", "dtype": "float64", "minibatches": 2},
    "partly trained, padded": {"layout": "padded", "trainable": r"layers\.0\.mlp|lm_head"},
    "checkpointed": {"gradient_checkpointing": True, "minibatches": 2, "max_tokens": 200},
    "one micro-batch": {"layout": "shared_prefix", "max_tokens": 10_000},
    "reference, mean of sequences": {
        "minibatches": 2,
        "loss": {"kl_coefficient": 0.5, "aggregation": "sequence", "clip_epsilon": 0.1},
    },
}


def compare_recorded(
    launcher: Launcher, cases: Mapping[str, Mapping[str, Any]], strategy: str
) -> Results:
    alone = launcher.run(1, {name: {"kind": "recorded", **case} for name, case in cases.items()})
    ranks = launcher.run(
        2,
        {name: {"kind": "recorded", "strategy": strategy, **case} for name, case in cases.items()},
    )
    for name in cases:
        expected = alone[0][name]
        assert len(expected["metrics"]) == 5
        for found in (ranks[0][name], ranks[1][name]):
            assert_same_weights(found, expected)
            for mine, theirs in zip(found["metrics"], expected["metrics"], strict=True):
                assert mine.keys() == theirs.keys()
                for key, value in theirs.items():  # a percentile may fall into the next bin
                    rel = 0.16 if "_p9" in key else 1e-4
                    assert mine[key] == pytest.approx(value, rel=rel, abs=1e-6), (name, key)
        assert ranks[0][name]["metrics"] == ranks[1][name]["metrics"]
    return ranks


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_learn_what_one_process_learns(launcher: Launcher, strategy: str) -> None:
    ranks = compare_recorded(launcher, RECORDED, strategy)
    for name in ("padded", "partly trained, checkpointed"):  # one rank has forwards to spare
        assert ranks[0][name]["microbatches"] != ranks[1][name]["microbatches"]
    num_loads = {rank: {case["num_loads"] for case in ranks[rank].values()} for rank in (0, 1)}
    assert num_loads == {0: {1}, 1: {0 if strategy == "fsdp" else 1}}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_learn_what_one_process_learns_in_every_setting(
    launcher: Launcher, strategy: str
) -> None:
    compare_recorded(launcher, MORE, strategy)


def test_mixed_precision_rounds_sharded_weights_on_their_way_and_no_log_prob(
    launcher: Launcher, model_folder: str
) -> None:
    case = {
        "kind": "recorded",
        "strategy": "fsdp",
        "precision": "bf16-mixed",
        "max_tokens": 10_000,  # other shapes round otherwise
    }
    layouts: tuple[Layout, ...] = ("padded", "packed")
    ranks = launcher.run(2, {layout: {"layout": layout, **case} for layout in layouts})
    half = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    for layout, (number, rank) in itertools.product(layouts, enumerate(ranks)):
        seen = rank[layout]
        assert seen["types"] == {
            "used": "torch.bfloat16",
            "hidden": "torch.bfloat16",
            "kept": "torch.float32",
        }
        group = sdp.TrajectoryGroup(tuple(make_trajectories(model_folder, [3], seed=number)[0]))
        batch = collate([group], version=VERSION)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = sequence_logprobs(half, batch, layout=layout).logprobs[batch.loss_mask]
        scores = torch.tensor([x for scored in seen["scores"] for part in scored for x in part])
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
        assert (scores.bfloat16().float() != scores).float().mean() > 0.9
        assert {value.dtype for value in seen["weights"].values()} == {torch.float32}
        assert len(seen["metrics"]) == 5 and seen["metrics"] == ranks[0][layout]["metrics"]
        assert_same_weights(seen, ranks[0][layout])


# Rollouts -----------------------------------------------------------------------------------------

UNEVEN = {
    str(i): {"turns": 2 + i % 3, **({"reject": True} if i % 5 == 0 else {})}
    for i in range(1, 80, 2)
}
ROLLOUTS: dict[str, dict[str, Any]] = {
    "on policy": {"num_val": 5, "summary": True},
    "to the end": {"steps": 0, "num_rows": 15, "num_epochs": 1},
    "rank 1 is late": {"rows": {str(i): {"slow_s": 0.2} for i in range(1, 40, 2)}},
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
    """What one process sees of the first two."""
    cases = {name: {"kind": "rollouts", **ROLLOUTS[name]} for name in ("on policy", "to the end")}
    return launcher.run(1, cases)[0]


@pytest.fixture(scope="module", params=STRATEGIES)
def both(request: pytest.FixtureRequest, launcher: Launcher) -> Results:
    """What two processes see of all of them."""
    cases = {
        name: {"kind": "rollouts", "strategy": request.param, **case}
        for name, case in ROLLOUTS.items()
    }
    return launcher.run(2, cases)


@pytest.mark.parametrize("name", ["on policy", "to the end"])
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
        names = [key for key in one if not key.startswith(local)]
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
    for name in ROLLOUTS:
        rows = [row for rank in both for step in rank[name]["rows"] for row in step]
        assert len(rows) == len(set(rows)), name
        assert all(
            int(row.removeprefix("row")) % 2 == number
            for number, rank in enumerate(both)
            for step in rank[name]["rows"]
            for row in step
        )


def test_when_one_rank_runs_out_of_prompts_all_end(both: Results) -> None:
    """15 rows: 8 for rank 0, 7 for rank 1, and 2 a step for each."""
    for rank in both:
        assert len(rank["to the end"]["rows"]) == 3
        assert rank["to the end"]["versions"] == [1, 2, 3]


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


# Shared servers -----------------------------------------------------------------------------------

NUM_STEPS = 5


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Server]]:
    with servers(2, "--reply-s", "0.25") as running:
        yield running


def train_on(launcher: Launcher, pair: list[Server], what: str = "") -> Results:
    """Ranks that share servers; rank 0 makes trouble at step 2."""
    case = {
        "kind": "rollouts",
        "steps": NUM_STEPS,
        "max_head_lag": 2,
        "num_rows": 60,
        "servers": [{"url": server.url, "pid": server.process.pid} for server in pair],
        "trouble": {"what": what, "rank": 0, "step": 2},
    }
    ranks = [rank["it"] for rank in launcher.run(2, {"it": case})]
    for rank in ranks:
        assert rank["versions"] == list(range(1, NUM_STEPS + 1))
        assert rank["exact"] == [True] * NUM_STEPS
        assert {lag for step in rank["lags"] for lag in step} <= {0, 1, 2}
    assert ranks[0]["digest"] == ranks[1]["digest"]
    return ranks


def test_ranks_share_servers_that_the_first_one_leads(
    launcher: Launcher, pair: list[Server]
) -> None:
    for server in pair:
        server.restart()
    ranks = train_on(launcher, pair)
    assert any(lag for rank in ranks for step in rank["lags"] for lag in step), "nothing in flight"
    urls = [server.url for server in pair]
    assert all(rank["servers"] == [urls] * NUM_STEPS for rank in ranks)
    for server in pair:
        assert server.do()["version"] == str(NUM_STEPS)
        assert server.do()["received"]["/pause"] <= NUM_STEPS + 1  # one rank's, not both's


@pytest.mark.fault("process killed", "generate")
def test_a_server_that_is_killed_is_missed_by_no_rank(
    launcher: Launcher, pair: list[Server]
) -> None:
    for server in pair:
        server.restart()
    ranks = train_on(launcher, pair, "server killed")
    for rank in ranks:
        assert rank["servers"][1] == [server.url for server in pair]
        assert rank["servers"][2:] == [[pair[0].url]] * (NUM_STEPS - 2)


@pytest.mark.fault("exception", "publish")
def test_a_server_whose_load_failed_is_left_alone_by_all_and_comes_back(
    launcher: Launcher, pair: list[Server]
) -> None:
    """The fake dies, as vLLM does, if it is asked for tokens after a load that failed."""
    for server in pair:
        server.restart()
    ranks = train_on(launcher, pair, "load fails")
    both = [server.url for server in pair]
    assert ranks[1]["servers"][:3] == [both, both, both[:1]]
    assert ranks[1]["servers"][-1] == both
    assert [server.process.poll() for server in pair] == [None, None]


LAUNCHED = """#!{python}
import os, sys
port = sys.argv[sys.argv.index("--port") + 1]
with open({log!r}, "a") as log:
    log.write("%d " % os.getpid())
end, other = os.pipe()  # never closed: the guard ends this process
os.dup2(end, 0)
os.set_inheritable(other, True)
os.execv({python!r}, [{python!r}, {fake!r}, "--port", port])
"""


def test_launched_servers_are_started_once_and_ended(launcher: Launcher, tmp_path: Path) -> None:
    script, log = tmp_path / "python", tmp_path / "started"
    fake = str(SUPPORT / "fake_vllm.py")
    script.write_text(LAUNCHED.format(python=sys.executable, log=str(log), fake=fake))
    script.chmod(0o755)
    url = f"vllm://launch?python={script}&log_folder={tmp_path}&replicas=2&devices=cpu"
    ranks = launcher.run(2, {"it": {"kind": "rollouts", "steps": 2, "launch": url}})
    pids = [int(pid) for pid in log.read_text().split()]
    assert len(pids) == 2
    for rank in ranks:
        assert rank["it"]["versions"] == [1, 2] and rank["it"]["exact"] == [True, True]
        assert len(rank["it"]["servers"][0]) == 2
    assert_gone(pids)


# Failures -----------------------------------------------------------------------------------------

DIED = {"kill": -9}
FAILURES = [
    # what, rank, what the failing one says, what the other one says
    ("reward", 1, "ValueError: no such letter", "rank 1 failed while taking the batch"),
    ("training step", 1, "no such gradient", "rank 1 failed: ValueError: no such gradient"),
    ("training step", 0, "no such gradient", "rank 0 failed: ValueError: no such gradient"),
    ("kill", 1, "", "rank 1 failed: its process has ended."),
    ("kill", 0, "", "rank 0 failed: its process has ended."),
    ("rollout hangs", 1, "waited 2.0 s for 2 groups", "rank 1 failed while taking the batch of"),
    ("publish", 1, "no such weight", "rank 1 failed while publishing version 1: EngineError"),
    ("publish hangs", 1, "it is ended", "waited 3.0 s for rank 1 while publishing version 1;"),
]


def fail(launcher: Launcher, strategy: str, what: str, rank: int) -> tuple[Any, list[str]]:
    trouble = {"what": what, "rank": rank, "step": 1}
    settings = {"timeout_s": 2.0, "margin_s": 1.0, "strategy": strategy, "trouble": trouble}
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
@pytest.mark.fault("hang", "gather", only="^rollout hangs,")
@pytest.mark.fault("exception", "publish", only="^publish,")
@pytest.mark.fault("hang", "publish", only="^publish hangs,")
def test_a_failure_on_one_rank_ends_all_within_seconds_and_is_named(
    launcher: Launcher, case: tuple[str, int, str, str]
) -> None:
    check_failure(launcher, "ddp", case)


@pytest.mark.slow
@pytest.mark.parametrize("case", FAILURES[:-1], ids=name_failure)  # there the others wait in gloo
@pytest.mark.fault("exception", "reward", only="^reward,")
@pytest.mark.fault("exception", "train step", only="^training step,")
@pytest.mark.fault("process killed", "train step", only="^kill,")
@pytest.mark.fault("hang", "gather", only="^rollout hangs,")
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
    assert not running_in_group(first.pid)


def test_fsdp1_is_refused_with_the_strategy_to_use(model_folder: str) -> None:
    trainer, module = make_trainer(), make_module(model_folder)
    trainer._accelerator_connector.strategy = FSDPStrategy()
    module._trainer = trainer
    with pytest.raises(sdp.ConfigError, match=r"FSDP1.*ModelParallelStrategy"):
        module.setup("fit")
