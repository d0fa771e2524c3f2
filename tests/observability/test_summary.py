"""The page and the plot of a run."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from sdp_lightning.cli.quiet_logs import quiet_logs
from sdp_lightning.observability import summary
from sdp_lightning.observability.summary import RunSummary
from sdp_lightning.training.metrics.names import MetricRow
from support.metric_runs import ROWS, replay


def page(
    rows: list[dict[str, float]], evaluations: Sequence[MetricRow] = (), *, window: int = 2
) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100)
    for part in summary.render(rows, evaluations, window=window):
        console.print(part)
    return out.getvalue()


def line_of(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


# The page --------------------------------------------------------------------


def test_a_fit_ends_with_the_page_and_the_plot(tmp_path: Path):
    out = io.StringIO()
    replay(tmp_path, RunSummary(window=2, console=Console(file=out, width=200)))
    text = out.getvalue()
    assert "0.500 -> 0.750, means of the first and last 2 batches" in text
    assert f"The reward is drawn in {tmp_path / 'reward.png'}" in text
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_fit_starts_a_new_page(tmp_path: Path):
    callback = RunSummary(plot=None, console=Console(file=io.StringIO()))
    replay(tmp_path, callback)
    replay(tmp_path, callback, rows=ROWS[:1])
    assert len(callback.rows) == 1
    assert not (tmp_path / "reward.png").exists()


def test_a_run_without_metrics_of_ours_has_no_plot_and_no_lines(tmp_path: Path):
    out = io.StringIO()
    replay(tmp_path, RunSummary(console=Console(file=out)), rows=[{"other": 1.0}])
    assert out.getvalue().strip() == ""


def test_the_first_mean_is_of_the_first_window_and_the_last_of_the_last():
    assert "0.500 -> 0.750" in page(ROWS, window=2)
    assert "0.250 -> 0.750" in page(ROWS, window=1)


def test_validation_is_shown_before_and_after_with_every_reward():
    rows = [row | {"rollout/version": 1.0 + i} for i, row in enumerate(ROWS)]
    named = [
        {"val/reward": 0.25, "val/version": 0.0, "val/reward/form": 0.5},
        {"val/reward": 0.5, "val/version": 2.0, "val/reward/form": 0.9},
        {"val/reward": 0.75, "val/version": 3.0, "val/reward/form": 1.0},
    ]
    lines = [" ".join(line.split()) for line in page(rows, named).splitlines()]
    at = lines.index("validation 0.250 -> 0.750, before training and at version 3")
    assert lines[at + 1] == "0.500 -> 1.000 form"
    later = page(rows, named[1:])
    assert "0.500 -> 0.750, at version 2 and at version 3" in later
    assert "validation 0.750, at version 3" in " ".join(page(rows, named[2:]).split())
    assert "validation" not in page(rows)


def test_lags_end_at_the_largest_that_there_was():
    text = page(ROWS)
    assert "50.0%" in line_of(text, "0 versions old")
    assert "50.0%" in line_of(text, "1 version old")
    assert "2 versions" not in text
    assert "4 or more" not in text


def test_a_lag_between_is_shown_though_it_is_empty():
    row = {"lag/tokens_0": 30.0, "lag/tokens_1": 0.0, "lag/tokens_2": 10.0}
    assert summary.lag_shares([row]) == {
        "0 versions old": 0.75,
        "1 version old": 0.0,
        "2 versions old": 0.25,
    }


def test_the_page_ends_with_what_was_done_to_tokens_of_each_lag():
    of_lag = {
        "lag/tokens_0": 300.0,
        "ess/token_0": 1.0,
        "loss/clip_fraction_high_0": 0.25,
        "loss/clip_fraction_low_0": 0.25,
        "loss/rejected_fraction_0": 0.0,
        "lag/tokens_4plus": 100.0,
        "ess/token_4plus": 0.5,
        "bridge/abs_log_mean_4plus": 0.125,
        "lag/tokens_2": 0.0,
    }
    later = of_lag | {"lag/tokens_4plus": 300.0, "ess/token_4plus": 0.9, "lag/tokens_0": 0.0}
    text = page([of_lag, later])
    assert line_of(text, "ESS").split() == ["lag", "ESS", "clipped", "rejected", "bridge"]
    lines = text.splitlines()[-2:]
    assert lines[0].split() == ["0", "1.000", "0.500", "0.000"]
    assert lines[1].split() == ["4+", "0.800", "0.125"]  # 100 tokens of 0.5 and 300 of 0.9


def test_phases_and_the_rest_add_up_to_all_of_the_time():
    # 2 s a step: 0.5 waiting, 1.0 training, nothing else measured, so 0.5 is the rest
    shares = summary.phase_shares(ROWS)
    assert shares["waiting for rollouts"] == pytest.approx(0.25)
    assert shares["forward and backward"] == pytest.approx(0.5)
    assert shares["the rest"] == pytest.approx(0.25)


def test_phases_longer_than_the_steps_leave_no_rest():
    shares = summary.phase_shares([{"time/step_s": 1.0, "time/train_s": 2.0}])
    assert shares["forward and backward"] == 1.0
    assert shares["the rest"] == 0.0


def test_counts_of_groups_are_the_last_and_speeds_are_means():
    text = page(ROWS)
    assert "3 dropped (stale)" in text
    assert "100 generated, 80 trained" in text


@pytest.mark.parametrize("count", [1, 59, 60, 61, 200])
def test_a_plot_of_text_has_at_most_its_width_in_columns(count: int):
    lines = summary.draw([float(i) for i in range(count)], width=60, height=8)
    assert sum(line.count("●") for line in lines) == min(count, 60)
    assert max(map(len, lines)) <= 60 + len(" 0.00 ┤") + 3


def test_a_constant_reward_is_one_line():
    assert summary.draw([0.5, 0.5]) == [" 0.50 ┤●●"]


def test_without_matplotlib_the_user_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    told = summary.write_plot([0.1], tmp_path / "reward.png", window=5)
    assert "pip install matplotlib" in told
    assert not (tmp_path / "reward.png").exists()


# Logs -----------------------------------------------------------------------


def test_quiet_logs_keeps_information_off_and_warnings_on():
    names = ("lightning.pytorch", "lightning.fabric")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        quiet_logs()
        for name in names:
            assert not logging.getLogger(name).isEnabledFor(logging.INFO)
            assert logging.getLogger(name).isEnabledFor(logging.WARNING)
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
