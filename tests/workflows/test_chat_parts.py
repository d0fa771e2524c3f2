"""Messages in parts: text is written as the chat template knows it, images are refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import RolloutError
from sdp_lightning.testing import tiny_tokenizer
from sdp_lightning.workflows.chat.messages import as_messages
from sdp_lightning.workflows.chat.settings import ChatSettings
from sdp_lightning.workflows.chat_template import encode_opening, encode_turn
from support.chat_templates import tokenizer_of

PARTS_ONLY = (  # as of SmolVLM: a text is iterated over, and nothing of it is written
    "{% for m in messages %}a{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% endif %}{% endfor %}b{% endfor %}"
)
TEXTS_ONLY = "{% for m in messages %}{{ 'a' + m.content | trim + 'b' }}{% endfor %}"
LEAVES_OUT = "{% for m in messages if m.role == 'user' %}a{{ m.content }}b{% endfor %}"


def opening(messages: Any, template: str) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer.decode(encode_opening(messages, tokenizer, use_chat_template=True))


@pytest.mark.parametrize("template", [PARTS_ONLY, TEXTS_ONLY])
def test_a_text_is_written_in_the_form_that_the_template_knows(template: str) -> None:
    message = {"role": "user", "content": " 1+2 "}
    assert opening([message], template).replace(" ", "") == "a1+2b"
    assert opening("1+2", template) == "a1+2b"


def test_parts_of_text_are_passed_on() -> None:
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2"}]
    assert opening([{"role": "user", "content": parts}], PARTS_ONLY) == "a1+2b"


def test_a_system_message_that_a_template_leaves_out_is_the_beginning_of_the_users() -> None:
    messages = [{"role": "system", "content": "9"}, {"role": "user", "content": "1"}]
    assert opening(messages, LEAVES_OUT) == "a9\n\n1b"


TEMPLATES = {
    "trims": "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}",
    "only if a string": "{% for m in messages %}[{% if m.content is string %}{{ m.content }}"
    "{% endif %}]{% endfor %}",
    "only if parts": "{% for m in messages %}[{% for p in m.content %}{{ p.text }}{% endfor %}]"
    "{% endfor %}",
    "looks for a key": "{% for m in messages %}[{% if 'tool_calls' in m %}"
    "{{ m.tool_calls | length }} calls{% else %}{{ m.content }}{% endif %}]{% endfor %}",
}
FORMS: dict[str, dict[str, Any]] = {
    "parts": {"content": [{"type": "text", "text": "2+2?"}]},
    "keys that are None": {"content": "2+2?", "tool_calls": None},
    "parts with keys that are None": {"content": [{"text": "2+", "image": None}, {"text": "2?"}]},
    "plain": {"content": "2+2?"},
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_form_of_a_message_is_the_same_question(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    for form in FORMS.values():
        messages = as_messages([{"role": "user", **form}])
        assert ChatSettings().template(tokenizer).opening(messages, tokenizer) == "[2+2?]"


SHOWS_OTHERS = (
    "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}"
    "{% endfor %}"
)
SYSTEMS = {
    "keeps the last": "{% set ns = namespace(s='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.s = m.content %}{% endif %}{% endfor %}{{ ns.s }}",
    "keeps the first": "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}",
    "refuses another": "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('at the beginning') }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("template", SYSTEMS)
def test_the_tools_and_the_rows_own_rules_are_both_read(template: str) -> None:
    def add(a: int, b: int) -> int:
        """Sum."""
        return a + b

    rules = [{"role": "system", "content": "RULES"}, {"role": "user", "content": "1+1?"}]
    environment = sdp.ToolEnvironment([add], lambda text, row: 0.0)
    tokenizer: Any = copy.deepcopy(tokenizer_of("phi 3"))
    tokenizer.chat_template = SYSTEMS[template] + SHOWS_OTHERS
    prompt = environment.reset({"prompt": rules})
    tokens = encode_opening(prompt, tokenizer, use_chat_template=True, tools=environment.tools)
    text = tokenizer.decode(tokens)
    assert re.search(r"add\b.*Sum\..*RULES.*1\+1\?", text, re.DOTALL), text


def test_a_turn_is_found_by_a_template_of_parts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PARTS_ONLY
    tokens = encode_turn("3+4", tokenizer, turn_format=None, stopped_by=None)
    assert tokenizer.decode(tokens) == "ba3+4b"
    parts = [{"role": "user", "content": [{"type": "text", "text": "5"}]}]
    tokens = encode_turn(parts, tokenizer, turn_format="a{observation}b", stopped_by=None)
    assert tokenizer.decode(tokens) == "a5b"


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image", "url": "a.png"}, "image"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "image_url"),
        ({"type": "audio", "audio": "a.wav", "text": "?"}, "audio"),
        ({"image": "a.png"}, "image"),
        ("words", "str"),
    ],
)
def test_other_parts_than_text_are_refused_by_name(part: Any, kind: str) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "?"}, part]}]
    with pytest.raises(RolloutError, match=f"the user's message has a part of type '{kind}'"):
        opening(messages, PARTS_ONLY)
    with pytest.raises(RolloutError, match=f"a part of type '{kind}'"):
        encode_turn(messages, tiny_tokenizer(), turn_format="{observation}", stopped_by=None)
