"""Where a prompt begins and ends: BOS as the tokenizer writes it, and words to be continued."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from tokenizers import processors

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.testing import FakeEngine, tiny_tokenizer
from sdp_lightning.types import Context, Segment
from sdp_lightning.workflows.chat.settings import ChatSettings
from sdp_lightning.workflows.chat_template import encode_opening, encode_turn
from support.chat_templates import FAMILIES, tokenizer_of

CHAT = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


def with_bos(single: str) -> Any:
    """A tokenizer that writes ``single`` around a text."""
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    ids = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<bos>", "<eos>")]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=ids
    )
    return tokenizer


@pytest.mark.parametrize(
    ("single", "template", "setting", "prompt", "expected"),
    [
        pytest.param("<bos> $A", None, None, "1+", "<bos>1+", id="as the tokenizer writes"),
        pytest.param("<bos> $A <eos>", None, None, "1+", "<bos>1+", id="a prompt does not end"),
        pytest.param("$A", None, None, "1+", "1+", id="a tokenizer that writes none"),
        pytest.param("$A", None, True, "1+", "<bos>1+", id="none, but asked for"),
        pytest.param("<bos> $A", None, False, "1+", "1+", id="not wanted"),
        pytest.param("<bos> $A", None, None, "<bos>1+", "<bos>1+", id="written by the user"),
        pytest.param("<bos> $A", CHAT, None, "1+", "<bos>1+", id="written by the template"),
        pytest.param("<bos> $A", CHAT, True, "1+", "<bos>1+", id="by the template, and asked for"),
        pytest.param("<bos> $A", CHAT[15:], None, "1+", "1+", id="a template that writes none"),
        pytest.param("<bos> $A", CHAT[15:], True, "1+", "<bos>1+", id="none, and asked for it"),
    ],
)
def test_a_prompt_begins_with_bos_once_or_not_at_all(
    single: str, template: str | None, setting: bool | None, prompt: str, expected: str
) -> None:
    tokenizer = with_bos(single)
    tokenizer.chat_template = template
    tokens = encode_opening(
        *(prompt, tokenizer),
        use_chat_template=template is not None,
        settings=ChatSettings(add_special_tokens=setting),
    )
    assert tokenizer.decode(tokens) == expected


def test_a_bos_that_does_not_exist_is_named_and_an_empty_prompt_stays_empty() -> None:
    settings = ChatSettings(add_special_tokens=True)
    with pytest.raises(ConfigError, match="the tokenizer has no token that begins a text"):
        encode_opening("1+", tiny_tokenizer(), use_chat_template=False, settings=settings)
    with pytest.raises(ConfigError, match="must be True, False or None, got 'yes'"):
        sdp.RLVRWorkflow(len, add_special_tokens="yes")  # type: ignore[arg-type]
    with pytest.raises(RolloutError, match="the prompt '' has no tokens"):
        encode_opening("", with_bos("<bos> $A"), use_chat_template=False)


# Words to be continued ----------------------------------------------------------------------------


def continued(family: str, words: str) -> str:
    tokenizer = tokenizer_of(family)
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": words}]
    return tokenizer.decode(encode_opening(messages, tokenizer, use_chat_template=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("words", ["let me think:", "at first, I\n"])
def test_a_prompt_that_ends_with_the_assistants_words_is_continued(family: str, words: str) -> None:
    tokenizer, text = tokenizer_of(family), continued(family, words)
    content: Any = words.strip()
    if family == "vision":
        content = [{"type": "text", "text": content}]
    ask: Any = "1+1?" if family != "vision" else [{"type": "text", "text": "1+1?"}]
    chat = [{"role": "user", "content": ask}, {"role": "assistant", "content": content}]
    by_transformers = tokenizer.apply_chat_template(
        chat, tokenize=False, continue_final_message=True
    )
    assert text.rstrip("\n") == by_transformers and text.endswith(words)


@pytest.mark.parametrize("words", ["<think>\n1+1 is", "<think>"])
def test_thoughts_are_continued_where_the_template_would_close_them(words: str) -> None:
    """Qwen 3 writes an empty thought before an answer; a template may open one in each turn."""
    head = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert continued("qwen 3", words) == head + words
    assert continued("qwen 3", "2.") == f"{head}<think>\n\n</think>\n\n2."
    opens = tiny_tokenizer()
    opens.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}=<think>?</think>"
        "{% else %}<think></think>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}:<think>\n{% endif %}"
    )
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": words}]
    text = ChatSettings().template(opens).opening(chat, opens)
    assert text == f"1+1=<think>?</think>:<think>\n{words[7:].lstrip()}"


def test_an_observation_may_begin_the_next_turn() -> None:
    tokenizer = tokenizer_of("qwen 2.5")
    observation = [{"role": "user", "content": "No."}, {"role": "assistant", "content": "Then"}]
    tokens = encode_turn(observation, tokenizer, turn_format=None, stopped_by=None)
    text = "<|im_end|>\n<|im_start|>user\nNo.<|im_end|>\n<|im_start|>assistant\nThen"
    assert tokenizer.decode(tokens) == text


def test_words_that_no_text_can_end_with_are_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{{ m.content[:3] }}{% endif %}{% endfor %}"
    )
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "it is"}]
    with pytest.raises(RolloutError, match="leaves out the end of the message that is to be cont"):
        encode_opening(chat, tokenizer, use_chat_template=True)


# From end to end ----------------------------------------------------------------------------------


class Scripted(FakeEngine):
    """Says one thing after the other."""

    def __init__(self, tokenizer: Any, *said: str) -> None:
        super().__init__()
        self.tokenizer, self.said = tokenizer, itertools.cycle(said)

    async def generate(self, request: Any, sink: Any) -> Any:
        tokens = self.tokenizer.encode(next(self.said), add_special_tokens=False)
        tokens.append(self.tokenizer.eos_token_id)
        sink(Segment(0, tokens, [-0.1] * len(tokens)))
        return "stop"


def rollout(workflow: sdp.RolloutWorkflow, row: Any, tokenizer: Any, *said: str) -> Any:
    engine = Scripted(tokenizer, *said)
    executor = sdp.create_workflow_executor(
        config=sdp.RolloutConfig(batch_size=1, max_head_lag=0, timeout_s=60),
        engine=engine,
        workflow=workflow,
        prompts=[row],
        tokenizer=tokenizer,
    )
    try:
        executor.publish([], 0, reset=True)
        executor.resume()
        [group] = executor.take() or []
        return group.trajectories[0]
    finally:
        executor.close()
        engine.close()


def test_a_reward_reads_the_words_that_were_continued_in_the_messages() -> None:
    def reward(completion: str, row: Any, messages: Any) -> float:
        assert completion == " 2" and [m["content"] for m in messages] == ["1+1?", "It is 2"]
        return 1.0

    tokenizer = tokenizer_of("phi 3")
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is"}]
    workflow = sdp.RLVRWorkflow(reward, group_size=1)
    trajectory = rollout(workflow, {"prompt": chat}, tokenizer, " 2")
    text = "<|user|>\n1+1?<|end|>\n<|assistant|>\nIt is 2<|end|>"
    assert trajectory.reward == 1.0 and tokenizer.decode(trajectory.token_ids.tolist()) == text


def test_a_turn_that_was_begun_for_the_policy_is_one_turn() -> None:
    """The rounds are counted right: the words that were given and the sampled ones are one."""

    class Begins(sdp.Environment):
        def reset(self, row: Any) -> Any:
            return [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "It"}]

        def step(self, completion: str) -> Any:
            return (
                [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "So"}],
                0,
                0 > 1,
            )

    tokenizer = tokenizer_of("rounds")
    workflow = sdp.MultiTurnWorkflow(Begins, group_size=1, max_turns=3)
    trajectory = rollout(workflow, {"prompt": ""}, tokenizer, " is", " it")
    rounds = "[Round 1]\nQ: Q1\nA:It is</s>", "[Round 2]\nQ: Q2\nA:So it</s>"
    text = "".join([*rounds, "[Round 3]\nQ: Q2\nA:So is</s>"])
    assert tokenizer.decode(trajectory.token_ids.tolist()) == text


@pytest.mark.parametrize("family", ["phi 3", "cohere 2", "gemma 2", "gpt-oss"])
def test_the_result_of_a_tool_reaches_the_policy(family: str) -> None:
    """Also where templates leave out or refuse the role of a tool."""

    def secret() -> str:
        """The secret number."""
        return "OBS-4711"

    def make() -> sdp.Environment:
        return sdp.ToolEnvironment(
            [secret], lambda text, row: float("no idea" in text), tool_call_format="hermes"
        )

    tokenizer = tokenizer_of(family)
    call = '<tool_call>{"name": "secret", "arguments": {}}</tool_call>'
    workflow = sdp.MultiTurnWorkflow(make, group_size=1, max_turns=2)
    trajectory = rollout(workflow, {"prompt": "Q1"}, tokenizer, call, "no idea")
    first, between = [part for part in trajectory.parts if isinstance(part, Context)]
    assert "The secret number." in tokenizer.decode(first.token_ids.tolist())
    assert "OBS-4711" in tokenizer.decode(between.token_ids.tolist())
    assert trajectory.reward == 1.0
