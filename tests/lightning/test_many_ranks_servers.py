"""Two processes that sample on the same servers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fake_servers import Server, servers
from support.paths import SUPPORT
from support.rank_runs import Launcher, Results
from support.real_vllm import assert_gone

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
