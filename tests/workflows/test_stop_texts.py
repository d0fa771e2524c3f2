"""A stop text ends a completion at the first token with which the text of all tokens holds it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from sdp_lightning.errors import ConfigError
from sdp_lightning.testing import tiny_tokenizer
from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.completion import completion_text
from sdp_lightning.workflows.stop_texts import StopTexts
from sdp_lightning.workflows.stops import with_stops
from support.tokenizer_kinds import KINDS, TEXTS, byte_level, sentencepiece, wordpiece


def first_end(tokens: Sequence[int], stops: Sequence[str], tokenizer: Any) -> int | None:
    """By the whole text at every token."""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(list(tokens[:count]), skip_special_tokens=False)
        if any(stop in text for stop in stops):
            return count
    return None


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=150)
def test_it_is_found_at_the_token_at_which_the_whole_text_first_holds_it(
    kind: str, data: st.DataObject
) -> None:
    tokenizer = KINDS[kind]()
    some_text = st.sampled_from(TEXTS).map(partial(tokenizer.encode, add_special_tokens=False))
    any_tokens = st.lists(st.integers(0, len(tokenizer) - 1), max_size=12)
    parts = data.draw(st.lists(some_text | any_tokens, min_size=1, max_size=4))
    tokens = [token for part in parts for token in part]
    text = tokenizer.decode(tokens, skip_special_tokens=False).replace("\ufffd", "")
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    stop = text[start : start + data.draw(st.integers(1, 12))]
    stops = [text for text in (stop, data.draw(st.sampled_from(["</answer>", "\n", "あ"]))) if text]
    finder = StopTexts(stops, tokenizer.decode)
    assert finder.first_end(tokens) == first_end(tokens, stops, tokenizer)


def test_what_is_left_of_a_text_that_has_begun_is_told() -> None:
    tokenizer = byte_level()
    finder = StopTexts(["</answer>", "<//\n", "x"], tokenizer.decode)
    assert finder.rests(tokenizer.encode("42</answ")) == ["er>"]
    assert finder.rests(tokenizer.encode("42</")) == ["answer>", "/\n"]
    assert finder.rests(tokenizer.encode("42")) == finder.rests([]) == []


def test_bytes_of_a_character_match_nothing_before_its_last() -> None:
    tokenizer, smile = sentencepiece(), "🙂"
    tokens = tokenizer.encode("t" + smile, add_special_tokens=False)
    assert len(tokens) == 5
    finder = StopTexts([smile, "🙁"], tokenizer.decode)  # the other has three bytes in common
    assert finder.first_end(tokens[:4]) is None and finder.first_end(tokens) == 5
    with pytest.raises(ConfigError, match=r"none U\+FFFD"):
        with_stops(SamplingParams(), tokenizer, "\ufffd")


def test_few_tokens_are_decoded() -> None:
    tokenizer = byte_level()
    decoded: list[int] = []

    def decode(token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        decoded.append(len(token_ids))
        return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    finder = StopTexts(["</answer>"], decode)
    tokens = tokenizer.encode("so it goes on, and on. " * 400, add_special_tokens=False)
    assert finder.first_end(tokens) is None
    assert decoded == [2] * len(set(tokens)), "each token once, alone, and never the completion"
    del decoded[:]
    end = tokenizer.encode("</answer>", add_special_tokens=False)
    assert finder.first_end([*tokens, *end], len(tokens)) == len(tokens) + len(end)
    assert max(decoded) < 50


# Settings -----------------------------------------------------------------------------------------


def test_a_newline_of_sentencepiece_is_a_token_and_a_text() -> None:
    """Input r05: it is one token in context, and two alone."""
    tokenizer = sentencepiece()
    newline = tokenizer.convert_tokens_to_ids("\n")
    assert len(tokenizer.encode("\n", add_special_tokens=False)) == 2
    params = with_stops(SamplingParams(), tokenizer, ("\n",))
    assert params.stop_token_ids == (tokenizer.eos_token_id, newline)
    assert params.stop_texts == ("\n",)
    joined = tokenizer.convert_tokens_to_ids(">\n")
    assert StopTexts(params.stop_texts, tokenizer.decode).ends([joined], 0, 1)


def test_stops_come_from_settings_tokenizer_folder_and_workflow() -> None:
    tokenizer = byte_level()
    end = tokenizer.convert_tokens_to_ids("<end>")
    given = SamplingParams(stop_token_ids=(9,), stop_texts=("STOP",))
    params = with_stops(given, tokenizer, "</answer>", [end, 1])
    assert params.stop_token_ids == (9, 1, end) and params.stop_texts == ("STOP", "</answer>")
    without = SamplingParams(stop_at_model_eos=False)
    assert with_stops(without, tokenizer, (), [end]).stop_token_ids == (1,)


@pytest.mark.parametrize("stop", ["", ["a", ""]], ids=["alone", "among others"])
def test_an_empty_stop_text_is_refused(stop: Any) -> None:
    with pytest.raises(ConfigError, match=r"a stop text must have characters, none U.FFFD, got ''"):
        with_stops(SamplingParams(), byte_level(), stop)


def test_a_stop_text_that_the_tokenizer_cannot_write_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'</b>' as '<unk>/b<unk>', so no completion ends"):
        with_stops(SamplingParams(), tiny_tokenizer(), ("\n", "</b>"))
    with pytest.raises(ConfigError, match=r"the stop text '字'"):
        with_stops(SamplingParams(), wordpiece(), "字")


# The text that a reward reads ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "keep", "include", "text"),
    [
        ("<end>42</answer>", False, True, "42</answer>"),
        ("<end>42</answer>", False, False, "42"),
        ("<end>42</answer>", True, True, "<end>42</answer>"),
        ("<end>42</answer>", True, False, "<end>42"),
        ("4<end>2</answer>\n\n", False, True, "42</answer>"),
        ("4<end>2</answer>\n\n", False, False, "42"),
        ("4<end>2</answer>\n\n", True, False, "4<end>2"),
        ("</answer>", False, False, ""),
        ("<end></answer>", False, False, ""),
        ("42</answer", False, False, "42</answer"),
    ],
)
def test_the_text_ends_with_the_stop_text_or_before_it(
    written: str, keep: bool, include: bool, text: str
) -> None:
    tokenizer = byte_level()
    read = completion_text(
        tokenizer.encode(written, add_special_tokens=False),
        tokenizer,
        stop_texts=("</answer>",),
        keep_special_tokens=keep,
        include_stop_text=include,
    )
    assert read == text


def test_a_stop_text_that_is_a_special_token_is_left_out_as_every_token_that_ends() -> None:
    tokenizer = byte_level()
    params = with_stops(SamplingParams(), tokenizer, "<end>")
    tokens = tokenizer.encode("42<end>", add_special_tokens=False)
    read = partial(
        completion_text,
        *(tokens, tokenizer),
        stop_token_ids=params.stop_token_ids,
        stop_texts=params.stop_texts,
    )
    assert read() == read(keep_special_tokens=True) == "42"
