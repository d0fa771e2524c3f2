"""Optimizers by their path, and schedule-free ones, whose averages are published and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sdp_lightning as sdp
from sdp_lightning.cli.from_config import from_config
from sdp_lightning.testing import FakeEngine
from support.own_optimizers import WithOwn, muon_and_adamw, plateau
from support.schedule_free import ScheduleFreeSGD
from support.steps import Batches, assert_same, make_batch, train
from support.trainers import Recorder, make_data, make_module, make_trainer, weights_of

FREE = f"{Path(__file__).parents[1]}/support/schedule_free.py:ScheduleFreeSGD"


def test_an_optimizer_by_its_path_steps_with_its_arguments_clipping_and_schedule(
    model_folder: str,
) -> None:
    settings = {"lr": 0.5, "momentum": 0.5}
    optimizer = sdp.OptimizerConfig(
        class_path="torch.optim.SGD",
        init_args=settings,
        gradient_clip_val=0.01,
        schedule="linear",
    )
    batches = [make_batch(model_folder, (2, 1)) for _ in range(2)]
    module, seen = train(model_folder, *batches, optimizer=optimizer)
    first, second = seen.gradients
    assert seen.rates == [0.5, 0.25]
    weights, before = weights_of(module), seen.weights[0]
    assert_same(
        {n: weights[n] for n in first},
        {n: before[n] - 0.5 * first[n] - 0.25 * (0.5 * first[n] + second[n]) for n in first},
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_path": "bitsandbytes.optim.AdamW8bit"}, "no module 'bitsandbytes' here. Install"),
        ({"class_path": "torchao.optim.AdamW8bit"}, "no module 'torchao' here"),
        ({"class_path": "torch.optim.SDG"}, r"'SDG'.*Did you mean SGD"),
        ({"class_path": "Adam"}, "no module 'Adam' here"),
        ({"class_path": "torch.optim.SGD", "init_args": {"rate": 1}}, "'rate'; it has lr, mom"),
        ({"class_path": "torch.pi"}, "names no class, but float"),
        ({"class_path": "torch.optim.SGD", "lr": 0.1}, "lr is AdamW's.*init_args"),
        ({"init_args": {"lr": 0.1}}, "need a class_path"),
    ],
)
def test_a_path_that_cannot_be_followed_is_refused_before_a_model_is_loaded(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(sdp.ConfigError, match=f"(?s){message}"):
        make_module("no/such/model", optimizer=sdp.OptimizerConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_path": "torch.optim.Muon"}, "only supports 2D parameters.*overridden configure_"),
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": -1}}, "Invalid learning rate: -1"),
        ({"class_path": "builtins.zip"}, "makes no torch.optim.Optimizer, but zip"),
    ],
)
def test_what_the_optimizer_itself_refuses_is_said(
    model_folder: str, settings: dict[str, Any], message: str
) -> None:
    optimizer = sdp.OptimizerConfig(**settings)
    with pytest.raises(sdp.ConfigError, match=f"(?s){message}"):
        train(model_folder, make_batch(model_folder, (2, 1)), optimizer=optimizer)


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_a_config_file_names_the_optimizer(model_folder: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
model:
  model: {model_folder}
  optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.5, nesterov: false}}}}
data:
  prompts: [{{prompt: a}}]
  workflow:
    class_path: sdp_lightning.RLVRWorkflow
    init_args: {{reward: "sdp_lightning.rewards.text:exact_match"}}
"""
    )
    _, module, _ = from_config(config, {"model.optimizer.init_args.lr": 0.25})
    expected = sdp.OptimizerConfig(
        class_path="torch.optim.SGD", init_args={"lr": 0.25, "nesterov": False}
    )
    assert module.optimizer == expected


def free(parameters: Any) -> Any:
    return ScheduleFreeSGD(parameters, lr=5.0)


# Schedule-free ------------------------------------------------------------------------------------


def run(folder: str, steps: int, **settings: Any) -> tuple[Any, Recorder]:
    optimizer = sdp.OptimizerConfig(class_path=FREE, init_args={"lr": 5.0})
    module = make_module(folder, optimizer=optimizer, update=sdp.UpdateConfig(num_minibatches=2))
    recorder = Recorder()
    trainer = make_trainer(
        sdp.WeightSyncCallback(weight_check_every=0), recorder, max_steps=steps, **settings
    )
    trainer.fit(module, make_data())
    return module, recorder


def test_averages_are_published_and_saved_and_gradients_are_taken_between(
    model_folder: str, tmp_path: Path
) -> None:
    module, recorder = run(model_folder, 6)
    optimizer = module.optimizers().optimizer
    assert module.trainer.global_step == 6
    (group,) = optimizer.param_groups
    assert group["train_mode"] is False and group["k"] == 6
    for name, p in module.require_policy().named_parameters():
        assert p.detach().equal(recorder.weights[3][name]), "the last version is the average"
    moved = max(
        float((optimizer.state[p]["z"] - p.detach()).abs().max())
        for p in group["params"]
        if p.requires_grad
    )
    assert moved > 1e-3, "else the modes are the same weights"
    path = tmp_path / "free.ckpt"
    module.trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=False)["state_dict"]
    for name, value in recorder.weights[3].items():
        key = f"policy.{name}"
        assert key not in saved or saved[key].equal(value)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("make", [muon_and_adamw, plateau("train/reward", frequency=2), free])
def test_a_run_resumed_with_optimizers_of_one_s_own_ends_as_one_that_was_not_stopped(
    model_folder: str, tmp_path: Path, make: Any
) -> None:
    batches = [make_batch(model_folder, (2, 2), seed=seed) for seed in range(4)]

    def fit(steps: int, *given: Any, path: Path | None = None) -> WithOwn:
        module = WithOwn(model_folder)
        module.make = make
        trainer = make_trainer(max_steps=steps, limit_val_batches=0)
        trainer.fit(module, Batches(*given), ckpt_path=path)
        return module

    whole, path = fit(4, *batches), tmp_path / "half.ckpt"
    half = fit(2, *batches)
    half.trainer.save_checkpoint(path)
    resumed = fit(4, *batches[2:], *batches[:2], path=path)  # Lightning counts, and skips none
    for name, value in weights_of(whole).items():
        torch.testing.assert_close(weights_of(resumed)[name], value, msg=name)
    assert resumed.trainer.global_step == 4
    rates = [
        [g["lr"] for o in m.trainer.optimizers for g in o.param_groups] for m in (whole, resumed)
    ]
    assert rates[0] == rates[1]


class Observed(sdp.SegmentWisePPOModule):
    """Keeps the mode in which the extra loss, inside of a step, and its hooks outside see it."""

    def configure_optimizers(self) -> Any:
        self.modes: list[bool] = []
        return ScheduleFreeSGD(self.parameters())

    def extra_loss(self, batch: Any) -> None:
        self.modes.append(self.optimizers().param_groups[0]["train_mode"])

    def on_train_batch_end(self, *args: Any) -> None:
        self.modes.append(self.optimizers().param_groups[0]["train_mode"])


def test_an_optimizer_is_in_train_mode_in_a_step_and_only_there(model_folder: str) -> None:
    module = Observed(model_folder)
    trainer = make_trainer(sdp.WeightSyncCallback(weight_check_every=0), max_steps=2)
    trainer.fit(module, make_data(engine=FakeEngine()))
    assert module.modes == [True, False] * 2
