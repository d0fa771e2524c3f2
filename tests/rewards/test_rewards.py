"""Rewards that compare a completion with the answer in its row."""

from __future__ import annotations

from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from hypothesis import given, strategies as st

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.rewards import exact_match, find_numbers, numeric_match


@pytest.mark.parametrize(
    ("completion", "answer", "options", "reward"),
    [
        pytest.param("12\n", "12", {}, 1.0, id="white space at the ends is ignored"),
        pytest.param("12\n", "12", {"strip": False}, 0.0, id="unless it must not be"),
        pytest.param("12", 12, {}, 1.0, id="the answer may be a number"),
        pytest.param("1 2", "12", {}, 0.0, id="white space inside counts"),
        pytest.param("PARIS", "Paris", {}, 0.0, id="case counts"),
        pytest.param("PARIS", "Paris", {"ignore_case": True}, 1.0, id="unless it must not"),
        pytest.param("123", "12", {}, 0.0, id="a longer text is wrong"),
        pytest.param("", "12", {}, 0.0, id="nothing is wrong"),
    ],
)
def test_exact_match(completion: str, answer: Any, options: dict[str, Any], reward: float):
    assert exact_match(completion, {"answer": answer}, **options) == reward


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        pytest.param("", [], id="empty"),
        pytest.param("no digits - at all.", [], id="no digits"),
        pytest.param("7", ["7"], id="digit"),
        pytest.param("It is 12.", ["12"], id="full stop after the number"),
        pytest.param("3.50 and .5", ["3.50", "0.5"], id="decimals"),
        pytest.param("wait...5", ["5"], id="dots before the number"),
        pytest.param("-4, +4, x=-4, (-4)", ["-4", "4", "-4", "-4"], id="signs"),
        pytest.param("\u22124", ["-4"], id="typographic minus"),
        pytest.param("3-1 and 7 - 2 and f(3)-1", ["3", "1", "7", "2", "3", "1"], id="subtraction"),
        pytest.param("1,234 and 12,345,678.9", ["1234", "12345678.9"], id="thousands"),
        pytest.param("1,2,3", ["1", "2", "3"], id="list without spaces"),
        pytest.param("1,2345", ["1", "2345"], id="four digits after a comma"),
        pytest.param("$1,200.00 or 50%", ["1200.00", "50"], id="units"),
        pytest.param("2e3 1.5E-2", ["2e3", "1.5e-2"], id="powers of ten"),
        pytest.param("2es", ["2"], id="a letter that begins no exponent"),
        pytest.param("x2 v1.2.3 a_4", [], id="names and versions"),
        pytest.param("1.2.3", ["1.2"], id="two dots"),
        pytest.param("\\boxed{42}", ["42"], id="boxed"),
        pytest.param("1/2", ["1", "2"], id="fractions are two numbers"),
    ],
)
def test_numbers_are_found(text: str, numbers: list[str]):
    assert find_numbers(text) == [Decimal(number) for number in numbers]


@given(st.lists(st.integers(min_value=-(10**12), max_value=10**12), max_size=5))
def test_integers_written_with_commas_are_found_again(values: list[int]):
    assert find_numbers(" and ".join(f"{value:,}" for value in values)) == values


@given(st.decimals(allow_nan=False, allow_infinity=False))
def test_a_decimal_written_by_python_is_found_again(value: Decimal):
    assert find_numbers(str(value)) == [value]


@pytest.mark.parametrize(
    ("completion", "answer", "options", "reward"),
    [
        pytest.param("1 then 2", 2, {}, 1.0, id="the last number counts"),
        pytest.param("1 then 2", 1, {"which": "first"}, 1.0, id="or the first"),
        pytest.param("2.00", "2", {}, 1.0, id="values are compared, not texts"),
        pytest.param("2.01", 2, {}, 0.0, id="near is wrong"),
        pytest.param("2.01", 2, {"tolerance": 0.1}, 1.0, id="unless tolerated"),
        pytest.param("2.2", 2, {"tolerance": 0.1}, 0.0, id="beyond the tolerance"),
        pytest.param("-3", "3", {}, 0.0, id="the sign counts"),
        pytest.param("none", 3, {}, 0.0, id="no number is wrong"),
        pytest.param("10000000000000000000001", 10**22, {}, 0.0, id="beyond float precision"),
        pytest.param("1e999999", 1, {"tolerance": 1.0}, 0.0, id="huge powers do no harm"),
        pytest.param("72", "#### 72", {}, 1.0, id="the answer may be text around one number"),
        pytest.param("0.5", 0.5, {}, 1.0, id="the answer may be a float"),
    ],
)
def test_numeric_match(completion: str, answer: Any, options: dict[str, Any], reward: float):
    assert numeric_match(completion, {"answer": answer}, **options) == reward


@pytest.mark.parametrize("answer", ["none", "1 or 2", True, None])
def test_an_answer_that_is_not_one_number_is_an_error_that_shows_it(answer: Any):
    with pytest.raises(RolloutError, match=f"{answer!r}"):
        numeric_match("1", {"answer": answer})


def test_a_power_of_ten_beyond_all_bounds_is_no_number():
    text = "It is 4, not 1e99999999999999999999."
    assert find_numbers(text) == [4]
    assert numeric_match(text, {"answer": 4}) == 1.0
    assert numeric_match("1e99999999999999999999", {"answer": 4}) == 0.0


@pytest.mark.parametrize("reward", [exact_match, numeric_match])
def test_a_row_without_an_answer_is_an_error_that_names_its_keys(reward: Any):
    with pytest.raises(RolloutError, match=r"no 'answer'.*\['label', 'prompt'\]"):
        reward("1", {"prompt": "p", "label": 1})


@pytest.mark.parametrize("reward", [exact_match, numeric_match])
def test_the_answer_may_be_under_another_key(reward: Any):
    assert partial(reward, answer_key="label")("1", {"label": 1}) == 1.0


@pytest.mark.parametrize("options", [{"which": "best"}, {"tolerance": -1.0}])
def test_an_option_out_of_range_is_a_config_error(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"best|-1\.0"):
        numeric_match("1", {"answer": 1}, **options)
