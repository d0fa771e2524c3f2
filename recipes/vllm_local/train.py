"""SmolLM2-135M learns one-digit sums through a vLLM server that this script starts and ends."""

import argparse
import math
import os
import sys
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

import sdp_lightning as sdp
from sdp_lightning.cli.quiet_logs import quiet_logs
from sdp_lightning.config.import_path import load_object
from sdp_lightning.observability.summary import RunSummary

ROOT = Path(__file__).resolve().parents[2]
TASK = ROOT / "recipes" / "arithmetic_cpu"
LOGS = "runs/vllm_local/servers"
BESIDE = ROOT / ".venv-vllm" / "bin" / "python"


class AccuracyBefore(Callback):
    """Keeps what the sanity check finds: the accuracy before the first step."""

    value = math.nan

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            self.value = float(trainer.callback_metrics["val/reward"])


def build(
    python: str, max_steps: int
) -> tuple[L.Trainer, sdp.SegmentWisePPOModule, sdp.RolloutDataModule]:
    """Everything that a run is made of; ``python`` is the interpreter that has vLLM."""
    quiet_logs()
    L.seed_everything(0)

    rows = load_object(f"{TASK / 'task.py'}:rows")
    sampling = sdp.SamplingParams(max_new_tokens=4)
    workflow = sdp.RLVRWorkflow(
        f"{TASK / 'task.py'}:reward", group_size=8, sampling=sampling, stop=("\n",)
    )
    data = sdp.RolloutDataModule(
        rows,
        workflow,
        engine=f"vllm://launch?python={python}&devices=cpu&max_model_len=64&log_folder={LOGS}",
        rollout=sdp.RolloutConfig(batch_size=8, max_head_lag=2, max_concurrent=3),
        val_prompts=rows[::3],
    )
    model = sdp.SegmentWisePPOModule(
        load_object(f"{TASK / 'model.py'}:model_path")(),
        optimizer=sdp.OptimizerConfig(lr=5e-5),
        trainable=r"layers\.2[2-9]\.",  # the last 8 of 30
    )
    trainer = L.Trainer(
        max_steps=max_steps,
        callbacks=[sdp.WeightSyncCallback(), sdp.ProgressLine(), sdp.RunReport(), RunSummary()],
        logger=CSVLogger("runs", name="vllm_local"),
        log_every_n_steps=1,
        num_sanity_val_steps=-1,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    return trainer, model, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=str(BESIDE) if BESIDE.exists() else sys.executable)
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    trainer, model, data = build(arguments.python, arguments.steps)
    print(f"A vLLM server starts (a minute on an idle CPU); its log is in {LOGS}.", flush=True)
    before = AccuracyBefore()
    trainer.callbacks.append(before)
    trainer.fit(model, data)  # begins and ends with a validation
    after = float(trainer.callback_metrics["val/reward"])
    print(
        f"Accuracy on 27 sums, 8 samples each: {before.value:.3f} before, {after:.3f} after "
        f"{arguments.steps} steps."
    )


if __name__ == "__main__":
    main()
