"""Prints docs/reference/trainer-flags.md, of cases that tests/lightning/test_trainer_flags.py runs.

``python tests/support/trainer_flags_page.py > docs/reference/trainer-flags.md``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning.pytorch import callbacks as lc

Status = Literal["works", "refused", "no effect"]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """What a flag or callback does here.

    Args:
        status: whether it does what Lightning's documentation says.
        note: what it means, or the setting to use.
        settings: of the Trainer, for a run that shows it; None is not run, as it needs hardware, or
            is a setting of all runs.
        steps: optimizer steps of that run; of a refused one nothing.
    """

    status: Status
    note: str
    settings: Settings | None = field(default_factory=dict[str, Any])
    steps: int = 2


TWO: Settings = {"max_steps": 2}
EPOCH = "an epoch is one pass over the prompts"

FLAGS: dict[str, Case] = {
    "accelerator": Case("works", "`cpu`, `gpu`", None),
    "strategy": Case(
        "works",
        "`ddp`, `ddp_fork`, `ddp_notebook`, `ModelParallelStrategy` (FSDP2); `fsdp` and `ddp_spawn`"
        " are refused by name",
        None,
    ),
    "devices": Case("works", "ranks share every batch: counts are over all of them", None),
    "num_nodes": Case("works", "servers must be reachable by all", None),
    "precision": Case(
        "works", "`32-true`, `bf16-mixed`, `64-true`; `bf16-true` and float16 are refused", None
    ),
    "logger": Case("works", "a logger that fails is set aside", None),
    "callbacks": Case("works", "see below; a `WeightSyncCallback` is added if there is none", None),
    "fast_dev_run": Case(
        "works", "so many batches, with all their minibatches", {"fast_dev_run": 2}
    ),
    "max_epochs": Case("works", f"{EPOCH}: every row is trained so often", {"max_epochs": 2}, 8),
    "min_epochs": Case("works", "prompts must last as long", TWO | {"min_epochs": 1}),
    "max_steps": Case("works", "optimizer steps: minibatches times epochs of each batch", TWO),
    "min_steps": Case("works", "as `min_epochs`", TWO | {"min_steps": 1}),
    "max_time": Case("works", "also while waiting for rollouts", TWO | {"max_time": "00:01:00:00"}),
    "limit_train_batches": Case(
        "works",
        "batches of an epoch; the next epoch goes on with the next prompts",
        {"max_epochs": 2, "limit_train_batches": 3},
        6,
    ),
    "limit_val_batches": Case(
        "works", "batches of `batch_size` rows", TWO | {"limit_val_batches": 1}
    ),
    "limit_test_batches": Case("works", "as `limit_val_batches`", TWO | {"limit_test_batches": 1}),
    "limit_predict_batches": Case(
        "works", "batches to generate", TWO | {"limit_predict_batches": 1}
    ),
    "overfit_batches": Case(
        "works",
        "the first rows of so many batches, again in every epoch",
        {"max_epochs": 2, "overfit_batches": 1},
    ),
    "val_check_interval": Case(
        "works",
        "a fraction of an epoch, or batches; more batches than an epoch has count over the run",
        TWO | {"val_check_interval": 0.5},
    ),
    "check_val_every_n_epoch": Case(
        "works", EPOCH, {"max_epochs": 2, "check_val_every_n_epoch": 2}, 8
    ),
    "num_sanity_val_steps": Case("works", "batches of rows", TWO | {"num_sanity_val_steps": 1}),
    "log_every_n_steps": Case(
        "works", "in batches; 50, Lightning's default, is read as 1", TWO | {"log_every_n_steps": 2}
    ),
    "enable_checkpointing": Case("works", "", TWO | {"enable_checkpointing": False}),
    "enable_progress_bar": Case("works", "`ProgressLine` shows more", TWO),
    "enable_model_summary": Case("works", "", TWO | {"enable_model_summary": False}),
    "accumulate_grad_batches": Case(
        "refused",
        "`batch_size` of the `RolloutConfig` times as much; micro-batches are accumulated already",
        TWO | {"accumulate_grad_batches": 2},
    ),
    "gradient_clip_val": Case(
        "works", "taken as that of the `OptimizerConfig`", TWO | {"gradient_clip_val": 0.5}
    ),
    "gradient_clip_algorithm": Case(
        "refused",
        "`value`; the norm is clipped: `gradient_clip_val` of the `OptimizerConfig`",
        TWO | {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
    ),
    "deterministic": Case("works", "of the training; sampling has seeds of its own", TWO),
    "benchmark": Case("works", "", TWO | {"benchmark": False}),
    "inference_mode": Case(
        "works", "of `validate`, `test`, `predict`", TWO | {"inference_mode": False}
    ),
    "use_distributed_sampler": Case(
        "no effect",
        "prompts are shared over ranks by the executor",
        TWO | {"use_distributed_sampler": False},
    ),
    "profiler": Case("works", "", TWO | {"profiler": "simple"}),
    "detect_anomaly": Case("works", "slow", TWO | {"detect_anomaly": True}),
    "barebones": Case("works", "no logging, no checkpoints", {"barebones": True} | TWO),
    "plugins": Case("works", "checkpoint plugins are made atomic", None),
    "sync_batchnorm": Case("no effect", "the models have no batch norm", None),
    "reload_dataloaders_every_n_epochs": Case(
        "no effect",
        "always 1: every epoch has a length of its own",
        TWO | {"reload_dataloaders_every_n_epochs": 3},
    ),
    "default_root_dir": Case("works", "", None),
    "enable_autolog_hparams": Case("works", "", TWO | {"enable_autolog_hparams": False}),
    "model_registry": Case("works", "of Lightning's own hub", None),
}

Made = Callable[[], lc.Callback]
CALLBACKS: dict[str, tuple[Case, Made | None]] = {
    "BackboneFinetuning": (Case("refused", "`trainable=` or `lora=`"), lc.BackboneFinetuning),
    "BaseFinetuning": (Case("refused", "`trainable=` or `lora=`"), lc.BaseFinetuning),
    "BasePredictionWriter": (Case("works", "gets the rollouts of `predict`", None), None),
    "BatchSizeFinder": (
        Case("refused", "`batch_size`, `max_tokens_per_microbatch`"),
        lc.BatchSizeFinder,
    ),
    "Callback": (Case("works", "the base class"), lc.Callback),
    "Checkpoint": (Case("works", "a base class", None), None),
    "DeviceStatsMonitor": (Case("works", "needs a logger"), lambda: lc.DeviceStatsMonitor(True)),
    "EarlyStopping": (
        Case("works", f"on `val/reward` or `train/reward`; {EPOCH}"),
        lambda: lc.EarlyStopping("val/reward", mode="max"),
    ),
    "GradientAccumulationScheduler": (
        Case("refused", "`batch_size`"),
        lambda: lc.GradientAccumulationScheduler({0: 2}),
    ),
    "LambdaCallback": (Case("works", ""), lc.LambdaCallback),
    "LearningRateFinder": (Case("refused", "`lr` of the `OptimizerConfig`"), lc.LearningRateFinder),
    "LearningRateMonitor": (
        Case("works", "needs a logger; `train/lr` says the same"),
        lc.LearningRateMonitor,
    ),
    "ModelCheckpoint": (
        Case("works", "by steps or by time: saves at the next end of a batch"),
        lambda: lc.ModelCheckpoint(every_n_train_steps=1),
    ),
    "ModelPruning": (Case("refused", "leave it out"), lambda: lc.ModelPruning("l1_unstructured")),
    "ModelSummary": (Case("works", ""), lc.ModelSummary),
    "OnExceptionCheckpoint": (
        Case("works", "saves between two steps; the next fit of the same run goes on with it"),
        lambda: lc.OnExceptionCheckpoint("failed"),
    ),
    "ProgressBar": (Case("works", "a base class", None), None),
    "RichModelSummary": (Case("works", "needs `rich`"), lc.RichModelSummary),
    "RichProgressBar": (Case("works", "needs `rich`"), lc.RichProgressBar),
    "StochasticWeightAveraging": (
        Case("refused", "rollouts are sampled from the weights of the last step"),
        lambda: lc.StochasticWeightAveraging(1e-4),
    ),
    "SpikeDetection": (Case("refused", "watch `train/loss`"), lc.SpikeDetection),
    "ThroughputMonitor": (
        Case(
            "works",
            "`batch_size_fn=len` counts trajectories, of evaluations, too; needs a logger; "
            "`speed/*` says more",
        ),
        lambda: lc.ThroughputMonitor(batch_size_fn=len, window_size=2),
    ),
    "Timer": (Case("works", "as `max_time`"), lambda: lc.Timer("00:01:00:00")),
    "TQDMProgressBar": (Case("works", ""), lc.TQDMProgressBar),
    "EMAWeightAveraging": (
        Case("refused", "as `StochasticWeightAveraging`"),
        lc.EMAWeightAveraging,
    ),
    "WeightAveraging": (Case("refused", "as `StochasticWeightAveraging`"), lc.WeightAveraging),
}

HEAD = """\
# Flags and callbacks of Lightning

What each flag of the Trainer, and each callback of Lightning, does here. A refused one ends the run
at its start, by the name of the setting to use. This page is made by
`python tests/support/trainer_flags_page.py > docs/reference/trainer-flags.md`; its cases are run by
`tests/lightning/test_trainer_flags.py`; one with * is not run there.

**Epochs.** An epoch of the Trainer is a pass over the prompts: as many trained groups as there are
rows. Its last batch may reach into the next pass, which is shorter then. A dropped or rejected
group is made up for by the next row. `max_epochs`, or `num_epochs` of the `RolloutConfig`, ends the
run when every row was handed out so often. A run that `max_steps` ends within its first pass is one
epoch of these steps. A decay of the learning rate (`schedule="cosine"`) ends where `max_steps` or
the epochs end the run. Prompts that are read one after another have no known number: the run is one
epoch, and a warning names the flags that wait for another.

**Steps.** Loggers count batches (`step` in metrics.csv, the x axis, from 0). Checkpoints' names,
`max_steps` and `every_n_train_steps` count optimizer steps: `num_minibatches * num_epochs` of the
`UpdateConfig` a batch. Both are logged with every batch, for an x axis of your choice:
`train/optimizer_step`, and `rollout/version`, the number of the batch from 1.
"""


def page() -> str:
    """The text of the page."""
    lines = [HEAD, "## Flags of the Trainer\n", "| flag | here | |", "|---|---|---|"]
    lines += [_line(name, case) for name, case in FLAGS.items()]
    lines += ["\n## Callbacks\n", "| callback | here | |", "|---|---|---|"]
    lines += [_line(name, case) for name, (case, _) in CALLBACKS.items()]
    return "\n".join(lines) + "\n"


def _line(name: str, case: Case) -> str:
    star = "*" if case.settings is None else ""
    return f"| `{name}`{star} | {case.status} | {case.note} |"


if __name__ == "__main__":
    print(page(), end="")
