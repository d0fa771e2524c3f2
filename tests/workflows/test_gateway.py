"""The gateway: keys, budgets, wrong bodies, failures, publishes within answers, resumes."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import traceback
from typing import Any

import aiohttp
import openai
import pytest
from jsonargparse import ArgumentParser

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, EngineError, RolloutError
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.agent import gateway
from sdp_lightning.workflows.agent.workflow import AgentWorkflow
from support.agents import SayingEngine, chat, post, roll_agent
from support.checkpoints import finished, through_a_file
from support.conversations import ROWS
from support.listening import listening
from support.rollouts import DEADLINE_S, rolling, versions, wait_until

NOT_TEXT = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
WRONG: list[tuple[Any, str]] = [
    (b"{", "no JSON"),
    (b"[" * 100_000, "no JSON"),
    (b"[]", "must be a JSON object"),
    ({"messages": []}, "messages must be a list"),
    ({"messages": "hi"}, "messages must be a list"),
    ({"messages": [{"content": "hi"}]}, "needs a role"),
    ({"messages": NOT_TEXT}, "'image_url'"),
    (chat("a", n=2), "n must be 1"),
    (chat("a", max_tokens=0), "max_tokens must be"),
    (chat("a", max_tokens=True), "max_tokens must be"),
    (chat("a", stop=[1]), "stop must be"),
    (chat("a", stop="\ufffd"), "stop text"),
    (chat("a", stop="\ud800"), "stop must be"),
    (chat("a", stream="yes"), "stream must be"),
    (chat("a", logprobs=True), "logprobs is not supported"),
    (chat("a", tools=[{"name": "f"}]), "a tool must be"),
    (chat("a", response_format={"type": "json_object"}), "response_format"),
]


def fresh() -> SayingEngine:
    return SayingEngine(lambda read: "yes")


def test_what_makes_no_request_is_an_error_of_the_api_and_what_was_sampled_stays() -> None:
    async def agent(row: Any, endpoint: Any) -> float:
        for body, text in WRONG:
            status, answer = await post(endpoint, body)
            assert status == 400 and text in answer["error"]["message"], (body, answer)
        for body in ({"token_ids": [-1]}, {"token_ids": []}, {"token_ids": ["a"]}):
            assert (await post(endpoint, body, "/inference/v1/generate"))[0] == 400
        assert (await post(endpoint, chat("a"), content_encoding="gzip"))[0] == 400
        status, answer = await post(endpoint, chat("a"), "/v1/messages")
        assert status == 400 and answer["type"] == "error" and "max_tokens" in str(answer)
        status, answer = await post(endpoint, {}, "/v1/embeddings")
        assert status == 404 and "POST /v1/chat/completions" in answer["error"]["message"]
        return float((await post(endpoint, chat("a")))[0] == 200)

    [group] = roll_agent(agent, fresh(), group_size=1)
    [trajectory] = group.trajectories
    assert trajectory.reward == 1.0 and trajectory.num_sampled == 4


def test_a_key_opens_its_own_sample_until_it_ends_and_is_in_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[Any] = []

    async def status_of(endpoint: Any, times: int = 1) -> int:
        headers = {"x-api-key": endpoint.api_key * times}
        async with (
            aiohttp.ClientSession() as client,
            client.get(f"{endpoint.base_url}/models", headers=headers) as answer,
        ):
            return answer.status

    async def agent(row: Any, endpoint: Any) -> float:
        is_first = not seen
        seen.append(endpoint)
        _, mine = await post(endpoint, chat("a"))
        if is_first:
            while len(seen) < 2:
                await asyncio.sleep(0)
            return 1.0
        again = await post(endpoint, chat("a"), x_stainless_retry_count="1")
        assert again[1]["id"] == mine["id"], "the answer of its own first request"
        assert await status_of(endpoint, 400) == 400, "a header too long for HTTP"
        while await status_of(seen[0]) != 403:
            await asyncio.sleep(0)
        status, answer = await post(seen[0], chat("a"))
        assert status == 403 and answer["error"]["code"] == "session_ended"
        for key in ("", "sk-no", endpoint.api_key[:-1], "\N{SNOWMAN}".encode().decode("latin-1")):
            status, answer = await post(endpoint, chat("a"), key=key)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
            status, answer = await post(endpoint, chat("a"), "/v1/messages", key=key)
            assert status == 401 and answer["error"]["type"] == "authentication_error"
        return 1.0

    [group] = roll_agent(agent, fresh())
    assert [len(t.segments) for t in group.trajectories] == [1, 1]
    keys = [endpoint.api_key for endpoint in seen]
    assert not any(key in record.getMessage() for key in keys for record in caplog.records)
    assert not any(key in repr(endpoint) for key, endpoint in zip(keys, seen, strict=True))
    assert seen[0].base_url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("budget", ["max_turns", "max_total_tokens"])
def test_a_sample_that_uses_up_a_budget_is_cut_off_and_its_agent_is_told(budget: str) -> None:
    limits: dict[str, Any] = {"max_turns": 2} if budget == "max_turns" else {}
    if budget == "max_total_tokens":
        limits = {"max_total_tokens": 40}

    async def agent(row: Any, endpoint: Any) -> float:
        where = {"base_url": endpoint.base_url, "api_key": endpoint.api_key}
        async with openai.AsyncOpenAI(**where) as client:  # which would try again
            said: list[Any] = []
            while True:
                said.append({"role": "user", "content": "go"})
                answer = await client.chat.completions.create(model="policy", messages=said)
                said.append(answer.choices[0].message)

    def reward(row: Any, transcript: Any) -> float:
        assert transcript.ended_by == budget and transcript.returned is None
        return float(len(transcript.conversations))

    [group] = roll_agent(agent, fresh(), group_size=1, reward=reward, **limits)
    [trajectory] = group.trajectories
    assert trajectory.reward == len(trajectory.segments) and trajectory.finish_reason == "length"
    assert trajectory.num_tokens <= 40 or budget == "max_turns"


def test_an_agent_that_takes_too_long_is_cut_off_and_one_that_never_asked_is_left_out() -> None:
    async def slow(row: Any, endpoint: Any) -> None:
        await post(endpoint, chat("a"))
        await asyncio.Event().wait()

    [group] = roll_agent(slow, fresh(), timeout_s=0.5, timeout_reward=-1.0)
    assert [(t.reward, t.finish_reason) for t in group.trajectories] == [(-1.0, "length")] * 2

    async def never(row: Any, endpoint: Any) -> None:
        await asyncio.Event().wait()

    assert roll_agent(never, fresh(), timeout_s=0.01) == []


def test_an_agent_that_raises_fails_its_group_unless_that_has_a_reward() -> None:
    async def agent(row: Any, endpoint: Any) -> float:
        await post(endpoint, chat("a"))
        raise KeyError("answer")

    with pytest.raises(RolloutError, match=r"agent 'agent' failed: KeyError\('answer'\)"):
        roll_agent(agent, fresh())
    [group] = roll_agent(agent, fresh(), error_reward=-2.0)
    assert [t.reward for t in group.trajectories] == [-2.0] * 2

    async def tells(row: Any, endpoint: Any) -> float:
        raise RuntimeError(f"headers: {endpoint.api_key}")

    with pytest.raises(RolloutError, match=r"RuntimeError\('headers: <its key>'\)") as caught:
        roll_agent(tells, fresh())
    assert "sk-sdp-" not in "".join(traceback.format_exception(caught.value))

    async def silent(row: Any, endpoint: Any) -> None:
        await post(endpoint, chat("a"))

    with pytest.raises(RolloutError, match="returned no reward"):
        roll_agent(silent, fresh())


def test_a_failure_of_the_engine_is_the_runs_and_ends_the_agent() -> None:
    class Broken(FakeEngine):
        async def generate(self, request: Any, sink: Any) -> Any:
            raise EngineError("the server is gone")

    async def agent(row: Any, endpoint: Any) -> float:
        await post(endpoint, chat("a"))
        return await asyncio.Event().wait() or 0.0

    with pytest.raises(RolloutError, match="the server is gone"):
        roll_agent(agent, Broken())


def test_a_run_that_ends_while_agents_wait_leaves_nothing_open() -> None:
    """What is left open is a warning, and warnings are errors here."""
    endpoints: list[Any] = []

    async def agent(row: Any, endpoint: Any) -> None:
        endpoints.append(endpoint)
        await post(endpoint, chat("a"))

    engine = FakeEngine(4, manual=True)
    before = listening()
    workflow = AgentWorkflow(agent, group_size=2)
    with rolling(engine, workflow, rows=ROWS[:1], batch_size=1, num_epochs=1):
        engine.wait_for_requests(2)
        [(address, port)] = listening() - before
        assert address == "127.0.0.1" and f":{port}/v1" in endpoints[0].base_url
    gc.collect()
    assert listening() == before


def test_settings_of_a_client_are_refused_where_that_is_asked_for() -> None:
    async def agent(row: Any, endpoint: Any) -> float:
        status, answer = await post(endpoint, chat("a", temperature=0.2, seed=1))
        assert status == 400 and "temperature=0.2, seed=1" in answer["error"]["message"]
        return float((await post(endpoint, chat("a", temperature=1, top_p=1.0)))[0])

    [group] = roll_agent(agent, fresh(), client_sampling="refuse", group_size=1)
    assert group.trajectories[0].reward == 200


def test_a_body_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "MAX_BODY", 2000)

    async def agent(row: Any, endpoint: Any) -> float:
        await post(endpoint, chat("a"))
        return float((await post(endpoint, chat("a" * 3000)))[0])

    [group] = roll_agent(agent, fresh(), group_size=1)
    assert group.trajectories[0].reward == 413


def test_a_publish_within_a_streamed_answer_is_seen_in_its_versions_and_by_no_agent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gateway, "KEEP_ALIVE_S", 0.01)
    streamed: list[str] = []

    async def agent(row: Any, endpoint: Any) -> float:
        body = chat("a", stream=True)
        headers = {"Authorization": f"Bearer {endpoint.api_key}"}
        async with (
            aiohttp.ClientSession() as client,
            client.post(f"{endpoint.base_url}/chat/completions", json=body, headers=headers) as got,
        ):
            async for line in got.content:
                streamed.append(line.decode())
                if line.startswith(b": keep-alive"):
                    alive.set()
        return 1.0

    engine, alive = FakeEngine(6, manual=True, updates_in_flight=False), threading.Event()
    params = SamplingParams(max_new_tokens=6)
    workflow = AgentWorkflow(agent, group_size=1, sampling=params)
    settings: dict[str, Any] = {"rows": ROWS[:1], "num_epochs": 1, "batch_size": 1}
    with rolling(engine, workflow, max_head_lag=4, **settings) as executor:
        assert alive.wait(DEADLINE_S), "no comment kept the stream alive"
        for version in (1, 2):
            engine.advance(2, awaiting=1)
            executor.publish([], version)
        engine.advance(2, awaiting=1)
        [group] = executor.take() or []
    [trajectory] = group.trajectories
    assert versions(trajectory) == [0, 1, 2] and trajectory.num_sampled == 6
    data = [line for line in streamed if line.startswith("data: ")]
    assert data[-1] == "data: [DONE]\n" and not any("error" in line for line in data)


@pytest.mark.parametrize("repeats", [True, False], ids=["the same", "another question"])
def test_a_resume_runs_the_agent_again_and_gives_it_the_answers_that_it_had(repeats: bool) -> None:
    """Two turns and a branch, cut off within the second turn and the branch."""
    times: list[int] = []

    async def agent(row: Any, endpoint: Any) -> float:
        times.append(1)
        _, first = await post(endpoint, chat("a"))
        said = first["choices"][0]["message"]["content"]
        question = "b" if repeats or len(times) == 1 else "c"
        await asyncio.gather(
            post(endpoint, chat("a", said, question)), post(endpoint, chat("sub-agent"))
        )
        return 1.0

    settings: dict[str, Any] = {"rows": ROWS[:1], "num_epochs": 1, "batch_size": 1}
    settings |= {"max_head_lag": 3}
    engine = FakeEngine(4, manual=True)
    workflow = AgentWorkflow(agent, group_size=1, sampling=SamplingParams(max_new_tokens=4))
    with rolling(engine, workflow, **settings) as executor:
        engine.advance(4, awaiting=1)
        engine.advance(1, awaiting=2)
        executor.publish([], 1)
        state = through_a_file(executor.state_dict())
    engine = FakeEngine(lambda request: request.params.max_new_tokens)
    with rolling(engine, workflow, start=False, **settings) as executor:
        executor.load_state_dict(state)
        executor.publish([], 1, reset=True)
        executor.resume()
        wait_until(executor, lambda: executor.stat.pending == 1)
        assert executor.telemetry.num_diverged == 0 and len(times) == 2
        [group] = finished(executor)
    first, branch = group.trajectories
    assert versions(first) == ([0, 0, 1] if repeats else [0, 1])
    assert versions(branch) == [0, 1] and branch.num_sampled == 4 and first.num_sampled == 8
    assert engine.num_generated == (3 + 3 if repeats else 4 + 3)
    assert workflow.counts["agent_diverged"] == (not repeats)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"agent": 3}, "agent must be a function"),
        ({"port": 65536}, "port must be in"),
        ({"side_request": 3}, "side_request must be a function"),
        ({"reward": 3}, "reward must be a function"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"max_turns": 0}, "max_turns must be at least 1"),
        ({"max_total_tokens": 1}, "max_total_tokens must be at least 2"),
        ({"timeout_s": 0.0}, "timeout_s must be positive"),
        ({"client_sampling": "keep"}, "client_sampling must be"),
        ({"tool_call_format": "xml"}, "tool_call_format must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Any, text: str) -> None:
    given = {"agent": test_settings_out_of_range_are_refused, **settings}
    with pytest.raises(ConfigError, match=text):
        AgentWorkflow(**given)


def silent(row: Any, endpoint: Any) -> float:
    return 1.0


def test_a_config_names_agent_and_predicate_by_their_import_paths() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--workflow", type=sdp.RolloutWorkflow)
    init: dict[str, Any] = {"agent": f"{__file__}:silent", "side_request": f"{__file__}:fresh"}
    init |= {"group_size": 2, "timeout_s": 5, "stop": ["x"], "error_reward": 0.0, "port": 0}
    config = {"class_path": "sdp_lightning.AgentWorkflow", "init_args": init}
    workflow = parser.instantiate(parser.parse_object({"workflow": config})).workflow
    assert isinstance(workflow, AgentWorkflow) and workflow.stop == ("x",)
    assert dict(workflow.given_settings)["side_request"] == f"{__file__}:fresh"


def test_an_address_that_cannot_be_had_is_one_named_error() -> None:
    async def agent(row: Any, endpoint: Any) -> float:
        return 1.0

    with pytest.raises(RolloutError, match=r"cannot be served at 203\.0\.113\.7:0"):
        roll_agent(agent, fresh(), host="203.0.113.7")
