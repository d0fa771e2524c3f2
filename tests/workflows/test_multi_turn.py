"""Rollouts of several turns: what is trained on, what stands between, how they end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.testing import FakeEngine, tiny_tokenizer
from sdp_lightning.training.batch import collate
from sdp_lightning.types import Context, SamplingParams, Segment
from sdp_lightning.workflows.chat_template import encode_turn
from support import conversations
from support.checkpoints import finished, through_a_file
from support.conversations import ROWS, Counts, CountsLater, make, roll, texts
from support.rollouts import DEADLINE_S, CodePoints, rolling, versions, wait_until
from support.trainers import Recorder, make_data, make_module, make_trainer

SAID: list[str] = []


# Turns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [Counts, CountsLater], ids=["plain", "async"])
def test_the_policy_and_the_environment_take_turns_and_rewards_add_up(environment: Any) -> None:
    for trajectory in roll(make(environment)):
        kinds, said = zip(*texts(trajectory), strict=True)
        assert kinds == ("Context", "Segment") * 3
        assert said[0::2] == ("0+0=", "[turn 1]", "[turn 2]")
        assert trajectory.reward == 1 + 2 + 3 and trajectory.finish_reason == "stop"


def test_only_what_was_sampled_is_trained_on_token_for_token() -> None:
    engine = FakeEngine(3)
    [first, second] = roll(make(), engine)
    batch = collate([sdp.TrajectoryGroup((first, second))], version=0)
    for row, trajectory in enumerate((first, second)):
        position, sampled = 0, list[int]()
        for part in trajectory.parts:
            if isinstance(part, Segment):
                places = range(position, position + len(part))
                sampled += places
                assert [p % 7 + 3 for p in places] == part.token_ids.tolist(), "as the engine said"
            position += part.token_ids.size
        # what scores the token at position p stands in column p - 1, or p: see Batch
        mask = batch.loss_mask[row].nonzero()[:, 0].tolist()
        ids = batch.input_ids[row].tolist()
        assert len(mask) == len(sampled) == first.num_sampled
        assert [ids[p] for p in mask] == trajectory.token_ids[sampled].tolist()


class Chat(CodePoints):
    """Chat ends a message with token 0; the engine stops there, the template writes it, too."""

    def apply_chat_template(self, conversation: Any, **settings: Any) -> str:
        said = "".join(f"<{m['role']}>{m['content']}\0\n" for m in conversation)
        return said + ("<assistant>" if settings.get("add_generation_prompt") else "")


class Echo(sdp.Environment):
    """Keeps the conversation as messages; answers as a tool."""

    def reset(self, row: Mapping[str, Any]) -> Any:
        self.messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
        self.num = 0
        SAID.clear()
        return list(self.messages)

    def step(self, completion: str) -> Any:
        self.messages.append({"role": "assistant", "content": completion})
        self.num += 1
        if self.num == 3:
            SAID.append(Chat().apply_chat_template(self.messages))
            return "", 1.0, True
        self.messages.append({"role": "tool", "content": f"{self.num}"})
        return [self.messages[-1]], 0.0, False


@pytest.mark.parametrize("stops", [True, False], ids=["stopped", "cut off"])
def test_the_conversation_rendered_anew_is_the_text_of_the_tokens(stops: bool) -> None:
    """With the template's end of a turn once, whether it was sampled or not."""

    class Engine(FakeEngine):
        async def generate(self, request: Any, sink: Any) -> Any:
            tokens = [ord("a") + request.token_ids.size % 26, *([0] if stops else [])]
            sink(Segment(0, tokens, [-1.0] * len(tokens)))
            return "stop" if stops else "length"

    workflow = make(Echo, group_size=1, turn_format=None)
    from sdp_lightning.rollout.factory import create_workflow_executor

    config = sdp.RolloutConfig(batch_size=1, num_epochs=1, timeout_s=DEADLINE_S)
    engine = Engine()
    executor = create_workflow_executor(
        config=config, engine=engine, workflow=workflow, prompts=ROWS[:1], tokenizer=Chat()
    )
    try:
        executor.publish([], 0, reset=True)
        executor.resume()
        [group] = executor.take() or []
    finally:
        executor.close()
        engine.close()
    [trajectory] = group.trajectories
    found = Chat().decode(trajectory.token_ids.tolist())
    assert [found + ("\n" if stops else "\0\n")] == SAID, "the last turn ends where it was sampled"


def test_a_chat_template_of_transformers_is_taken_apart_between_turns() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = [{"role": "tool", "content": "7"}]
    cut_off = encode_turn(messages, tokenizer, turn_format=None, stopped_by=None)
    assert tokenizer.decode(cut_off) == "<eos>\ntool: 7<eos>\nassistant: "
    settings: dict[str, Any] = {"turn_format": None, "stopped_by": tokenizer.eos_token_id}
    tokens = encode_turn(messages, tokenizer, **settings)
    assert tokenizer.decode(tokens) == "\ntool: 7<eos>\nassistant: "
    said = "user: ?<eos>\nassistant: " + "<eos>" + tokenizer.decode(tokens)
    whole = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}, *messages]
    assert said == tokenizer.apply_chat_template(whole, add_generation_prompt=True, tokenize=False)


def test_a_template_that_hides_earlier_turns_is_refused_with_the_remedy() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ConfigError, match=r"does not show what an assistant said.*turn_format"):
        encode_turn("x", tokenizer, turn_format=None, stopped_by=None)


@pytest.mark.parametrize(
    "observation", [None, 3, [3], {"role": "user"}, [{"role": "user"}]], ids=str
)
def test_an_observation_that_is_neither_text_nor_messages_is_named(observation: Any) -> None:
    with pytest.raises(RolloutError, match="is neither text nor a list of"):
        encode_turn(observation, CodePoints(), turn_format="{observation}", stopped_by=None)


# Budgets ------------------------------------------------------------------------------------------


class Endless(Counts):
    num_turns = 10**9


def test_the_budget_of_turns_truncates() -> None:
    for trajectory in roll(make(Endless, max_turns=2)):
        assert len(trajectory.segments) == 2 and trajectory.finish_reason == "length"
        assert trajectory.reward == 1 + 2
        assert isinstance(trajectory.parts[-1], Segment), "nothing is read after the last turn"


@pytest.mark.parametrize(
    ("total", "turns", "tokens"),
    [
        pytest.param(7, [3], 7, id="no room for the observation"),
        pytest.param(15, [3], 7, id="room for the observation, none to sample"),
        pytest.param(16, [3, 1], 16, id="room for one more token"),
        pytest.param(100, [3] * 8, 7 + 7 * 11, id="room for all"),
    ],
)
def test_the_budget_of_tokens_is_never_passed(total: int, turns: list[int], tokens: int) -> None:
    """Prompt 4, turns 3, observations 8."""
    for trajectory in roll(make(Endless, max_total_tokens=total)):
        assert [len(segment) for segment in trajectory.segments] == turns
        assert trajectory.num_tokens == tokens <= total
        assert trajectory.finish_reason == "length"


def test_a_turn_that_was_cut_off_is_played_all_the_same() -> None:
    for trajectory in roll(make(), FakeEngine(9)):
        assert [len(segment) for segment in trajectory.segments] == [4, 4, 4]
        assert trajectory.finish_reason == "length" and trajectory.reward == 6


def test_a_prompt_without_room_is_named() -> None:
    with (
        rolling(FakeEngine(), make(max_total_tokens=4), rows=ROWS) as executor,
        pytest.raises(RolloutError, match=r"row 'r\d'.*prompt has 4 tokens.*max_total_tokens=4"),
    ):
        executor.take()


# Versions, interruptions, resume ------------------------------------------------------------------


@pytest.mark.parametrize(
    "updates_in_flight", [True, False], ids=["swapped under it", "interrupted"]
)
def test_weights_that_change_within_a_turn_split_its_segment_and_nothing_else(
    updates_in_flight: bool,
) -> None:
    engine = FakeEngine(4, manual=True, updates_in_flight=updates_in_flight)
    settings: dict[str, Any] = {"rows": ROWS[:1], "num_epochs": 1, "batch_size": 1}
    workflow = make(sampling=SamplingParams(max_new_tokens=8))
    with rolling(engine, workflow, **settings) as executor:
        engine.advance(4, awaiting=2)
        for version in (1, 2):
            engine.advance(2, awaiting=2)
            executor.publish([], version)
            engine.advance(2, awaiting=2)
        wait_until(executor, lambda: executor.stat.pending == 1)
        [group] = finished(executor)
    for trajectory in group.trajectories:
        kinds = [type(part) for part in trajectory.parts]
        assert versions(trajectory) == [0, 0, 1, 1, 2]
        assert kinds == [Context, Segment, Context, Segment, Segment, Context, Segment, Segment]
    assert (group.head_version, group.tail_version) == (0, 2)


class Dice(Counts):
    """Never answers the same twice."""

    thrown = 0

    def step(self, completion: str) -> Any:
        Dice.thrown += 1
        _, reward, done = super().step(completion)
        return f"turn {Dice.thrown}", reward, done


SETTINGS: dict[str, Any] = {"batch_size": 1, "max_head_lag": 3, "rows": ROWS[:4], "num_epochs": 1}


@pytest.mark.parametrize("environment", [Counts, Dice], ids=["the same", "by chance"])
def test_a_resume_plays_the_saved_turns_again_and_goes_on_within_the_last(environment: Any) -> None:
    """Unless the environment answers otherwise: then it begins anew, and mixes nothing."""
    engine = FakeEngine(4, manual=True)
    workflow = make(environment, sampling=SamplingParams(max_new_tokens=8))
    with rolling(engine, workflow, **SETTINGS) as executor:
        engine.advance(4, awaiting=8)
        engine.advance(1, awaiting=8)
        executor.publish([], 1)
        state = through_a_file(executor.state_dict())
    repeats = environment is Counts
    engine = FakeEngine(lambda r: 3 if repeats and r.token_ids.size == 4 + 4 + 8 + 1 else 4)
    with rolling(engine, workflow, start=False, **SETTINGS) as executor:
        executor.load_state_dict(state)
        executor.publish([], 1, reset=True)
        executor.resume()
        wait_until(executor, lambda: executor.stat.pending == 4)
        assert executor.telemetry.num_diverged == (0 if repeats else 4)
        for group in finished(executor):
            for trajectory in group.trajectories:
                assert versions(trajectory) == ([0, 0, 1, 1] if repeats else [1, 1, 1])
                assert trajectory.num_sampled == 12 and trajectory.reward == 6
        assert engine.num_generated == 8 * (3 + 4 if repeats else 12)


# Environments that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 0}, "group_size and max_turns must be at least 1, got 0 and 8"),
        ({"max_turns": 0}, "got 2 and 0"),
        ({"max_total_tokens": 1}, "max_total_tokens must be at least 2, got 1"),
        ({"step_timeout_s": 0}, "step_timeout_s must be positive, got 0"),
        ({"turn_format": "\n"}, "turn_format must have {observation} in it"),
        ({"environment": 7}, "environment must be a class or a function that makes one, got 7"),
    ],
    ids=str,
)
def test_settings_are_validated(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**settings)


# Tools --------------------------------------------------------------------------------------------


# Trainer.fit --------------------------------------------------------------------------------------


class Letters(Counts):
    """A reward that differs among samples."""

    def step(self, completion: str) -> Any:
        observation, _, done = super().step(completion)
        return observation, sum(map(ord, completion)) % 97 / 97, done


def test_a_config_names_an_environment() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--workflow", type=sdp.RolloutWorkflow)
    init: dict[str, Any] = {
        "environment": f"{conversations.__file__}:Counts",
        "turn_format": "{observation}\n",
    }
    config = {"class_path": "sdp_lightning.MultiTurnWorkflow", "init_args": init}
    workflow = parser.instantiate(parser.parse_object({"workflow": config})).workflow
    assert workflow.turn_format == "{observation}\n"
    assert [t.reward for t in roll(workflow)] == [6.0] * 8


@pytest.mark.parametrize("engine", ["fake", "embedded"])
def test_fit_trains_on_conversations(engine: str, model_folder: str) -> None:
    workflow = make(Letters, max_turns=2, turn_format="\n{observation}=")
    fake = FakeEngine(lambda request: 1 + request.seed % 4)
    data = make_data(workflow, engine=fake if engine == "fake" else "embedded")
    model, recorder = make_module(model_folder), Recorder()
    make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=3).fit(model, data)
    assert recorder.engine_versions == [0, 1, 2, 3]
    tokenizer = tiny_tokenizer()
    for step in recorder.steps:
        trajectories = [t for group in step.groups for t in group.trajectories]
        assert int(step.batch.loss_mask.sum()) == sum(t.num_sampled for t in trajectories)
        assert step.batch.truncated.all()
        for t in trajectories:
            text = tokenizer.decode(t.token_ids.tolist())
            assert "turn 1=" in text and "turn 2" not in text
    first, last = recorder.weights[0], recorder.weights[3]
    assert any(not torch.equal(first[name], last[name]) for name in first)
