"""Messages in parts: text is written as the chat template knows it, images are refused."""

from __future__ import annotations

from typing import Any

import pytest

from sdp_lightning.errors import RolloutError
from sdp_lightning.testing import tiny_tokenizer
from sdp_lightning.workflows.chat_template import encode_opening, encode_turn

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
