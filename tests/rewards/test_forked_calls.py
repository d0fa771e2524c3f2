"""Code that a completion brings into a reward's process changes nothing for later calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.rewards import RewardCounts, RewardPool
from support.reward_pools import DEADLINE_S, FILE, call, is_running
from support.waiting import wait_for

EXECUTE = f"{FILE}:execute"
FORGE = (  # of the first report: a message of the worker's own form in every socket
    "import os, struct\nb = b'{\"value\": %s}'\nfor fd in map(int, os.listdir('/proc/self/fd')):\n"
    "  try:\n"
    "    if fd > 2 and 'socket' in os.readlink(f'/proc/self/fd/{fd}'):\n"
    "      os.write(fd, struct.pack('!Q', len(b)) + b)\n"
    "  except OSError: pass\n"
)
# Each is run by the reward in its own process. With one process for all calls, it answers for later
# samples as well, or costs them.
TAKING_OVER = {
    "the reward's code": "sys.modules[name].execute.__code__ = (lambda c, r: 777.0).__code__",
    "a builtin": "import builtins; builtins.float = lambda value: 777.0",
    "the worker's call": "worker._call = lambda *a: 777.0",
    "the worker's answer": "worker._attempt = lambda f: b'{\"value\": 777.0}'",
    "the worker's channel": "worker.send = lambda *a: 1 / 0",
    "a library": "import json; json.dumps = lambda *a: '{\"value\": 777.0}'",
    "unpickling": "import pickle; pickle.loads = lambda data: ('', {'n': 777})",
    "a forged number": FORGE % "777",
    "a forged NaN": FORGE % "NaN",
    "a forged text": FORGE % '"text"',
    "the exit": "import os; os._exit = lambda status: None",
    "an exit hook": "import os; os.register_at_fork(before=lambda: os.abort())",
    "a trace": "sys.setprofile(lambda *a: 1 / 0)",
    "a signal": "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "a thread": "import threading, time; threading.Thread(target=time.sleep, args=(999,)).start()",
    "the limits": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))",
    "the environment": "import os; os.environ.clear(); os.chdir('/'); os.umask(0o777)",
    "a stopped parent": "import os, signal; os.kill(os.getppid(), signal.SIGSTOP)",
    "a killed parent": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    "a killed worker": "import os, signal; os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)",
    "a child that answers later": "import os\nif os.fork() == 0: row['n'] = 777",
    "a child in its session": "import os, time\nif os.fork() == 0: os.setsid(); time.sleep(999)",
}


@pytest.fixture(scope="module")
def one() -> Iterator[RewardPool]:
    settings: dict[str, Any] = {"timeout_s": DEADLINE_S, "on_error": "zero"}
    with closing(RewardPool(EXECUTE, on_kill="zero", num_workers=1, **settings)) as pool:
        yield pool


@pytest.mark.parametrize("code", TAKING_OVER.values(), ids=TAKING_OVER)
@pytest.mark.fault("corrupted data", "completion")
def test_code_that_a_reward_executes_does_not_answer_for_later_samples(
    one: RewardPool, code: str
) -> None:
    call(one, code, n=2)  # whatever its own sample is worth
    assert [call(one, "pass", n=n) for n in (3, 4)] == [3.0, 4.0]


def test_without_forks_it_does() -> None:
    """The control: the same code, and what ``fork_calls=False`` says is meant."""
    with closing(RewardPool(EXECUTE, on_kill="zero", num_workers=1, fork_calls=False)) as pool:
        call(pool, TAKING_OVER["the reward's code"], n=2)
        assert call(pool, "pass", n=3) == 777.0


def test_each_call_starts_from_what_was_loaded() -> None:
    for forks, values in ((True, [1.0, 1.0, 1.0]), (False, [1.0, 2.0, 3.0])):
        with closing(RewardPool(f"{FILE}:count", num_workers=1, fork_calls=forks)) as pool:
            assert [call(pool, "any") for _ in range(3)] == values


@pytest.mark.parametrize("forks", [True, False])
def test_a_reward_that_starts_threads_while_it_is_loaded_is_not_forked_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, forks: bool
) -> None:
    file = tmp_path / "threaded.py"
    file.write_text(
        "import os, threading, time\n"
        "threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()\n"
        "def reward(completion, row): return float(os.getpid())\n"
    )
    with closing(RewardPool(f"{file}:reward", num_workers=1, fork_calls=forks)) as pool:
        assert call(pool, "any") == call(pool, "any")
    said = caplog.text.count("cannot be forked for each call")
    assert said == (1 if forks else 0), caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a crash costs its worker")
def test_a_call_that_hangs_crashes_or_eats_memory_costs_its_own_process_and_no_worker() -> None:
    settings: dict[str, Any] = {"num_workers": 1, "memory_bytes": 2**28, "timeout_s": 5.0}
    with closing(RewardPool(f"{FILE}:reward", on_kill="zero", **settings)) as pool:
        worker = call(pool, "parent_id")
        for way in ("abort", "read_null", "leave", "one_big_piece", "power_tower", "stop"):
            assert call(pool, way) == 0.0
        assert call(pool, "parent_id") == worker
        assert pool.counts == RewardCounts(value=2, crashed=3, out_of_memory=1, timed_out=2)


OUTCOMES = {
    "close stdout": 1.0,
    "close the streams": 1.0,
    "exit with 0": "ended its process with exit status 0",
    "be killed": "died of SIGKILL",
    "kill the group": "died of SIGKILL",
    "an alarm": "died of SIGALRM",
    "ignore SIGTERM": "took longer than",
    "a huge integer": "returned a value of <class 'int'> that cannot be written out",
    "a huge error": "raised ValueError: xxx",
    "a deep recursion": "raised RecursionError",
    "an error that cannot be shown": "Unshowable: <exception str() failed>",
}


@pytest.fixture(scope="module")
def ways() -> Iterator[RewardPool]:
    settings: dict[str, Any] = {"timeout_s": 5.0, "on_error": "zero", "num_workers": 1}
    with closing(RewardPool(f"{FILE}:reward", on_kill="zero", **settings)) as pool:
        yield pool


@pytest.mark.parametrize("way", OUTCOMES)
@pytest.mark.fault("exception", "reward")
def test_whatever_a_reward_does_it_costs_its_own_sample_and_is_named(
    ways: RewardPool, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = OUTCOMES[way]
    assert call(ways, way) == (outcome if isinstance(outcome, float) else 0.0)
    if isinstance(outcome, str):
        assert outcome in caplog.text
        assert len(caplog.text) < 6000
    assert call(ways, "good") == 1.0


def test_the_process_of_a_call_has_ended_when_it_is_answered() -> None:
    with closing(RewardPool(f"{FILE}:reward", num_workers=1)) as pool:
        process = int(call(pool, "process_id"))
        wait_for(lambda: not is_running(process))
        assert call(pool, "process_id") != process


def test_a_setting_that_there_is_not_is_refused() -> None:
    settings: dict[str, Any] = {"fork_call": False}
    with pytest.raises(TypeError, match=r"no setting \['fork_call'\]"):
        RewardPool(EXECUTE, **settings)
