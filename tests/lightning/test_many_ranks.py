"""Two processes learn what one learns, with DDP and with FSDP2.

The ranks are forked from one process that has the libraries loaded: ``many_ranks_run.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from transformers import AutoModelForCausalLM

import sdp_lightning as sdp
from sdp_lightning.training.batch import Layout, collate
from sdp_lightning.training.policy.forward import sequence_logprobs
from support.odd_models import odd_model, saved
from support.rank_runs import Launcher, Results, assert_same_weights
from support.steps import VERSION, make_trajectories
from support.trainers import make_module, make_trainer

STRATEGIES = ("ddp", "fsdp")


RECORDED: dict[str, dict[str, Any]] = {
    "padded": {"layout": "padded"},
    "packed, each reward apart": {"layout": "packed", "minibatches": 2, "apart": True},
    "shared prefix, several minibatches": {"layout": "shared_prefix", "minibatches": 2},
    "partly trained, checkpointed": {
        "layout": "shared_prefix",
        "trainable": r"layers\.1\.|norm",
        "gradient_checkpointing": True,
    },
    "all samples of one rank truncated, and left out": {
        "truncated": [1, 3],
        "loss": {"aggregation": "sequence"},
    },
    "second moment": {
        "loss": {
            "surrogate": "unclipped",
            "trust_region": "behavior",
            "second_moment_cap": 0.01,
        }
    },
    "adapter, reference below it": {
        "layout": "shared_prefix",
        "lora": {"rank": 4, "alpha": 8.0},
        "loss": {"kl_coefficient": 0.5},
        "minibatches": 2,
        "gradient_checkpointing": True,
    },
}
MORE: dict[str, dict[str, Any]] = {
    "padded, float64": {"layout": "padded", "dtype": "float64", "minibatches": 2},
    "partly trained, padded": {"layout": "padded", "trainable": r"layers\.0\.mlp|lm_head"},
    "checkpointed": {"gradient_checkpointing": True, "minibatches": 2, "max_tokens": 200},
    "one micro-batch": {"layout": "shared_prefix", "max_tokens": 10_000},
    "reference, mean of sequences": {
        "minibatches": 2,
        "loss": {"kl_coefficient": 0.5, "aggregation": "sequence", "clip_epsilon": 0.1},
    },
}


def learn_alone(launcher: Launcher, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What one process sees of each case."""
    return launcher.run(1, {name: {"kind": "recorded", **case} for name, case in cases.items()})[0]


@pytest.fixture(scope="module")
def alone(launcher: Launcher) -> dict[str, Any]:
    return learn_alone(launcher, RECORDED)


def compare_recorded(
    launcher: Launcher,
    cases: Mapping[str, Mapping[str, Any]],
    strategy: str,
    alone: Mapping[str, Any],
) -> Results:
    ranks = launcher.run(
        2,
        {name: {"kind": "recorded", "strategy": strategy, **case} for name, case in cases.items()},
    )
    for name in cases:
        expected = alone[name]
        assert len(expected["metrics"]) == 5
        for found in (ranks[0][name], ranks[1][name]):
            assert_same_weights(found, expected)
            for mine, theirs in zip(found["metrics"], expected["metrics"], strict=True):
                assert mine.keys() == theirs.keys()
                for key, value in theirs.items():  # a percentile may fall into the next bin
                    rel = 0.16 if "_p9" in key else 1e-4
                    assert mine[key] == pytest.approx(value, rel=rel, abs=1e-6), (name, key)
        assert ranks[0][name]["metrics"] == ranks[1][name]["metrics"]
    return ranks


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_learn_what_one_process_learns(
    launcher: Launcher, alone: dict[str, Any], strategy: str
) -> None:
    ranks = compare_recorded(launcher, RECORDED, strategy, alone)
    for name in ("padded", "partly trained, checkpointed"):  # one rank has forwards to spare
        assert ranks[0][name]["microbatches"] != ranks[1][name]["microbatches"]
    num_loads = {rank: {case["num_loads"] for case in ranks[rank].values()} for rank in (0, 1)}
    assert num_loads == {0: {1}, 1: {0 if strategy == "fsdp" else 1}}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_learn_what_one_process_learns_in_every_setting(
    launcher: Launcher, strategy: str
) -> None:
    compare_recorded(launcher, MORE, strategy, learn_alone(launcher, MORE))


@pytest.mark.slow
def test_ranks_shard_models_whatever_they_call_their_layers(
    launcher: Launcher, tmp_path: Path
) -> None:
    """Biases stay: keys' have no gradient but rounding, and AdamW makes steps of that."""
    cases: dict[str, Any] = {}
    for kind in ("gpt2", "bloom", "gpt_neox", "mpt", "opt"):
        (tmp_path / kind).mkdir()
        model = odd_model(kind, max_position_embeddings=256)
        folder = saved(model, tmp_path / kind)
        cases[kind] = {"model": folder, "max_tokens": 1000, "trainable": "weight$"}
    compare_recorded(launcher, cases, "fsdp", learn_alone(launcher, cases))


def test_mixed_precision_rounds_sharded_weights_on_their_way_and_no_log_prob(
    launcher: Launcher, model_folder: str
) -> None:
    case = {
        "kind": "recorded",
        "strategy": "fsdp",
        "precision": "bf16-mixed",
        "max_tokens": 10_000,  # other shapes round otherwise
    }
    layouts: tuple[Layout, ...] = ("padded", "packed")
    ranks = launcher.run(2, {layout: {"layout": layout, **case} for layout in layouts})
    half = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    for layout, (number, rank) in itertools.product(layouts, enumerate(ranks)):
        seen = rank[layout]
        assert seen["types"] == {
            "used": "torch.bfloat16",
            "hidden": "torch.bfloat16",
            "kept": "torch.float32",
        }
        group = sdp.TrajectoryGroup(tuple(make_trajectories(model_folder, [3], seed=number)[0]))
        batch = collate([group], version=VERSION)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = sequence_logprobs(half, batch, layout=layout).logprobs[batch.loss_mask]
        scores = torch.tensor([x for scored in seen["scores"] for part in scored for x in part])
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
        assert (scores.bfloat16().float() != scores).float().mean() > 0.9
        assert {value.dtype for value in seen["weights"].values()} == {torch.float32}
        assert len(seen["metrics"]) == 5 and seen["metrics"] == ranks[0][layout]["metrics"]
        assert_same_weights(seen, ranks[0][layout])


def test_fsdp1_is_refused_with_the_strategy_to_use(model_folder: str) -> None:
    trainer, module = make_trainer(), make_module(model_folder)
    trainer._accelerator_connector.strategy = FSDPStrategy()
    module._trainer = trainer
    with pytest.raises(sdp.ConfigError, match=r"FSDP1.*ModelParallelStrategy"):
        module.setup("fit")
