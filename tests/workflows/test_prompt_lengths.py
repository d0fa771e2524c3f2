"""Lengths of many prompts at once: those of a rollout, and kept for the next start."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.testing import tiny_tokenizer
from sdp_lightning.workflows import prompt_lengths
from sdp_lightning.workflows.chat_template import encode_opening
from sdp_lightning.workflows.prompt_lengths import Opening, PromptFault, PromptLength, PromptMeter

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXTS = ["1+1=", "what is 2?\n", "?", "a b  c", "7" * 40]
CHATS = [
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2"}],
    [{"role": "user", "content": "2+3"}],
]


@pytest.fixture
def tokenizer() -> Any:
    made = tiny_tokenizer()
    made.chat_template = CHAT
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, in which few prompts are worth a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(prompt_lengths, "LEAST_CACHED", 2)
    return tmp_path / "sdp_lightning" / "prompt_lengths"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts were tokenized at each time."""
    counts: list[int] = []
    count = prompt_lengths.count_tokens

    def counted(tokenizer: Any, texts: Sequence[str]) -> list[int]:
        counts.append(len(texts))
        return count(tokenizer, texts)

    monkeypatch.setattr(prompt_lengths, "count_tokens", counted)
    return counts


def lengths(meter: PromptMeter, prompts: Sequence[Any], **settings: Any) -> list[PromptLength]:
    return meter.lengths([Opening(prompt) for prompt in prompts], **settings)


@pytest.mark.parametrize("uses_template", [False, True])
def test_lengths_are_those_of_the_prompts_of_rollouts(tokenizer: Any, uses_template: bool) -> None:
    prompts = [*TEXTS, *CHATS]
    expected = [len(encode_opening(p, tokenizer, use_chat_template=uses_template)) for p in prompts]
    for _ in range(2):  # measured, and read
        found = lengths(PromptMeter(tokenizer), prompts, use_chat_template=uses_template)
        assert found == expected


def test_a_second_start_tokenizes_nothing(tokenizer: Any, measured: list[int], cache: Path) -> None:
    prompts = [*CHATS, "", 5]
    first = lengths(PromptMeter(tokenizer), prompts, use_chat_template=True)
    assert isinstance(first[2], PromptFault) and isinstance(first[3], PromptFault)
    assert lengths(PromptMeter(tokenizer), prompts, use_chat_template=True) == first
    assert measured == [2] and len([*cache.glob("[!.]*")]) == 1


def other_template(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT.replace("[assistant]", "[assistant] now ")


def other_token(tokenizer: Any) -> None:
    tokenizer.add_tokens(["2+"])


@pytest.mark.parametrize("change", [other_template, other_token])
def test_another_tokenizer_or_template_is_measured_anew(
    tokenizer: Any, measured: list[int], change: Any
) -> None:
    before = lengths(PromptMeter(tokenizer), CHATS, use_chat_template=True)
    change(tokenizer)
    after = lengths(PromptMeter(tokenizer), CHATS, use_chat_template=True)
    assert before != after and measured == [2, 2]
    assert after == [len(encode_opening(p, tokenizer, use_chat_template=True)) for p in CHATS]


@pytest.mark.parametrize(
    ("prompts", "uses_template"),
    [
        (["1+1=", "2"], True),
        (["1+1=", "3"], False),
        (["1+1=2", ""], False),
        ([[{"role": "user", "content": "1+1="}], "2"], False),
    ],
    ids=["setting", "content", "borders", "kind"],
)
def test_other_prompts_or_settings_are_measured_anew(
    tokenizer: Any, measured: list[int], prompts: list[Any], uses_template: bool
) -> None:
    meter = PromptMeter(tokenizer)
    lengths(meter, ["1+1=", "2"], use_chat_template=False)
    lengths(meter, prompts, use_chat_template=uses_template)
    assert len(measured) == 2


def test_a_template_that_writes_the_date_is_measured_anew_on_another_day(
    tokenizer: Any, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdp_lightning.config import token_counts

    class Tomorrow(token_counts.datetime.date):
        @classmethod
        def today(cls) -> Any:
            return cls(2031, 1, 1)

    tokenizer.chat_template = "{{ strftime_now('%d') }}" + CHAT
    lengths(PromptMeter(tokenizer), CHATS, use_chat_template=True)
    monkeypatch.setattr(token_counts.datetime, "date", Tomorrow)
    lengths(PromptMeter(tokenizer), CHATS, use_chat_template=True)
    assert measured == [2, 2]


class OwnTokenizer:
    """A tokenizer whose code may do anything: its lengths are never kept."""

    eos_token_id = 1

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [2] * len(text.split())


class Odd:
    """A value that JSON does not know."""

    def __str__(self) -> str:
        return "odd"


def test_what_cannot_be_told_from_other_things_is_not_kept(
    tokenizer: Any, measured: list[int], cache: Path
) -> None:
    own: Any = OwnTokenizer()
    assert lengths(PromptMeter(own), ["a b", "c"], use_chat_template=False) == [2, 1]
    odd = [[{"role": "user", "content": "1", "more": Odd()}], "2"]
    lengths(PromptMeter(tokenizer), odd, use_chat_template=False)
    assert measured == [2, 2] and not cache.exists()


def test_a_damaged_file_and_a_folder_without_rights_cost_time_only(
    tokenizer: Any, measured: list[int], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = lengths(PromptMeter(tokenizer), TEXTS, use_chat_template=False)
    (file,) = cache.glob("[!.]*/lengths.json")
    file.write_text(json.dumps(first)[:-3])
    with caplog.at_level(logging.WARNING):
        assert lengths(PromptMeter(tokenizer), TEXTS, use_chat_template=False) == first
        file.unlink()
        assert lengths(PromptMeter(tokenizer), TEXTS, use_chat_template=False) == first
    assert measured == [5] * 3 and caplog.text.count("are not cached") == 2


def test_few_prompts_leave_no_file(
    tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_lengths, "LEAST_CACHED", len(TEXTS) + 1)
    lengths(PromptMeter(tokenizer), TEXTS, use_chat_template=False)
    assert not cache.exists()
