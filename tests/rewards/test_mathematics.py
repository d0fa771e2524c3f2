"""Answers of mathematics: which pairs are equal, which box counts, which rows cannot be read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError
from sdp_lightning.rewards import RewardPool, exact_match, numeric_match
from sdp_lightning.testing import FakeEngine
from support.trainers import make_data, make_module, make_trainer

pytest.importorskip("math_verify")

from sdp_lightning.rewards import mathematics
from sdp_lightning.rewards.mathematics import last_box

math_reward = inspect.unwrap(mathematics.math_reward)
MATH = "sdp_lightning.rewards.mathematics:math_reward"

# (answer of the row, last box of the completion, verdict): all of them judged by hand.
PAIRS = [
    # numbers, and how they are written
    ("42", "42.", 1),
    ("42", " 42 ", 1),
    ("42", "43", 0),
    ("42.", "42", 1),
    ("1,234,567", "1234567", 1),
    ("32,348", "32{,}348", 1),
    (r"1\,000", "1000", 1),
    (r"\frac12", "0.5", 1),
    (r"\frac{1}{3}", "0.333", 0),
    ("1/2", r"\dfrac{1}{2}", 1),
    ("1e3", "1000", 1),
    (r"1.5\times10^3", "1500", 1),
    ("-5", "\u22125", 1),
    ("5", "-5", 0),
    ("007", "7", 1),
    ("$7$", "7", 1),
    (r"\boxed{7}", "7", 1),
    (r"The answer is $\frac{3}{4}$, or $0.75$", "0.75", 1),
    # money
    (r"\$36", "36", 1),
    (r"\$36", r"\$36.00", 1),
    (r"\$36", "37", 0),
    ("$36", "36", 1),
    ("36", r"\$36", 1),
    ("36", "$36$", 1),
    (r"\$32{,}348", "32348", 1),
    (r"\$32{,}348", r"\$32,\!348", 1),
    (r"\$32{,}348", "32", 0),
    (r"\$18.90", "18.9", 1),
    # percent
    (r"36\%", r"36\%", 1),
    ("36%", r"36\%", 1),
    (r"36\%", "0.36", 1),
    (r"36\%", "36", 1),
    ("0.36", r"36\%", 1),
    (r"36\%", "3.6", 0),
    # units
    (r"5\text{ cm}", "5", 1),
    ("5 cm", r"5\text{ cm}", 1),
    ("5", r"5\ \mathrm{m/s}", 1),
    (r"10\text{ km}^2", "10", 1),
    (r"5\text{ cm}", r"6\text{ cm}", 0),
    (r"90^\circ", "90", 1),
    # mixed numbers
    (r"2\frac{1}{2}", "2.5", 1),
    ("2 1/2", r"\frac{5}{2}", 1),
    (r"\frac{5}{2}", "2 1/2", 1),
    ("-2 1/2", "-2.5", 1),
    ("2 1/2", "1", 0),
    # sets, lists, pairs
    (r"\{1,2\}", r"\{2,1\}", 1),
    ("1,2", "2, 1.", 1),
    ("1, 2, 3", "1, 2", 0),
    (r"\{1,\ 200\}", "1200", 0),
    (r"\pm 3", "3,-3", 1),
    (r"\emptyset", "0", 0),
    ("(2,1)", "(2,1)", 1),
    ("(2,1)", "(3,1)", 0),
    ("(1,2)", "(2,1)", 0),
    # intervals
    ("[1,2)", "[1,2)", 1),
    ("[1,2)", "[1,2]", 0),
    (r"(-\infty,3]\cup[5,\infty)", r"[5,\infty) \cup (-\infty,3]", 1),
    # expressions, equations, words
    (r"\sqrt{8}", r"2\sqrt{2}", 1),
    ("x^2+2x+1", "(x+1)^2", 1),
    ("3", "x=3", 1),
    ("3", "x=4", 0),
    (r"3\pi", "9.42", 0),
    (r"\text{Monday}", "Monday", 1),
    (r"\text{Monday}", r"\text{Tuesday}", 0),
    ("A", r"\text{(A)}", 1),
    ("C", "D", 0),
]


@pytest.mark.parametrize(("answer", "box", "verdict"), PAIRS, ids=str)
def test_pairs_that_were_judged_by_hand(answer: str, box: str, verdict: int) -> None:
    assert (
        math_reward(rf"First \boxed{{-999}}, then \boxed{{{box}}}", {"answer": answer}) == verdict
    )


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{6} times \boxed{7} is \boxed{42}", "42"),
        (r"\boxed{7}, no: \fbox {42}.", "42"),
        (r"\boxed{42} or \boxed{4", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} \}", r"\{1, 2\}"),
        (r"a } b \boxed{3} {", "3"),
        (r"\boxed{\boxed{1}}", r"\boxed{1}"),
        (r"\\boxed{1}", None),
        (r"\boxed{", None),
        ("no box", None),
        (r"\boxed{" * 50_000, None),
        (r"\boxed{1}" * 50_000, "1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_last_box_that_is_closed_counts(text: str, box: str | None) -> None:
    assert last_box(text) == box


def test_without_a_box_the_last_formula_or_number_counts() -> None:
    assert math_reward("It is 42.", {"answer": "42"}) == 1.0
    assert math_reward("I cannot tell", {"answer": "42"}) == 0.0


# Rows that cannot be read -------------------------------------------------------------------------


ROWS: list[dict[str, Any]] = [
    {"prompt": "?", "answer": answer} for answer in ("5", r"\$36", r"\text{Monday}", 7)
]


def check(reward: Any, *rows: Any) -> None:
    sdp.ShapedWorkflow(sdp.RLVRWorkflow(reward)).check_rows(enumerate(rows))


def test_rows_whose_answer_math_verify_cannot_read_are_named() -> None:
    bad = [{"id": "b1", "answer": "  "}, {"id": "b2", "gold": "3"}, *[{"answer": "$$"}] * 5]
    pool = RewardPool(MATH, num_workers=1)
    wanted = (
        r"7 of 11 rows cannot be scored by 'math_reward': row 'b2': row has no 'answer'.* "
        r"row 'b1': its answer '  ' cannot be read\..* And 2 more\. Correct these rows"
    )
    with pytest.raises(ConfigError, match=wanted):
        check(pool, *ROWS, *bad)


def test_rows_are_checked_with_the_keywords_of_a_partial_and_good_ones_start_no_worker() -> None:
    read: list[int] = []

    def rows() -> Iterable[tuple[int, Any]]:
        for index in range(3):
            read.append(index)
            yield index, {"gold": index}

    partial = functools.partial(numeric_match, answer_key="gold")
    sdp.RLVRWorkflow(partial).check_rows(rows())
    assert read == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"1 of 2 rows .*'numeric_match': row 1: .*'1 or 2'"):
        check(partial, {"gold": 1}, {"gold": "1 or 2"})
    with pytest.raises(ConfigError, match=r"1 of 1 rows .*'exact_match': row 0: row has no"):
        check(exact_match, {"gold": 1})
    sdp.RLVRWorkflow(lambda c, r: 0.0).check_rows(rows())
    assert read == [0, 1, 2], "a reward without a check reads no row"


@pytest.mark.parametrize("which", ["rows", "val_prompts"])
def test_a_fit_is_refused_before_its_engine_starts(which: str, model_folder: str) -> None:
    class Never(FakeEngine):
        def start(self) -> None:
            raise AssertionError("started")

    good, bad = {"prompt": "1+1=", "answer": "2"}, {"id": "odd", "prompt": "?", "answer": "two"}
    rows: dict[str, Any] = {"rows": [good], "val_prompts": [good]} | {which: [good, bad]}
    data = make_data(sdp.RLVRWorkflow(numeric_match), engine=Never(), batch_size=1, **rows)
    with pytest.raises(ConfigError, match="row 'odd': the row's 'answer' is 'two', with 0 numbers"):
        make_trainer(sdp.WeightSyncCallback(), max_steps=1).fit(make_module(model_folder), data)
