"""What a reward pool refuses: rewards that cannot be imported, settings out of range."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.rewards import RewardCounts, RewardPool, WorkerLimits
from support import misbehaving_rewards, probing_rewards
from support.reward_pools import PLACE, call

PROBES = f"{probing_rewards.__file__}:reward"


def closure() -> Any:
    return lambda completion, row: 0.0


def script_function(completion: str, row: Any) -> float:
    return 0.0


script_function.__module__ = "__main__"


@pytest.mark.parametrize(
    "reward",
    [closure(), script_function, [].append, misbehaving_rewards.__name__.join],
    ids=["a lambda", "of the script", "a method", "of a string"],
)
def test_a_reward_without_a_place_is_refused_with_the_remedy(reward: Any) -> None:
    with pytest.raises(ConfigError, match=r"cannot import .*reward='path/to/file.py:name'"):
        RewardPool(reward)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 0}, "num_workers must be an integer of at least 1, got 0"),
        ({"memory_bytes": 0.5}, "memory_bytes must be an integer of at least 1, got 0.5"),
        ({"max_killed_in_a_row": 0}, "max_killed_in_a_row must be"),
        ({"timeout_s": 0}, "timeout_s must be positive"),
        ({"timeout_s": float("nan")}, "timeout_s must be positive"),
        ({"start_s": -1}, "start_s must be positive"),
        ({"on_kill": "ignore"}, "on_kill must be one of .*'leave_out'.*; got 'ignore'"),
        ({"on_error": None}, "on_error must be"),
        ({"memory_bytes": 2**30, "limits": WorkerLimits()}, "leave out memory_bytes, its former"),
    ],
    ids=str,
)
def test_settings_are_validated(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardPool(PLACE, **settings)


@pytest.mark.parametrize(
    ("body", "start_s", "message"),
    [
        ("raise ImportError('no wheel')", 60.0, r"raised ImportError: no wheel while .* loaded it"),
        ("os._exit(5)", 60.0, "ended its process with exit status 5 while"),
        ("time.sleep(3600)", 5.0, "took longer than 5.0 s while"),
    ],
    ids=["raises", "exits", "hangs"],
)
def test_a_reward_that_only_the_workers_cannot_load_is_an_error_and_not_a_zero(
    tmp_path: Path, body: str, start_s: float, message: str
) -> None:
    file = tmp_path / "picky.py"
    text = f"import os, sys, time\nif 'pytest' not in sys.modules:\n    {body}\n"
    file.write_text(text + "def reward(completion, row):\n    return 1.0\n")
    with closing(RewardPool(f"{file}:reward", num_workers=1, start_s=start_s)) as pool:
        for _ in range(2):
            with pytest.raises(RolloutError, match=message):
                call(pool, "any")
        assert pool.counts == RewardCounts()
        file.write_text(file.read_text().replace(body, "pass"))
        assert call(pool, "any") == 1.0


# Limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "form"),
    [
        ({"memory_mb": 0}, "memory_mb must be above 0 and below .*, or None; got 0"),
        ({"memory_mb": float("nan")}, "memory_mb must be above 0 and below .*; got nan"),
        ({"file_mb": "1"}, "file_mb must be a number or None, got '1'"),
        ({"processes": 0}, "processes must be above 0 and below .*; got 0"),
        ({"processes": 1.5}, "processes must be an integer"),
        ({"open_files": True}, "open_files must be an integer .* or None, got True"),
    ],
    ids=str,
)
def test_limits_are_validated(limit: dict[str, Any], form: str) -> None:
    with pytest.raises(ConfigError, match=form):
        WorkerLimits(**limit)


def test_limits_on_files_hold_in_calls_and_for_the_programs_that_they_start(tmp_path: Path) -> None:
    limits = WorkerLimits(open_files=20, file_mb=0.5)
    with closing(RewardPool(PROBES, num_workers=1, limits=limits, on_error="zero")) as pool:
        for way in ("open_files", "open_files_of_a_child"):
            assert 3 <= call(pool, way, num=40) <= 20
        assert call(pool, "write_bytes", file=str(tmp_path / "new"), num=2**20) == 0.0
        assert (tmp_path / "new").stat().st_size == 2**19
        assert call(pool, "write_bytes", file=str(tmp_path / "small"), num=2**18) == 2**18
    with closing(RewardPool(PROBES, num_workers=1, limits=WorkerLimits(None, None, None))) as pool:
        assert call(pool, "open_files", num=40) == 40
        assert call(pool, "write_bytes", file=str(tmp_path / "new"), num=2**20) == 2**20


def test_limits_that_a_system_does_not_enforce_are_said() -> None:
    limits = WorkerLimits(memory_mb=64, processes=5, open_files=9)
    assert limits.unenforced("linux") == []
    assert limits.unenforced("darwin") == [
        "macOS does not enforce limits.memory_mb=64.",
        "limits.processes=5 is enforced on Linux only.",
    ]
    assert WorkerLimits(None, None).unenforced("darwin") == []


def test_a_config_file_sets_limits_by_name_and_memory_by_its_former_name() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RewardPool, "pool")
    given: dict[str, Any] = {"reward": PLACE, "limits": {"memory_mb": 64, "processes": 3}}
    pool = parser.instantiate(parser.parse_object({"pool": given})).pool
    assert pool._worker.limits == WorkerLimits(memory_mb=64, processes=3)
    former = {"reward": PLACE, "memory_bytes": 2**27, "start_s": 7.0, "max_killed_in_a_row": 4}
    pool = parser.instantiate(parser.parse_object({"pool": former})).pool
    assert pool._worker.limits == WorkerLimits(memory_mb=128)
    assert (pool._worker.start_s, pool.max_killed_in_a_row) == (7.0, 4)


# Killed while loading -----------------------------------------------------------------------------


@pytest.mark.fault("process killed", "reward")
@pytest.mark.parametrize("who", ["os.getpid()", "os.getppid()"], ids=["reward", "keeper"])
@pytest.mark.parametrize("times", [1, 2], ids=["once", "again"])
def test_a_worker_that_is_killed_while_it_loads_is_started_once_more(
    tmp_path: Path, who: str, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As the kernel's OOM killer does it."""
    file = tmp_path / "big.py"
    file.write_text(
        "import os, pathlib, signal, sys, time\n"
        "marks = pathlib.Path(__file__).parent / 'marks'\n"
        "if 'pytest' not in sys.modules:\n"
        "    marks.mkdir(exist_ok=True)\n"
        f"    if len(list(marks.iterdir())) < {times}:\n"
        "        (marks / str(os.getpid())).touch()\n"
        f"        os.kill({who}, signal.SIGKILL)\n"
        "        time.sleep(60)\n"
        "def reward(completion, row): return 1.0\n"
    )
    with closing(RewardPool(f"{file}:reward", num_workers=1)) as pool:
        if times == 1:
            assert call(pool, "any") == 1.0
        else:
            with pytest.raises(RolloutError, match=r"died of SIGKILL while .* no memory left"):
                call(pool, "any")
            assert call(pool, "any") == 1.0, "the next call tries again"
        assert pool.counts == RewardCounts(value=1)
    assert "died of SIGKILL while a worker process loaded it" in caplog.text
