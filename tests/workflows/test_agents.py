"""Agents with the clients of OpenAI and Anthropic: what they are answered, and what is trained."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import openai
import pytest

from sdp_lightning.errors import RolloutError
from sdp_lightning.types import Segment, Trajectory
from sdp_lightning.workflows.agent import session
from support.agents import SayingEngine, chat, post, roll_agent
from support.conversations import texts

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL: Any = {"name": "add", "description": "adds", "parameters": PARAMETERS}


def says(read: str) -> str:
    """Calls a tool first, then answers."""
    return "It is 2." if "<tool>" in read else f"Wait. {CALL}"


def openais(endpoint: Any) -> openai.AsyncOpenAI:
    where = {"base_url": endpoint.base_url, "api_key": endpoint.api_key}
    return openai.AsyncOpenAI(**where, max_retries=0)


def segments(trajectory: Trajectory) -> list[str]:
    return [said for kind, said in texts(trajectory) if kind == "Segment"]


async def with_openai(row: Any, endpoint: Any) -> float:
    """A loop with a tool, as its documentation writes it."""
    messages: list[Any] = [{"role": "user", "content": row["prompt"]}]
    tools: Any = [{"type": "function", "function": TOOL}]
    async with openais(endpoint) as client:
        while True:
            answer = await client.chat.completions.create(
                model=endpoint.model, messages=messages, tools=tools
            )
            message = answer.choices[0].message
            messages.append(message)
            if not message.tool_calls:
                assert answer.choices[0].finish_reason == "stop" and answer.usage is not None
                assert answer.usage.completion_tokens == len("It is 2.") + 1
                return float(message.content == "It is 2.")
            assert message.content == "Wait." and answer.choices[0].finish_reason == "tool_calls"
            for call in message.tool_calls:
                assert call.type == "function" and call.function.name == "add"
                result = str(1 + json.loads(call.function.arguments)["a"])
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


async def with_openai_streamed(row: Any, endpoint: Any) -> float:
    messages: list[Any] = [{"role": "user", "content": row["prompt"]}]
    tools: Any = [{"type": "function", "function": TOOL}]
    async with openais(endpoint) as client:
        while True:
            said: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
            usage: Any = None
            stream = await client.chat.completions.create(
                model=endpoint.model,
                messages=messages,
                tools=tools,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    said["content"] += choice.delta.content or ""
                    said["tool_calls"] += [
                        each.model_dump(exclude={"index"}) for each in choice.delta.tool_calls or ()
                    ]
            assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
            if not said["tool_calls"]:
                return float(said["content"] == "It is 2.")
            messages.append(said)
            [call] = said["tool_calls"]
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": "2"})


async def with_anthropic(row: Any, endpoint: Any, *, streamed: bool = False) -> float:
    messages: list[Any] = [{"role": "user", "content": row["prompt"]}]
    tool: Any = {"name": "add", "description": "adds", "input_schema": PARAMETERS}
    given: Any = {"model": endpoint.model, "max_tokens": 180, "tools": [tool]}
    async with anthropic.AsyncAnthropic(
        base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0
    ) as client:
        while True:
            if streamed:
                async with client.messages.stream(messages=messages, **given) as stream:
                    answer = await stream.get_final_message()
            else:
                answer = await client.messages.create(messages=messages, **given)
            messages.append({"role": "assistant", "content": answer.content})
            calls: list[Any] = [block for block in answer.content if block.type == "tool_use"]
            if not calls:
                [block] = answer.content
                assert block.type == "text" and answer.stop_reason == "end_turn"
                assert answer.usage.output_tokens == len("It is 2.") + 1
                return float(block.text == "It is 2.")
            assert answer.stop_reason == "tool_use" and calls[0].input == {"a": 1}
            result = {"type": "tool_result", "tool_use_id": calls[0].id, "content": "2"}
            messages.append({"role": "user", "content": [result]})


async def with_anthropic_streamed(row: Any, endpoint: Any) -> float:
    return await with_anthropic(row, endpoint, streamed=True)


async def with_responses(row: Any, endpoint: Any, *, streamed: bool = False) -> float:
    history: list[Any] = [{"role": "user", "content": row["prompt"]}]
    tool: Any = {"type": "function", "strict": False, **TOOL}
    given: Any = {"model": endpoint.model, "tools": [tool]}
    async with openais(endpoint) as client:
        while True:
            if streamed:
                async with client.responses.stream(input=history, **given) as stream:
                    answer = await stream.get_final_response()
            else:
                answer = await client.responses.create(input=history, **given)
            assert answer.status == "completed" and answer.usage is not None
            history += [item.model_dump(exclude_none=True) for item in answer.output]
            calls = [item for item in answer.output if item.type == "function_call"]
            if not calls:
                assert answer.usage.output_tokens == len("It is 2.") + 1
                return float(answer.output_text == "It is 2.")
            assert answer.output_text == "Wait." and json.loads(calls[0].arguments) == {"a": 1}
            result = {"type": "function_call_output", "call_id": calls[0].call_id, "output": "2"}
            history.append(result)


async def with_responses_streamed(row: Any, endpoint: Any) -> float:
    return await with_responses(row, endpoint, streamed=True)


@pytest.mark.parametrize(
    "agent",
    [
        with_responses,
        with_responses_streamed,
        with_openai,
        with_openai_streamed,
        with_anthropic,
        with_anthropic_streamed,
    ],
)
def test_an_agent_with_a_tool_is_one_trajectory_token_for_token(agent: Any) -> None:
    [group] = roll_agent(agent, SayingEngine(says))
    assert [t.sample for t in group.trajectories] == [0, 1]
    for trajectory in group.trajectories:
        prompt, call, result, answer = texts(trajectory)
        assert prompt[1].startswith("<system>You may call") and prompt[1].endswith("<assistant>")
        assert call == ("Segment", f"Wait. {CALL}\0") and answer == ("Segment", "It is 2.\0")
        assert result == ("Context", "<tool>2<assistant>")
        assert trajectory.reward == 1.0


def test_a_plain_function_and_a_reward_of_the_transcript() -> None:
    def agent(row: Any, endpoint: Any) -> str:
        with openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:
            answer = client.chat.completions.create(
                model=endpoint.model, messages=[{"role": "user", "content": row["prompt"]}]
            )
        return f"said {answer.choices[0].message.content}"

    def reward(row: Any, transcript: Any) -> dict[str, float]:
        assert transcript.ended_by == "agent" and transcript.returned == "said yes"
        [conversation] = transcript.conversations
        assert [m["role"] for m in conversation] == ["user", "assistant"]
        return {"right": float(transcript.answer == "yes"), "short": 2.0}

    weights = {"right": 1.0, "short": 0.5}
    [group] = roll_agent(
        agent, SayingEngine(lambda read: "yes"), reward=reward, reward_weights=weights
    )
    assert [t.rewards for t in group.trajectories] == [{"right": 1.0, "short": 2.0}] * 2
    assert [t.reward for t in group.trajectories] == [2.0] * 2


def test_edited_histories_and_sub_agents_are_branches_of_one_sample() -> None:
    async def agent(row: Any, endpoint: Any) -> float:
        assert (await post(endpoint, chat("a")))[0] == 200
        await post(endpoint, chat("a", "<a>", "b"))
        await post(
            endpoint, chat("summary", "<a>", "c")
        )  # compaction: an answer is kept, as context
        messages = [{"role": "system", "content": "sub"}, {"role": "user", "content": "d"}]
        await asyncio.gather(*(post(endpoint, {"messages": messages}) for _ in range(2)))
        return 1.0

    def says(read: str) -> str:
        return f"<{read.removesuffix('<assistant>')[-1]}>"

    [group] = roll_agent(agent, SayingEngine(says), group_size=1)
    assert [t.sample for t in group.trajectories] == [0] * 4
    assert sorted(texts(t) for t in group.trajectories) == [
        [("Context", "<system>sub<user>d<assistant>"), ("Segment", "<d>\0")],
        [("Context", "<system>sub<user>d<assistant>"), ("Segment", "<d>\0")],
        [
            *[("Context", "<user>a<assistant>"), ("Segment", "<a>\0")],
            *[("Context", "<user>b<assistant>"), ("Segment", "<b>\0")],
        ],
        [
            ("Context", "<user>summary<assistant><a>\0<user>c<assistant>"),
            ("Segment", "<c>\0"),
        ],
    ]
    tokens = [p.token_ids for t in group.trajectories for p in t.parts if isinstance(p, Segment)]
    assert len(tokens) == 5


def test_a_request_that_is_sent_again_gets_the_same_answer_and_without_the_header_a_new_one() -> (
    None
):
    async def agent(row: Any, endpoint: Any) -> float:
        again = {"x_stainless_retry_count": "1"}
        first, second = await post(endpoint, chat("a")), await post(endpoint, chat("a"))
        retried = await post(endpoint, chat("a"), **again)
        other = await post(endpoint, chat("b"), **again)  # whose first try was lost on its way
        ids = [answer["id"] for _, answer in (first, second, retried, other)]
        assert ids[2] == ids[1] and len({*ids}) == 3
        return 1.0

    [group] = roll_agent(agent, SayingEngine(lambda read: "yes"), group_size=1)
    assert len(group.trajectories) == 3


def test_a_client_that_gave_up_and_asks_again_gets_the_answer_that_it_did_not_wait_for() -> None:
    async def agent(row: Any, endpoint: Any) -> float:
        engine.hold.clear()
        waiting = asyncio.ensure_future(post(endpoint, chat("a")))
        await engine.begun.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        again = asyncio.ensure_future(post(endpoint, chat("a"), x_stainless_retry_count="1"))
        engine.hold.set()
        assert (await again)[0] == 200
        return 1.0

    class Held(SayingEngine):
        async def generate(self, request: Any, sink: Any) -> Any:
            self.begun.set()
            await self.hold.wait()
            return await super().generate(request, sink)

    engine = Held(lambda read: "yes")
    engine.hold, engine.begun = asyncio.Event(), asyncio.Event()
    [group] = roll_agent(agent, engine, group_size=1)
    assert [segments(t) for t in group.trajectories] == [["yes\0"]] and len(engine.read) == 1


def test_stops_and_a_number_of_tokens_are_the_clients_and_other_settings_are_the_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def agent(row: Any, endpoint: Any) -> float:
        _, stopped = await post(endpoint, chat("a", stop=["four"], temperature=0.3))
        [choice] = stopped["choices"]
        assert (
            choice["message"]["content"] == "one two three " and choice["finish_reason"] == "stop"
        )
        _, cut = await post(endpoint, chat("a", max_tokens=5))
        assert cut["choices"][0]["message"]["content"] == "one t"
        assert cut["choices"][0]["finish_reason"] == "length"
        # what was stopped is closed as the template closes it, and kept as it was sampled
        await post(endpoint, chat("a", "one two three ", "b", temperature=0.3))
        return 1.0

    session._say_overridden.cache_clear()  # it says each setting once
    [group] = roll_agent(agent, SayingEngine(lambda read: "one two three four five"), group_size=1)
    whole, cut = group.trajectories
    assert segments(whole) == ["one two three four", "one two three four five\0"]
    assert segments(cut) == ["one t"] and cut.finish_reason == "length"
    said = [r.getMessage() for r in caplog.records if "temperature" in r.getMessage()]
    assert len(said) == 1 and "client_sampling='refuse'" in said[0]


def test_side_requests_are_answered_and_not_trained() -> None:
    async def agent(row: Any, endpoint: Any) -> float:
        await post(endpoint, chat("title?"))
        await post(endpoint, chat("a"))
        return 1.0

    def is_side(body: Any) -> bool:
        return body["messages"][-1]["content"] == "title?"

    engine = SayingEngine(lambda read: "yes")
    [group] = roll_agent(agent, engine, group_size=1, side_request=is_side)
    [trajectory] = group.trajectories
    assert texts(trajectory)[0] == ("Context", "<user>a<assistant>") and len(engine.read) == 2


def test_tokens_in_tokens_out_and_plain_completions() -> None:
    async def agent(row: Any, endpoint: Any) -> float:
        ids = [5, 6]
        for _ in range(2):
            body = {"token_ids": ids, "sampling_params": {"max_tokens": 3}}
            status, answer = await post(endpoint, body, "/inference/v1/generate")
            assert status == 200
            ids = [*ids, *answer["choices"][0]["token_ids"], 9]
        async with openais(endpoint) as client:
            made = await client.completions.create(model="any", prompt="say")
            assert made.choices[0].text == "abc" and made.model == endpoint.model
            models = [model.id async for model in client.models.list()]
            assert models == [endpoint.model]
        return 1.0

    [group] = roll_agent(agent, SayingEngine(lambda read: "abc"), group_size=1)
    first, second = group.trajectories
    assert first.token_ids.tolist() == [5, 6, *map(ord, "abc"), 9, *map(ord, "abc")]
    assert texts(second) == [("Context", "say"), ("Segment", "abc\0")]


def test_an_agent_that_never_asks_is_an_error_that_says_what_to_give_its_client() -> None:
    with pytest.raises(RolloutError, match=r"'agent' ended without an answer.*base_url="):
        roll_agent(_silent)


async def _silent(row: Any, endpoint: Any) -> float:
    return 1.0


_silent.__name__ = "agent"
