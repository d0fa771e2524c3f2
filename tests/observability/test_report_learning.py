"""What the page says of learning: signals, each reward, evaluations, and gaps where nothing is."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from sdp_lightning.observability.report import learning, sections
from sdp_lightning.observability.report.files import Run
from sdp_lightning.observability.report.learning import SIGNALS
from sdp_lightning.observability.report.page import page
from sdp_lightning.observability.report.time_breakdown import time_breakdown
from support.reports import Page, make_step


def run_of(*steps: dict[str, float], evaluations: list[dict[str, float]] | None = None) -> Run:
    return Run(Path("runs/a"), steps=list(steps), evaluations=evaluations or [])


def cards_of(html: str) -> dict[str, str]:
    """HTML of each card with a heading."""
    return {
        part.split("</h3>")[0]: part.split("</h3>")[1]
        for part in html.split('<div class="card"><h3>')[1:]
    }


def strokes(html: str, color: int) -> list[int]:
    """Points of each line that is drawn in a color; a dot counts 1."""
    lines = re.findall(rf'<polyline class="stroke c{color} [^>]*points="([^"]*)"', html)
    dots = re.findall(rf'<path class="stroke dot c{color} [^>]*d="([^"]*)"', html)
    return [len(line.split()) for line in lines] + [1] * "".join(dots).count("M")


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda signal: signal.name)
def test_a_signal_has_a_chart_if_it_was_logged_and_none_else(signal: learning.Signal) -> None:
    steps = [make_step(v) | {signal.name: 0.25 * v} for v in (1, 2, 3)]
    cards = cards_of(learning.signals(run_of(*steps)))
    assert list(cards) == [signal.title]
    hover = cards[signal.title].split('class="hit"')[3]
    assert ("75%" if signal.percent else "0.75") in hover
    assert learning.signals(run_of(make_step(1))) == ""


def test_a_batch_without_tokens_or_a_finite_value_is_a_gap_and_is_counted() -> None:
    """An entropy of 0 where there are no tokens is no entropy; a rate is a rate all the same."""
    logged = {"train/tokens": 9.0, "loss/entropy": 0.5, "train/lr": 1e-3}
    steps = [make_step(v) | logged for v in range(7)]
    steps[2] |= {"train/tokens": 0.0, "loss/entropy": 0.0}
    steps[4] |= {"train/grad_norm": math.inf}
    cards = cards_of(learning.signals(run_of(*steps)))
    assert "0.5" in cards["Entropy"] and "batch: 0\n" not in cards["Entropy"]
    assert strokes(cards["Entropy"], 0) == [2, 4] + [1] * 6  # the mean, then the batches
    assert strokes(cards["Learning rate"], 0) == [7]
    assert "Gradient norm" in cards and "not finite in 1 of 7 batches" in cards["Gradient norm"]


def test_no_line_crosses_batches_without_tokens_of_its_lag() -> None:
    steps = [make_step(v) for v in range(1, 9)]
    for row in steps[3:5]:
        row |= {"lag/tokens_1": 0.0, "ess/token_1": 0.0, "loss/clip_fraction_high_1": 0.0}
    cards = cards_of(sections.lags(run_of(*steps)))
    for title in ("Effective sample size", "Clipped"):
        assert strokes(cards[title], sections.LAG_COLORS["1"]) == [3, 3]
        assert strokes(cards[title], sections.LAG_COLORS["0"]) == [8]
        assert cards[title].split('class="hit"')[4].count("lag 1") == 0


def test_each_reward_has_a_chart_on_its_own_scale() -> None:
    steps = [
        make_step(v) | {"train/reward/form": v / 4, "train/reward/<length>": -100.0 * v}
        for v in (1, 2, 3)
    ]
    evaluations = [{"val/version": 0.0, "val/reward": 0.0, "val/reward/form": 0.125}]
    html = learning.rewards(run_of(*steps, evaluations=evaluations))
    cards = cards_of(html)
    assert list(cards)[1:] == ["form", "&lt;length&gt;"] and "Each reward" in html
    assert "-300" not in cards["form"] and "-300" in cards["&lt;length&gt;"]
    assert "policy version 0\nform, validation: 0.125" in cards["form"]
    assert "validation" not in cards["&lt;length&gt;"]
    assert "Each reward" not in learning.rewards(run_of(make_step(1)))


def test_the_tiles_are_sentences() -> None:
    steps = [make_step(v, time__wait_s=0.28) for v in range(1, 9)]
    evaluations = [{"val/version": float(v), "val/reward": v / 8} for v in (0, 4, 8)]
    run = run_of(*steps, evaluations=evaluations)
    text = " ".join(Page(sections.cards(run, time_breakdown(steps))).text.split())
    assert "the trainer waits 14% of a step" in text
    assert "validation gives 1.000 at version 8; it was 0.000 before training" in text
    assert "the reward is 0.600 lately; it was 0.300 at first" in text
    assert "a step takes 2.0 s in the mean" in text and "tokens are 0.50 versions old" in text
    later = run_of(*steps[4:], evaluations=evaluations[1:])
    assert "0.500 before training" in Page(sections.cards(later, None)).text  # it began at 4
    later = run_of(*steps[:4], evaluations=evaluations[1:])
    assert "1.000 at version 8; it was 0.500 at version 4" in Page(sections.cards(later, None)).text


def test_a_metric_that_some_steps_lack_leaves_the_page_whole() -> None:
    """As after a resume with a newer release, or with other rewards."""
    steps = [make_step(v) for v in range(1, 7)]
    for name in ("lag/share_1", "time/step_s", "train/reward", "speed/train_tokens_per_s"):
        del steps[2][name]
    steps[3] |= {"train/reward/new": 1.0, "train/kl": math.nan}
    document = page(run_of(*steps))
    assert Page(document).values["steps"] == 6
    assert "nan" not in re.sub(r'data-value="nan"|>nan<', "", document)


def test_fields_of_a_row_are_beside_its_trajectory_and_escaped() -> None:
    sample = {"html": "<p>hi</p>", "row_id": "r", "version": 3, "reward": 1.0, "mean_reward": 0.5}
    fields = {"answer": "<b>42</b>", "level": "3"}
    old, new = dict(sample), sample | {"row": fields}
    html = page(Run(Path("a/b"), state={"samples": {"best": [new], "random": [old]}}))
    parsed = Page(html)
    assert "answer <b>42</b>" in parsed.text and parsed.samples == ["best", "random"]
    assert html.count('<dl class="row">') == 1
