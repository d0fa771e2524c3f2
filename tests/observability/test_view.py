"""Trajectories as they are shown: every token once, in its version's color."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from rich.console import Console

import sdp_lightning as sdp
from sdp_lightning.observability.view.palette import TERMINAL, channels, hue_of, underline_of
from sdp_lightning.training.batch import collate
from support.rollouts import CodePoints, make_segment
from support.view_pages import Page, page_of, text_segment, text_trajectory

# What is there ------------------------------------------------------------------------------------


def test_every_sampled_token_is_in_the_color_of_its_version_and_says_what_is_known() -> None:
    scored = text_segment(3, "ab")
    scored.proximal.set([-0.4, -0.3], 4)
    trajectory = sdp.Trajectory((sdp.Context([63]), scored, text_segment(5, "c")), reward=0.75)
    page = page_of(trajectory, version=6)
    assert page.text(f"sdp-v{hue_of(3)}") == "v3, lag 3" + "v3" + "ab"
    assert page.text(f"sdp-u-{underline_of(5)}") == "v5, lag 1" + "v5" + "c"
    assert page.text("sdp-context") == "?"
    first, _, last = page.titles()
    assert first.splitlines() == [
        "version 3, lag 3",
        "behavior -0.5000 (p 0.607)",
        "segment -0.4000 (p 0.67)",
        "weight 1.1052",  # exp(-0.4 + 0.5)
        "token 97",
    ]
    assert last.splitlines()[:2] == ["version 5, lag 1", "behavior -0.5000 (p 0.607)"]
    assert "0.75 reward" in page.text("sdp-side") and "lag 1-3" in page.text("sdp-side")


def test_a_group_shows_its_members_with_advantages_and_the_tool_apart_from_the_prompt() -> None:
    one = text_trajectory("2+2=", (0, "call"), "4\n", (1, "4"), reward=1.0)
    two = text_trajectory("2+2=", (0, "5"), reward=0.0, finish_reason="length")
    page = page_of(sdp.TrajectoryGroup((one, two), row_id="sum"), update=sdp.UpdateConfig())
    kinds = [attrs.get("data-kind") for _, attrs in page.tags if "data-kind" in attrs]
    assert kinds == ["prompt", "tool", "prompt"]
    side = page.text("sdp-side")
    assert "+1.00 advantage" in side and "-1.00 advantage" in side and "out of budget" in side
    assert page.text("sdp-title") == "row sum, 2 samples, mean reward 0.5"


@pytest.mark.parametrize(
    ("update", "shown"),
    [
        ({}, ("+1.41", "-0.71")),  # deviations 2/3 and -1/3 over their own 0.4714
        ({"scale_advantages_by_std": False}, ("+0.67", "-0.33")),
        ({"advantages": "rloo"}, ("+1.00", "-0.50")),  # against the mean of the others
    ],
    ids=["GRPO", "Dr. GRPO", "RLOO"],
)
def test_a_group_shows_the_advantages_of_the_run_s_own_estimator(
    update: dict[str, Any], shown: tuple[str, str]
) -> None:
    members = tuple(text_trajectory("?", (0, "a"), reward=r) for r in (1.0, 0.0, 0.0))
    page = page_of(sdp.TrajectoryGroup(members), update=sdp.UpdateConfig(**update))
    assert all(f"{value} advantage" in page.text("sdp-side") for value in shown)
    assert "advantages" not in page.text("sdp-note")


def test_without_the_run_s_settings_a_group_shows_no_advantages_and_says_how() -> None:
    group = sdp.TrajectoryGroup(
        tuple(text_trajectory("?", (0, "a"), reward=reward) for reward in (1.0, 0.0))
    )
    note = "advantages not shown: pass update=, the run's UpdateConfig"
    for data in (group, [group]):
        page = page_of(data)
        assert "advantage" not in page.text("sdp-side")
        assert page.text("sdp-note") == note
    output = io.StringIO()
    Console(file=output, width=80).print(group)
    assert note in output.getvalue()


def test_a_group_shows_no_advantages_where_a_kl_goes_into_the_reward() -> None:
    members = tuple(text_trajectory("?", (0, "a"), reward=reward) for reward in (1.0, 0.0))
    loss = sdp.LossConfig(kl_coefficient=0.1, kl_in="reward", kl_estimator="k1")
    page = page_of(sdp.TrajectoryGroup(members), loss=loss, update=sdp.UpdateConfig())
    assert "advantage" not in page.text("sdp-side")
    assert "takes a KL off the reward" in page.text("sdp-note")


def test_a_scored_token_of_lag_one_has_weight_one_around_past() -> None:
    scored = text_segment(3, "a")
    scored.proximal.set([-0.4], 4)
    trajectory = sdp.Trajectory((sdp.Context([63]), scored), reward=0.75)
    past = sdp.LossConfig(trust_region="past")
    for version, weight in ((4, "weight 1.0000"), (5, "weight 1.1052")):
        assert weight in page_of(trajectory, version=version, loss=past).titles()[0]


def test_a_group_of_one_has_no_advantage() -> None:
    page = page_of(sdp.TrajectoryGroup((text_trajectory("?", (0, "a")),)))
    assert "advantage" not in page.text("sdp-side") + page.text("sdp-note")


def test_a_batch_shows_proximals_weights_and_the_advantages_that_the_module_set() -> None:
    group = sdp.TrajectoryGroup((text_trajectory("?", (1, "ab"), (3, "c")),) * 2)
    batch = collate([group], version=4)
    x = torch.where(batch.loss_mask, -0.2, 0.0)
    advantages = torch.where(batch.loss_mask, 1.5, 0.0)
    batch = sdp.Batch(**(vars(batch) | {"proximal_logprobs": x, "advantages": advantages}))
    page = page_of(batch, loss=sdp.LossConfig(trust_region="proximal"))
    assert page.titles()[0].splitlines() == [
        "version 1, lag 3",
        "behavior -0.5000 (p 0.607)",
        "segment -0.5000 (p 0.607)",  # unscored: missing_proximal="behavior"
        "proximal -0.2000 (p 0.819)",
        "weight 1.3499",  # exp(-0.2 + 0.5)
        "token 97",
    ]
    assert "weight 1.0000" in page_of(batch).titles()[0], "around q = b"
    assert "weight 1.3499" in page_of(batch).titles()[2], "at lag 1 q is x"
    past = page_of(batch, loss=sdp.LossConfig(trust_region="past")).titles()[2]
    assert "weight 1.0000" in past and "segment -0.2000" in past
    assert "+1.50 advantage" in page.text("sdp-side") and not page.text("sdp-note")


@pytest.mark.parametrize(
    ("loss", "weight"),
    [
        (sdp.LossConfig(), "weight 1.1052"),
        (sdp.LossConfig(trust_region="past"), "weight 1.1052"),
        (sdp.LossConfig(trust_region="behavior"), "weight 1.0000"),
        (sdp.LossConfig(trust_region="proximal"), None),
    ],
    ids=lambda value: getattr(value, "trust_region", ""),
)
def test_a_batch_without_proximals_says_what_can_be_said(
    loss: sdp.LossConfig, weight: str | None
) -> None:
    scored = text_segment(1, "a")
    scored.proximal.set([-0.4], 2)
    group = sdp.TrajectoryGroup((sdp.Trajectory((sdp.Context([63]), scored)),))
    (title,) = page_of(collate([group], version=4), loss=loss).titles()
    found = [line for line in title.splitlines() if line.startswith("weight")]
    assert found == ([weight] if weight else [])


def test_long_trajectories_and_large_batches_are_cut_with_a_note() -> None:
    long = text_trajectory("p" * 50, (0, "a" * 1000 + "z"))
    groups = [sdp.TrajectoryGroup((long,) * 4) for _ in range(5)]
    page = page_of(groups, max_tokens=100, max_rows=6)
    assert page.text("sdp-cut") == "951 tokens not shown" * 6
    assert "14 more trajectories not shown" in page.text("sdp-note")
    assert len(page.titles()) == 6 * 50 and page.text("sdp-text").count("z") == 6
    assert "1,001 tokens sampled" in page.text("sdp-side")


@pytest.mark.parametrize("settings", [{"max_tokens": 0}, {"max_rows": 0}])
def test_room_for_nothing_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(sdp.ConfigError, match="must be 1 or more"):
        sdp.view(text_trajectory("?", (0, "a")), **settings)
    with pytest.raises(sdp.ConfigError, match="no trajectories"):
        sdp.view([])


# Where it is shown --------------------------------------------------------------------------------


def test_data_shows_itself_in_a_notebook_by_ids_and_with_a_set_tokenizer_by_text() -> None:
    trajectory = text_trajectory("?", (0, "ab"))
    group = sdp.TrajectoryGroup((trajectory,))
    for data in (trajectory, group, collate([group], version=0)):
        assert Page(data._repr_html_()).text("sdp-run") == "v097 98"
        sdp.set_view_tokenizer(CodePoints())
        assert Page(data._repr_html_()).text("sdp-run") == "v0ab"
        sdp.set_view_tokenizer(None)


def test_reading_a_tokenizer_changes_nothing_that_is_shown(model_folder: str) -> None:
    tokenizer = sdp.SegmentWisePPOModule(model_folder).tokenizer
    tokens = tokenizer.encode("12", add_special_tokens=False)
    trajectory = sdp.Trajectory((sdp.Context([3]), sdp.Segment(0, tokens, [-1.0, -1.0])))
    assert Page(trajectory._repr_html_()).text("sdp-run") != "v012"
    assert Page(sdp.view(trajectory, tokenizer=tokenizer).html()).text("sdp-run") == "v012"


def test_the_terminal_shows_the_same_with_colors_and_with_labels() -> None:
    trajectory = text_trajectory("ask", (1, "one"), "tool", (2, "two\nmore"), reward=0.5)
    group = sdp.TrajectoryGroup((trajectory, trajectory), row_id="7")
    output = io.StringIO()
    console = Console(file=output, width=80, force_terminal=True, color_system="truecolor")
    sdp.view(group, tokenizer=CodePoints(), version=3, max_rows=1).show(console)
    shown = output.getvalue()
    red, green, blue = channels(TERMINAL.tints[hue_of(1)])
    assert f"48;2;{red};{green};{blue}" in shown
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "row 7, 2 samples, mean reward 0.5" in plain and "1 more trajectory not shown" in plain
    lines = [line.strip() for line in plain.splitlines()]
    assert lines[lines.index("ask") :][:4] == ["ask", "v1\u2502one", "tool", "v2\u2502two\u23ce"]
    assert "0.5 reward" in plain and "v1, lag 2" in plain


def test_rich_prints_data_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    output = io.StringIO()
    long = sdp.Trajectory((sdp.Context([1]), make_segment(4, 30)))
    Console(file=output, width=60).print(long)
    assert "v4" in output.getvalue() and "30 tokens sampled" in output.getvalue()
    drawn = io.StringIO()
    Console(file=drawn, width=60).print(sdp.view(long, max_tokens=10))
    assert "[21 tokens not shown]" in drawn.getvalue()
    assert sdp.view(long)._repr_html_() == sdp.view(long).html()
