"""A completion is data: whatever the policy writes is a value or a text, after linear work."""

from __future__ import annotations

import ast
import math
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.config.import_path import load_object
from sdp_lightning.observability.view import text as view
from sdp_lightning.rewards import exact_match, numeric_match, text as rewards
from sdp_lightning.rewards.text import between_tags
from sdp_lightning.testing import tiny_tokenizer
from sdp_lightning.workflows import tool_calls, tools
from sdp_lightning.workflows.chat_template import encode_turn
from support.counted_work import Count, CountedPattern, CountedText, counting, why_not_linear
from support.hostile_completions import completion
from support.paths import ROOT

gsm8k_reward: Any = load_object(f"{ROOT}/recipes/gsm8k_grpo/task.py:reward")
gsm8k = sys.modules[gsm8k_reward.__module__]
ROW = {"answer": "72", "prompt": "1+2?"}
FLAT, SLOPE = 4_000, 40  # operations; 8,000 characters read quadratically are 64,000,000
TURN_FORMATS = (None, "{observation}\n")
MESSAGES = 33  # of one turn: 32 calls, and a word on the others
TOKENIZER: Any = tiny_tokenizer()
TOKENIZER.chat_template = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
# Where what the policy wrote is read as text.
READERS = [
    *(ROOT / "sdp_lightning" / "rewards").glob("*.py"),
    *(ROOT / "sdp_lightning" / "workflows").glob("*.py"),
    *(ROOT / "sdp_lightning" / "observability" / "view").glob("*.py"),
    *ROOT.glob("recipes/*/task.py"),
]


def add(a: float = 0, b: float = 0) -> float:
    """The sum."""
    return a + b


def say(text: str = "") -> str:
    """The same text."""
    return text


def leave() -> None:
    """Nothing."""
    raise SystemExit(3)


leave.__name__ = "exit"


def first_number(text: str, row: Any) -> float:
    return numeric_match(text, row, which="first", tolerance=0.5)


def exactly(text: str, row: Any) -> float:
    return exact_match(text, row, ignore_case=True)


def shown(text: str, row: Any) -> float:
    named, counted = len("⟨U+10FFFF⟩"), len(f"…⟨{len(text)} characters⟩")
    assert len(view.visible(text)) <= named * view.LONGEST + counted
    return 0.0


REWARDS: dict[str, Callable[[str, Any], float]] = {
    "exact": exactly,
    "last number": numeric_match,
    "first number": first_number,
    "gsm8k": gsm8k_reward,
    "tags": lambda text, row: float(len(between_tags(text, "<answer>", "</answer>")) > 0),
    "shown": shown,
}


def converse(text: str) -> list[dict[str, str]]:
    """What a tool environment says to a turn of ``text``."""
    environment = sdp.ToolEnvironment([add, say, leave], exactly)
    environment.reset(ROW)
    result: Any = environment.step(text)
    return result.observation or []


def check(text: str, turn_formats: Sequence[str | None] = TURN_FORMATS) -> None:
    """Every parser and every text reward on one completion: a value, within the bound."""
    for name, reward in REWARDS.items():
        count = Count()
        given = CountedText(text, count)
        with counting(count, rewards, gsm8k):
            value = reward(given, ROW)
        assert math.isfinite(value) and 0 <= value <= 1, name
        assert count.total <= FLAT + SLOPE * len(text), f"{name}: {count.total} of {len(text)}"
    count = Count()
    given = CountedText(text, count)
    with counting(count, tools, tool_calls):
        messages = converse(given)
    assert count.total <= FLAT * MESSAGES + SLOPE * len(text), f"tools: {count.total}"
    assert all(len(message["content"]) <= 2000 for message in messages)
    for turn_format in turn_formats:
        encode_turn(messages or text, TOKENIZER, turn_format=turn_format, stopped_by=None)


def check_all(seeds: range, *, longest_run: int, num_encoded: int) -> None:
    """Check a completion of every seed; ``num_encoded`` of them are made tokens of, as turns."""
    every = len(seeds) // num_encoded
    for seed in seeds:
        turn_formats = TURN_FORMATS[seed // every % 2 :][:1] if seed % every == 0 else ()
        try:
            check(completion(seed, longest_run=longest_run), turn_formats)
        except Exception as error:
            error.add_note(f"completion {seed}, longest_run={longest_run}")
            raise


def test_two_thousand_hostile_completions_are_values_after_linear_work() -> None:
    """Operations are counted, not seconds: see ``support.counted_work`` for what that sees."""
    check_all(range(500), longest_run=200, num_encoded=250)
    check_all(range(500, 2_000), longest_run=20, num_encoded=250)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_hostile_completions_are_values_after_linear_work() -> None:
    check_all(range(2_000, 5_000), longest_run=1000, num_encoded=500)
    check_all(range(5_000, 102_000), longest_run=20, num_encoded=5_000)


# Linear -------------------------------------------------------------------------------------------

REPEATED = ("<tool_call>", "<answer>", "<tool_call>{", "1,111", "-1.", "\\boxed{", "[", "9")


@pytest.mark.fault("slow", "completion")
@pytest.mark.parametrize("piece", REPEATED)
def test_thirty_thousand_repetitions_are_linear_work(piece: str) -> None:
    """Before, ``<tool_call>`` was: 20 s of one call into ``re``, in which no thread ran."""
    for text in (piece * 30_000, f"<tool_call>{piece * 30_000}</tool_call>"):
        check(text)


def test_quadratic_work_is_seen_by_the_count() -> None:
    """The parsers of before, in Python: each opening looks for its end anew."""

    def naive(text: str) -> list[str]:
        starts = [place for place in range(len(text)) if text.startswith("<answer>", place)]
        return [text[start : text.find("</answer>", start)] for start in starts]

    count = Count()
    text = CountedText("<answer>" * 1000, count)
    with counting(count):
        naive(text)
    assert count.total > FLAT + SLOPE * len(text)

    count = Count()
    text, pattern = CountedText("1 " * 1000, count), CountedPattern(re.compile("1"), count)
    for start in range(0, len(text), 2):
        list(pattern.finditer(text[start:]))
    assert count.total > FLAT + SLOPE * len(text)


@pytest.mark.parametrize("seed", range(20))
def test_tags_are_what_the_lazy_expression_found(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(100):
        text = "".join(chance.choices(["<a>", "</a>", "x", "<", "a>", "\n"], k=12))
        assert between_tags(text, "<a>", "</a>") == re.findall("<a>(.*?)</a>", text, re.DOTALL)


def patterns_of(path: Path) -> list[tuple[str, int]]:
    """(pattern, flags) of every use of ``re``; fails on one that is not written out."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "re", f"{path}:{node.lineno} hides where its pattern is"
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("re."):
            continue
        assert ast.unparse(node.func) == "re.compile", f"{path}:{node.lineno} is no re.compile"
        pattern, *flags = node.args
        assert isinstance(pattern, ast.Constant), f"{path}:{node.lineno} makes its pattern"
        found.append((str(pattern.value), sum(getattr(re, ast.unparse(f)[3:]) for f in flags)))
    return found


def test_every_pattern_over_completions_is_linear_by_its_form() -> None:
    found = [(path, *pattern) for path in READERS for pattern in patterns_of(path)]
    assert {path.name for path, _, _ in found} >= {"text.py", "task.py"}
    for path, pattern, flags in found:
        assert not why_not_linear(pattern, flags), f"{path}: {why_not_linear(pattern, flags)}"


@pytest.mark.parametrize(
    "pattern",
    [
        *("<a>(.*?)</a>", "(a+)+b", r"\d+x", "(?:a+)?x", "(?:a+){2}", "(a|b+)c", "(?=a+)b"),
        *("(?:a+,)*", "x(?:a+b)?", "[^,]+,", r"\d{1,3}(?:,\d{3})+(?!\d)", "(?>a+)b"),
    ],
)
def test_a_pattern_that_may_be_tried_again_is_found(pattern: str) -> None:
    assert why_not_linear(pattern)


@pytest.mark.parametrize(
    "pattern", [r"\d+(?:\.\d+)?", "a{3,5}b", r"(?:,\d{3}(?!\d))+", "(a+)?(b+)?"]
)
def test_a_pattern_that_reads_once_is_let_pass(pattern: str) -> None:
    assert not why_not_linear(pattern)
