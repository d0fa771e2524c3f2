"""A fit ends completions where the model's folder says, and never samples a token without text."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from transformers import GenerationConfig

import sdp_lightning as sdp
from sdp_lightning.config.model_source import quiet_transformers
from sdp_lightning.errors import RolloutError
from sdp_lightning.testing import FakeEngine, tiny_model, tiny_tokenizer
from sdp_lightning.training.batch import collate
from sdp_lightning.training.policy.forward import sequence_logprobs
from support.trainers import Recorder, make_data, make_module, make_trainer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<end_of_turn>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
CHAT = [{"id": str(n), "prompt": [{"role": "user", "content": "hi"}]} for n in range(4)]
NUM_TOKENS = 51


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with two ends, and with a head that has three times the tokens that have a text."""
    folder = tmp_path_factory.mktemp("two-ends")
    tokenizer, model = tiny_tokenizer(), tiny_model(vocab_size=3 * NUM_TOKENS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    assert len(tokenizer) == NUM_TOKENS
    tokenizer.chat_template = TEMPLATE
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    model.generation_config = GenerationConfig(eos_token_id=[1, end], pad_token_id=0)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def completions(folder: str, workflow: sdp.RolloutWorkflow, **settings: Any) -> Recorder:
    recorder = Recorder()
    trainer = make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=1)
    data = make_data(workflow, rows=CHAT, batch_size=4, max_head_lag=0)
    trainer.fit(make_module(folder, **settings), data)
    return recorder


def sampled(recorder: Recorder) -> list[list[int]]:
    groups = [group for step in recorder.steps for group in step.groups]
    return [s.token_ids.tolist() for g in groups for t in g.trajectories for s in t.segments]


def workflow(**sampling: Any) -> sdp.RLVRWorkflow:
    params = sdp.SamplingParams(max_new_tokens=60, **sampling)
    return sdp.RLVRWorkflow(lambda text, row: float(len(text)), group_size=8, sampling=params)


@pytest.fixture(scope="module")
def played(folder: str) -> tuple[Recorder, list[str]]:
    """A fit of one step, and what it logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("sdp_lightning")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        return completions(folder, workflow()), lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_every_end_of_the_folder_ends_a_turn_and_is_logged_once(
    played: tuple[Recorder, list[str]],
) -> None:
    """Input r01."""
    found, end = sampled(played[0]), NUM_TOKENS - 1
    assert len(found) == 32 and any(end in tokens for tokens in found)
    for tokens in found:
        assert not {1, end} & set(tokens[:-1])
        assert len(tokens) == 60 or tokens[-1] in (1, end)
    assert [line for line in played[1] if line.startswith("Completions end")] == [
        "Completions end at the tokenizer's end of text (1 <eos>), and at the model's "
        "(1 <eos>, 50 <end_of_turn>, in generation_config.json)."
    ]


def test_those_of_the_folder_can_be_left_out(
    folder: str, played: tuple[Recorder, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """That no turn ends where the chat template ends it is said then."""
    with caplog.at_level(logging.WARNING):
        found = sampled(completions(folder, workflow(stop_at_model_eos=False)))
    ends = "the chat template ends a turn with <end_of_turn>, and no completion ends there"
    assert caplog.text.count(ends) == 1 and not any(ends in line for line in played[1])
    assert any(NUM_TOKENS - 1 in tokens[:-1] for tokens in found)
    assert not any(1 in tokens[:-1] for tokens in found)


def test_tokens_without_a_text_are_never_sampled_and_log_probs_are_of_the_others(
    played: tuple[Recorder, list[str]],
) -> None:
    recorder, _ = played
    assert max(max(tokens) for tokens in sampled(recorder)) < NUM_TOKENS
    (metrics,) = recorder.metrics
    assert metrics["drift/abs_log_mean"] < 1e-5, "the trainer scores what was sampled from"
    assert metrics["publish/echo"] < 1e-5


def test_a_token_without_a_text_is_refused_wherever_it_comes_from(folder: str) -> None:
    group = sdp.TrajectoryGroup(
        (sdp.Trajectory((sdp.Context([3]), sdp.Segment(0, [4, NUM_TOKENS], [-1.0, -1.0]))),)
    )
    model, batch = tiny_model(vocab_size=3 * NUM_TOKENS), collate([group], version=0)
    with pytest.raises(RolloutError, match="token 51 was sampled, and the tokenizer has no text"):
        sequence_logprobs(model, batch, num_tokens=NUM_TOKENS)
    assert sequence_logprobs(model, batch).logprobs.isfinite().all()


def test_an_engine_that_samples_one_fails_its_group() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.get_vocab = lambda: {"a": 0, "b": 6}  # type: ignore[method-assign]
    engine = FakeEngine(reply=8)  # its tokens are 3 to 9
    executor = sdp.create_workflow_executor(
        config=sdp.RolloutConfig(batch_size=1, max_head_lag=0),
        engine=engine,
        workflow=workflow(),
        prompts=[{"prompt": "1"}],
        tokenizer=tokenizer,
    )
    engine.start()
    try:
        executor.publish([], 0, reset=True)
        executor.resume()
        with pytest.raises(RolloutError, match="sampled token 9, and the tokenizer has no text"):
            executor.take(timeout_s=30)
    finally:
        executor.close()
        engine.close()
