"""The tree of a sample: each branch says where it leaves another, and shows what is its own."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

import sdp_lightning as sdp
from sdp_lightning.observability.view.branches import Branch, branches_of
from sdp_lightning.training.batch import collate
from support.rollouts import CodePoints
from support.view_pages import page_of, text_trajectory

MAIN = text_trajectory("sys ask>", (0, "one"), " tool>", (1, "two"), reward=1.0, sample=0)
COMPACTED = text_trajectory("sys ask>one sum>", (1, "three"), reward=1.0, sample=0)
SUB_AGENT = text_trajectory("other>", (0, "four"), reward=1.0, sample=0)
DEEPER = text_trajectory("sys ask>one sum>three", (1, "five"), reward=1.0, sample=0)
ALONE = text_trajectory("sys ask>", (0, "six"), reward=0.0, sample=1)


@pytest.mark.parametrize(
    ("rows", "num_read", "expected"),
    [
        (["abc"], [1], [None]),
        (["abcd", "abx", "abxy", "zz"], [1, 2, 3, 1],
         [Branch(1), Branch(2, 1, 2, 1), Branch(3, 2, 3, 2), Branch(4)]),
        (["abcd", "abce"], [1, 1], [Branch(1), Branch(2, 1, 1, 1)]),  # each has said "bc" itself
    ],
)  # fmt: skip
def test_a_branch_leaves_the_one_with_which_it_has_read_most(
    rows: list[str], num_read: list[int], expected: list[Branch | None]
) -> None:
    tokens = [np.array([ord(c) for c in row]) for row in rows]
    assert branches_of(tokens, num_read) == expected


def test_a_group_shows_the_branches_of_a_sample_as_a_tree() -> None:
    group = sdp.TrajectoryGroup((MAIN, COMPACTED, SUB_AGENT, DEEPER, ALONE), row_id="7")
    page = page_of(group)
    assert page.text("sdp-title") == "row 7, 2 samples, mean reward 0.5"
    side = page.text("sdp-side")
    assert "branch 2, leaves branch 1 after 12 tokens" in side
    assert "branch 3, shares nothing" in side
    assert "branch 4, leaves branch 2 after 21 tokens" in side
    assert side.count("branch 1") == 2, "the other sample has no branches"
    assert "12 tokens as in branch 1" in page.text("sdp-cut")
    shown = page.text("sdp-text")
    assert shown.count("sys ask>") == 2, "of the tree once, and of the other sample"
    assert all(shown.count(text) == 1 for text in ("one", "two", "three", "four", "five", "six"))
    depths = [
        attrs["style"] for _, attrs in page.tags if "sdp-branch" in (attrs.get("class") or "")
    ]
    assert depths == ["--sdp-depth:1", "--sdp-depth:2"]
    kinds = [attrs["data-kind"] for _, attrs in page.tags if "data-kind" in attrs]
    assert kinds == ["prompt", "tool", "history", "prompt", "prompt"]


def test_a_batch_and_a_terminal_show_the_same_tree() -> None:
    group = sdp.TrajectoryGroup((MAIN, COMPACTED, ALONE))
    page = page_of(collate([group], version=2))
    assert "branch 2, leaves branch 1 after 12 tokens" in page.text("sdp-side")
    output = io.StringIO()
    sdp.view(group, tokenizer=CodePoints()).show(Console(file=output, width=100))
    lines = output.getvalue().splitlines()
    (at,) = [i for i, line in enumerate(lines) if "leaves branch 1" in line]
    assert lines[at].startswith("  1 reward"), "it is set in"
    assert lines[at + 1].strip() == "[12 tokens as in branch 1]"
    assert "sum>" in lines[at + 2] and "three" in lines[at + 3]


def test_trajectories_without_samples_have_no_branches() -> None:
    members = tuple(text_trajectory("?", (0, text), reward=1.0) for text in ("ab", "ac"))
    for data in (sdp.TrajectoryGroup(members), collate([sdp.TrajectoryGroup(members)], version=1)):
        assert "branch" not in page_of(data).text("sdp-side")
