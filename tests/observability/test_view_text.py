"""Texts of tokens in a view: split characters are whole, and no text acts as markup."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import sdp_lightning as sdp
from sdp_lightning.observability.view.text import PART, token_texts, visible
from support.rollouts import CodePoints
from support.view_pages import Page, page_of, text_trajectory


def byte_tokenizer() -> Any:
    """Byte-level BPE without merges: a token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S"]), max_size=12))
def test_characters_split_over_tokens_are_shown_whole_at_their_last_token(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text).ids
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) == len(text.encode())
    ends = np.cumsum([len(c.encode()) for c in text]) - 1
    assert [texts[end] for end in ends] == list(text)
    assert all(t == PART for i, t in enumerate(texts) if i not in set(ends.tolist()))


def test_bytes_that_never_become_a_character_are_shown_as_such() -> None:
    tokenizer = byte_tokenizer()
    broken = tokenizer.encode("\u20ac").ids[:2]  # two of its three bytes
    assert token_texts(broken, tokenizer) == [PART, "\ufffd"]
    whole = "".join(token_texts([*broken, *tokenizer.encode("ab").ids], tokenizer))
    assert whole.endswith("ab") and "\ufffd" in whole


def test_a_token_without_text_and_a_token_without_tokenizer_are_their_ids() -> None:
    assert token_texts([1, 2], None) == ["1", "2"]
    assert token_texts([10**6], byte_tokenizer()) == ["\u27e81000000\u27e9"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a\u23ce\nb"),
        ("\t", "\u21e5\t"),
        ("\r", "\u240d"),
        ("\x00\x1b[31m\x7f", "\u2400\u241b[31m\u2421"),
        ("\u202eevil", "\u27e8U+202E\u27e9evil"),
        ("\u200f\u2066", "\u27e8U+200F\u27e9\u27e8U+2066\u27e9"),
        ("\ud800", "\u27e8U+D800\u27e9"),
        ("\u0301", "\u25cc\u0301"),
        ("\u05e9\u05dc\u05d5\u05dd", "\u05e9\u05dc\u05d5\u05dd"),
        ("x" * 500, "x" * 160 + "\u2026\u27e8500 characters\u27e9"),
    ],
    ids=[
        *("newline", "tab", "carriage return", "control characters", "right-to-left override"),
        *("marks without width", "a lone surrogate", "a lone accent", "Hebrew is Hebrew", "long"),
    ],
)
def test_nothing_in_a_text_is_hidden_or_acts(text: str, shown: str) -> None:
    assert visible(text) == shown


HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</div></section></style><style>*{display:none}",
    "&lt;b&gt;&#10;",
    "<!--",
    "\x00\x1b]0;title\x07\u202e\ud800",
    "[link=https://example.org]rich[/link]",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_model_becomes_markup(text: str) -> None:
    trajectory = text_trajectory(text, (0, text), text, (1, text))
    group = sdp.TrajectoryGroup((trajectory,), row_id=text)
    calm = sdp.TrajectoryGroup(
        (text_trajectory("a" * len(text), (0, "a" * len(text)), "a", (1, "a" * len(text))),),
        row_id="a",
    )
    page, expected = page_of(group), page_of(calm)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in expected.tags]
    assert {name for _, attrs in page.tags for name in attrs} <= {
        *("class", "title", "style", "data-kind"),
    }
    sdp.view(group, tokenizer=CodePoints()).html().encode("utf-8")
    output = io.StringIO()
    sdp.view(group, tokenizer=CodePoints()).show(Console(file=output, width=60))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", output.getvalue())


def test_the_plain_text_of_a_view_does_not_repeat_its_data() -> None:
    """A notebook saves it beside the HTML, and the repr of a tokenizer says where it lies."""
    member = text_trajectory("q", (3, "a"))
    one, two = (
        sdp.view(member, tokenizer=CodePoints()),
        sdp.view(sdp.TrajectoryGroup((member,) * 2)),
    )
    assert [repr(one), repr(two)] == ["View(1 trajectory)", "View(2 trajectories)"]


def test_a_saved_page_has_one_style_no_script_and_nothing_from_the_network(tmp_path: Path) -> None:
    group = sdp.TrajectoryGroup((text_trajectory("?", (0, "a")),) * 2)
    path = sdp.view(group).save(tmp_path / "page.html", title="<b>")
    text = path.read_text(encoding="utf-8")
    tags = [tag for tag, _ in Page(text.removeprefix("<!doctype html>")).tags]
    assert tags.count("style") == 1 and "script" not in tags and "link" not in tags
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "<title>&lt;b&gt;</title>" in text
