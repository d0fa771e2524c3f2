"""A fit of an agent: every trained token was sampled, by the version that it is stamped with."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import openai
import pytest
from lightning.pytorch.callbacks import Callback

import sdp_lightning as sdp
from sdp_lightning.config.model_source import quiet_transformers
from sdp_lightning.testing import tiny_model, tiny_tokenizer
from support.listening import listening
from support.network_page import check, places
from support.trainers import Judge, Recorder, executor_of, make_data, make_module, make_trainer
from support.waiting import wait_for

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LONG = 150  # tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, tokenizer = tmp_path_factory.mktemp("chat"), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with quiet_transformers():
        tiny_model().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


class PublishWithin(Callback):
    """Each publish happens while an agent's answer is sampled, if one is.

    The engine is paused in the midst of the answer, and goes on after the publish.
    """

    def __init__(self) -> None:
        self.num_held = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.listening = listening()
        executor = executor_of(trainer)
        before = executor.engine.num_generated
        if executor.gate.num_outstanding:
            wait_for(
                lambda: (
                    executor.engine.num_generated > before + 2 or not executor.gate.num_outstanding
                )
            )
            executor.engine.pause()
            self.num_held += 1


async def agent(row: Any, endpoint: Any) -> float:
    """Two turns, streamed; a sub-agent whose history is another; a side question."""
    said: list[str] = []
    where = {"base_url": endpoint.base_url, "api_key": endpoint.api_key}
    async with openai.AsyncOpenAI(**where, max_retries=0) as client:

        async def ask(messages: Any, **more: Any) -> str:
            stream = await client.chat.completions.create(
                model=endpoint.model, messages=messages, stream=True, temperature=0.1, **more
            )
            chunks = [chunk.choices[0].delta.content or "" async for chunk in stream]
            said.append("".join(chunks))
            return said[-1]

        messages = [{"role": "user", "content": row["prompt"]}]
        for turn in range(2):
            answer = await ask(messages, max_tokens=LONG if turn else 5)
            messages += [
                {"role": "assistant", "content": answer},
                {"role": "user", "content": f"turn {turn}"},
            ]
        await ask([{"role": "user", "content": "sub"}, *messages[1:]], max_tokens=4)
        await ask([{"role": "user", "content": "title"}])
    return len(said[0]) % 3 + row["prompt"].count("1")


def is_side(body: Any) -> bool:
    return body["messages"][-1]["content"] == "title"


def test_an_agents_answers_are_trained_as_they_were_sampled_over_publishes(folder: str) -> None:
    workflow = sdp.AgentWorkflow(
        agent,
        group_size=2,
        sampling=sdp.SamplingParams(max_new_tokens=LONG, stop_at_model_eos=False),
        side_request=is_side,
    )
    recorder, within, before = Recorder(), PublishWithin(), listening()
    data = make_data(workflow, batch_size=1, max_head_lag=4, on_overdue="wait")
    trainer = make_trainer(sdp.WeightSyncCallback(), within, recorder, max_steps=5)
    trainer.fit(make_module(folder), data)

    named = places("AgentWorkflow", "every rank", "from the first agent on")
    check(within.listening - before, named)
    assert listening() == before, "nothing listens once the fit has ended"
    groups = [group for step in recorder.steps for group in step.groups]
    assert len(groups) == 5 and within.num_held
    judge, mixed = Judge(folder), 0
    for group in groups:
        assert [t.sample for t in group.trajectories] == [0, 0, 1, 1]
        first, branch = group.trajectories[:2]
        assert first.reward == branch.reward
        assert sum(isinstance(p, sdp.Context) for p in first.parts) == 2  # two turns, no more
        for trajectory in group.trajectories:
            mixed += len({s.version for s in trajectory.segments}) > 1
            for number, segment in enumerate(trajectory.segments):
                weights = recorder.weights[segment.version]
                own = judge.segment_logprobs(weights, trajectory)[number]
                assert np.abs(own.numpy() - segment.logprobs).max() < 1e-4
    assert mixed, "no answer was sampled over a publish"
    for step in recorder.steps:
        batch = step.batch
        trained = batch.input_ids[batch.loss_mask].tolist()
        kept = [s.token_ids.tolist() for g in step.groups for s in g.segments]
        assert trained == [token for tokens in kept for token in tokens]
        assert batch.sample_ids is not None and batch.sample_ids.tolist() == [0, 0, 1, 1]
    counts = workflow.counts
    assert counts["agent_overridden"] >= counts["agent_turns"] > 0 == counts["agent_refused"]
