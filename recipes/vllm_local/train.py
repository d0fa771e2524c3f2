"""SmolLM2-135M learns one-digit sums through a vLLM server that this script starts and ends."""

import argparse
import math
import os
import sys
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

import sdp_lightning as sdp
from sdp_lightning.cli.quiet_logs import quiet_logs

ROOT = Path(__file__).parents[2]
CONFIG = "recipes/vllm_local/config.yaml"
LOGS = "runs/vllm_local/servers"
SERVER_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


class AccuracyBefore(Callback):
    """Keeps the accuracy before the first step, which the sanity check measures.

    A ``trainer.validate`` before the fit would start the server twice.
    """

    value = math.nan

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            self.value = float(trainer.callback_metrics["val/reward"])


def main() -> None:
    default = str(SERVER_PYTHON) if SERVER_PYTHON.exists() else sys.executable
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=default, help="the interpreter that has vLLM")
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    quiet_logs()
    os.chdir(ROOT)  # the config names files from here
    server = f"python={arguments.python}&devices=cpu&max_model_len=64&log_folder={LOGS}"
    trainer, model, data = sdp.from_config(
        CONFIG,
        {
            "trainer.max_steps": arguments.steps,
            "trainer.num_sanity_val_steps": -1,
            "data.engine": f"vllm://launch?{server}",
            "data.val_prompts": "recipes/arithmetic_cpu/task.py:some_rows",
        },
    )
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
