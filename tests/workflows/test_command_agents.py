"""Agents that are a command line: what they are given, what is trained, how they end."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, RolloutError, RowsError
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.agent import process
from sdp_lightning.workflows.agent.workflow import AgentWorkflow
from support import asking_agent
from support.agents import SayingEngine, roll_agent
from support.checkpoints import finished, through_a_file
from support.conversations import ROWS, texts
from support.rollouts import rolling, versions, wait_until

AGENT = [sys.executable, "-I", "-S", asking_agent.__file__]
HOSTILE = """a 'b' "c"; touch here $(touch there) `touch it`\n--flag {id} \\"""


def command(*acts: str, **settings: Any) -> sdp.CommandAgent:
    return sdp.CommandAgent([*AGENT, "{prompt}", *acts], **settings)


def saying() -> SayingEngine:
    return SayingEngine(lambda read: "yes")


def roll(*acts: str, reward: Any = None, folder: Path, **settings: Any) -> Any:
    """The group of one sample, whose agent asks "a" and then acts."""
    given = {name: settings.pop(name) for name in ("statuses", "reward_from") if name in settings}
    agent = command("ask=a", *acts, folder=str(folder), keep=1, **given)
    return roll_agent(agent, saying(), reward=reward, **{"group_size": 1, **settings})


def test_a_command_is_given_row_address_and_key_and_trained_on_what_it_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field is one word, whatever it says; secrets of the trainer stay with it."""
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "MINE"):
        monkeypatch.setenv(name, f"trainers-{name}")
    row = {"id": 7, "prompt": HOSTILE, "answer": "42", "tags": ["x", None], "Zürich": "ß"}
    seen: list[Any] = []

    def reward(row: Any, transcript: Any) -> float:
        assert transcript.process.status == 0 and row["answer"] == "42"
        given = json.loads(transcript.process.output.splitlines()[0])
        assert given["folder"] == str(transcript.process.folder)
        seen.append(given)
        assert sorted(os.listdir(given["folder"])) == ["row.json"]
        return float(transcript.answer == "yes")

    agent = command(
        *("{id}:{tags}", "{{id}} {cwd}", "--z={Zürich}", "ask=a"),
        folder=str(tmp_path / "made"),
        hide=["answer"],
        environment={"MINE": None, "OPENAI_MODEL": "openai/policy"},
    )
    [group] = roll_agent(agent, saying(), reward=reward, row=row)
    assert [t.reward for t in group.trajectories] == [1.0, 1.0]
    assert [t.sample for t in group.trajectories] == [0, 1]
    for trajectory in group.trajectories:
        assert texts(trajectory) == [("Context", "<user>a<assistant>"), ("Segment", "yes\0")]
    for given in seen:
        words = [HOSTILE, '7:["x", null]', f"{{id}} {os.getcwd()}", "--z=ß", "ask=a"]
        assert given["words"] == words and not given["key is seen"]
        assert given["row"] == {name: value for name, value in row.items() if name != "answer"}
        own = given["environment"]
        assert own["OPENAI_BASE_URL"] == own["OPENAI_API_BASE"] == own["ANTHROPIC_BASE_URL"] + "/v1"
        assert own["SDP_MODEL"] == "policy" and own["OPENAI_MODEL"] == "openai/policy"
        assert own["OPENAI_API_KEY"] == "<its key>" == own["ANTHROPIC_API_KEY"]
        trainers = [
            f"trainers-{n}" for n in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY")
        ]
        assert own["MINE"] == "trainers-MINE" and not {*trainers} & {*own.values()}
    assert len({given["folder"] for given in seen}) == 2
    assert os.listdir(tmp_path) == ["made"] and not Path("here").exists()


@pytest.mark.parametrize(
    ("acts", "source", "expected"),
    [
        (["exit=0"], "exit", 1.0),
        (["exit=3"], "exit", 0.0),
        (["write=r.txt:0.25\n"], "r.txt", 0.25),
    ],
    ids=["status 0", "another status", "a number in a file"],
)
def test_a_reward_of_the_exit_status_or_of_a_file(
    acts: list[str], source: str, expected: float, tmp_path: Path
) -> None:
    [group] = roll(*acts, reward_from=source, folder=tmp_path)
    assert [t.reward for t in group.trajectories] == [expected]


def test_a_command_that_fails_over_a_budget_is_cut_off(tmp_path: Path) -> None:
    """Its second request is refused, and it raises; an exit status of 0 would be its own end."""
    settings: dict[str, Any] = {"max_turns": 1, "timeout_reward": -0.5, "reward_from": "exit"}
    [group] = roll("ask=b", folder=tmp_path, **settings)
    [trajectory] = group.trajectories
    assert (trajectory.reward, trajectory.finish_reason) == (-0.5, "length")


def test_rewards_by_name_of_a_file_and_an_exit_status_that_a_reward_judges(tmp_path: Path) -> None:
    weights = {"right": 1.0, "short": 2.0}
    written = 'write=r.json:{{"right": 1, "short": 0.5}}'
    [group] = roll(written, reward_from="r.json", folder=tmp_path, reward_weights=weights)
    assert group.trajectories[0].rewards == {"right": 1.0, "short": 0.5}

    def judge(row: Any, transcript: Any) -> float:
        return float(transcript.process.status)

    [group] = roll("exit=3", reward=judge, statuses=[0, 3], folder=tmp_path)
    assert group.trajectories[0].reward == 3.0


def fine(row: Any, transcript: Any) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("acts", "settings", "text"),
    [
        (["say=x", "exit=3"], {"reward": fine}, r"exit status was 3\. The end of .*output\.log:\n"),
        ([], {"reward_from": "r.json"}, r"left no reward in 'r\.json' \(reward_from\): .*No such"),
        (["write=r.json:[1"], {"reward_from": "r.json"}, "left no reward in 'r.json'"),
        (["fifo=r.json"], {"reward_from": "r.json"}, "left no reward in 'r.json'.*it is no file"),
        (["write=r.json:[1]"], {"reward_from": "r.json"}, "must be a number"),
    ],
    ids=["exit status", "no file", "half a file", "a fifo", "no number"],
)
def test_a_command_that_fails_is_as_a_function_that_raises(
    acts: list[str], settings: Any, text: str, tmp_path: Path
) -> None:
    with pytest.raises(RolloutError, match=text):
        roll(*acts, **settings, folder=tmp_path)
    if "must be" not in text:
        [group] = roll(*acts, **settings, folder=tmp_path, error_reward=-1.0)
        assert [t.reward for t in group.trajectories] == [-1.0]


def test_a_command_that_never_asks_is_an_error_with_its_output(tmp_path: Path) -> None:
    agent = command("say=quiet ", folder=str(tmp_path), reward_from="exit", output_bytes=2000)
    match = r"without an answer of the policy: .*OPENAI_BASE_URL(.|\n)*status was 0(.|\n)*quiet"
    with pytest.raises(RolloutError, match=match):
        roll_agent(agent, group_size=1)
    [log] = tmp_path.glob("*/output.log")
    kept = log.read_bytes()
    assert kept.startswith(b'{"words"') and kept.endswith(b"quiet quiet \n") and len(kept) < 2100
    assert b" bytes left out ..." in kept


@pytest.mark.parametrize(
    ("how", "name"),
    [("die=SIGSEGV", "SIGSEGV"), ("exit=137", "SIGKILL"), ("exit=168", "signal 40")],
)
@pytest.mark.fault("process killed", "generate")
def test_a_command_that_dies_of_a_signal_is_left_out(
    how: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A shell and docker report a signal as 128 and its number."""
    workflow = AgentWorkflow(command("ask=a", how, folder=str(tmp_path)), reward=fine, group_size=2)
    with rolling(saying(), workflow, rows=ROWS[:1], batch_size=1, num_epochs=1) as executor:
        assert executor.take() is None
        [cause] = executor.telemetry.errors
    assert cause.startswith("an agent died of ") and cause.endswith(name)
    assert caplog.text.count("answered: yes") == 1, "the output is shown of the first only"


def test_no_more_processes_than_may_run_at_once(tmp_path: Path) -> None:
    agent = command(f"alone={tmp_path}/lock", folder=str(tmp_path), max_processes=1, keep=2)
    [group] = roll_agent(agent, saying(), reward=fine, group_size=5)
    assert len(group.trajectories) == 5
    assert len([*tmp_path.glob("sample-*")]) == 2, "older folders are kept"


def test_a_wait_for_a_place_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_SLACK_S", 0.0)

    async def wait() -> None:
        places = process.Places(1)
        await places.take(1.0)
        await places.take(0.0)

    with pytest.raises(RolloutError, match=r"one of 1 processes \(max_processes\)"):
        asyncio.run(wait())


def test_a_resume_runs_the_command_again_with_the_answers_that_it_had(tmp_path: Path) -> None:
    agent = command("ask=a", "ask=b", folder=str(tmp_path))
    params = SamplingParams(max_new_tokens=4)
    workflow = AgentWorkflow(agent, reward=fine, group_size=1, sampling=params)
    workflow = pickle.loads(pickle.dumps(workflow))
    settings: dict[str, Any] = {"rows": ROWS[:1], "num_epochs": 1, "batch_size": 1}
    settings |= {"max_head_lag": 3}
    engine = FakeEngine(4, manual=True)
    with rolling(engine, workflow, **settings) as executor:
        engine.advance(4, awaiting=1)
        engine.advance(1, awaiting=1)
        executor.publish([], 1)
        state = through_a_file(executor.state_dict())
    engine = FakeEngine(lambda request: request.params.max_new_tokens)
    with rolling(engine, workflow, start=False, **settings) as executor:
        executor.load_state_dict(state)
        executor.publish([], 1, reset=True)
        executor.resume()
        wait_until(executor, lambda: executor.stat.pending == 1)
        assert executor.telemetry.num_diverged == 0
        [group] = finished(executor)
    assert sorted(versions(t) for t in group.trajectories) == [[0], [0, 1]]
    assert engine.num_generated == 3


@pytest.mark.parametrize(
    ("agent", "text"),
    [
        ({"command": "nowhere-to-be-found {prompt}"}, "'nowhere-to-be-found' is not there"),
        ({"command": "cat {prompt} | tee log"}, r"has '\|', and is run without a shell"),
        ({"command": "cat 'a"}, "cannot be split"),
        ({"command": ["cat", "{prompt"]}, r"cannot be read.*\{\{ or \}\}"),
        ({"command": ["cat", "{}"]}, "no name"),
        ({"command": ["cat", "{a!r}"]}, "no name"),
        ({"command": []}, "must be a program and its words"),
        ({"command": ["cat", 3]}, r"texts; got \['cat', 3\]"),
        ({"command": "cat", "statuses": [0, 137]}, r"statuses must be in \[0, 128\], got 137"),
        ({"command": "cat", "environment": {"A": 1}}, "environment must have texts by name"),
        ({"command": ["bash", "-lc", "echo {prompt}"]}, "fields of a row in code"),
        ({"command": ["env", "sh", "-c", "{prompt}"]}, "fields of a row in code"),
        ({"command": ["cat", "{prompt}"], "hide": ["prompt"]}, "hide has 'prompt'"),
        ({"command": "cat", "max_processes": 0}, "max_processes must be at least 1"),
        ({"command": "cat", "grace_s": 6}, "grace_s must be in"),
        ({"command": "cat", "reward_from": "/tmp/r"}, "reward_from must be"),
        ({"command": "cat", "hide": "answer"}, "hide must be a list"),
        ({"command": "cat", "reward_from": "exit", "statuses": [1]}, "statuses have no effect"),
        ({"command": "cat", "environment": {"NOT_SET_HERE": None}}, "passes on NOT_SET_HERE"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_command_that_cannot_be_run_is_refused_at_the_start(agent: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        AgentWorkflow(sdp.CommandAgent(**agent), reward=fine)


def test_a_command_has_one_reward(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing says what a sample"):
        AgentWorkflow(["cat", "{prompt}"])
    with pytest.raises(ConfigError, match="both given"):
        AgentWorkflow(command(reward_from="exit"), reward=fine)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"question": "x"}, r"row 1: it has no 'prompt'.*it has \['question'\]"),
        ({"prompt": "x", "cwd": "y"}, "it has a 'cwd'.*another name"),
        ({"prompt": None}, "row 1: its 'prompt' is None"),
        ({"prompt": "a\0b"}, "has a NUL"),
        ({"prompt": "a\ud800"}, "half a character"),
        ({"prompt": "x" * 200_000}, r"200000 bytes.*\$SDP_ROW"),
        ({"prompt": "x", "image": object()}, r"'image', a object, .*hide=\['image'\]"),
    ],
    ids=["no field", "a folder of the row", "None", "NUL", "surrogate", "long", "no JSON"],
)
def test_rows_that_no_command_can_be_given_are_named_before_the_run(row: Any, text: str) -> None:
    workflow = AgentWorkflow(command("{cwd}"), reward=fine)
    with pytest.raises(RowsError, match=text) as caught:
        workflow.check_rows([(0, ROWS[0]), (1, row)])
    assert list(caught.value.faults) == [1]


@pytest.mark.parametrize(
    "agent",
    [
        ["cat", "{prompt}"],
        {"command": "cat {prompt}"},
        {"class_path": "sdp_lightning.CommandAgent", "init_args": {"command": "cat {prompt}"}},
    ],
    ids=["words", "settings", "class path"],
)
def test_a_config_names_a_command(agent: Any) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--workflow", type=sdp.RolloutWorkflow)
    init: dict[str, Any] = {"agent": agent, "reward": f"{__file__}:fine"}
    config = {"class_path": "sdp_lightning.AgentWorkflow", "init_args": init}
    workflow = parser.instantiate(parser.parse_object({"workflow": config})).workflow
    assert isinstance(workflow, AgentWorkflow)
    workflow.check_rows([(0, ROWS[0])])
    with pytest.raises(RowsError, match="no 'prompt'"):
        workflow.check_rows([(0, {})])
