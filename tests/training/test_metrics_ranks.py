"""Two processes of gloo say of a step what NumPy says of all of its tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.fork_server import ForkServer
from support.metrics_oracle import assert_agree, computed, oracle
from support.metrics_ranks_run import make_steps

LIMIT_S = 240.0


@pytest.fixture(scope="module")
def ranks(
    fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    source = "from support import metrics_ranks_run; metrics_ranks_run.main(2, {!r})"
    with (folder / "errors").open("w") as errors:
        process = fork_server.start(source.format(str(folder)), stderr=errors.fileno())
    try:
        assert process.wait(LIMIT_S) == 0, (folder / "errors").read_text()
    finally:
        process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("way", ["pool", "torchmetrics"])
def test_both_ranks_agree_with_numpy_on_all_tokens(ranks: list[dict[str, Any]], way: str) -> None:
    for rank in ranks:
        assert_agree(rank[way], oracle(*make_steps()))


def test_the_ranks_say_the_same_to_the_last_bit_and_what_one_process_says(
    ranks: list[dict[str, Any]],
) -> None:
    assert ranks[0] == ranks[1]
    assert ranks[0]["pool"] == pytest.approx(computed(*make_steps()), rel=1e-6, abs=1e-9)


def test_all_states_take_one_all_reduce_and_carry_others_along(ranks: list[dict[str, Any]]) -> None:
    assert [rank["all_reduces"] for rank in ranks] == [1, 1]
    assert ranks[0]["other"] == [3.0]


def test_the_weights_for_the_learning_rate_are_those_of_all_ranks(
    ranks: list[dict[str, Any]],
) -> None:
    assert ranks[1]["effective share"] == pytest.approx(
        oracle(*make_steps())["ess/token"], rel=1e-4
    )
