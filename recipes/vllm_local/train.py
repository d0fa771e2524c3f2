"""SmolLM2-135M learns one-digit sums through a vLLM server that this script starts and ends."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import sdp_lightning as sdp
from sdp_lightning.cli.main import in_one_line
from sdp_lightning.cli.quiet_logs import quiet_logs

ROOT = Path(__file__).parents[2]
CONFIG = "recipes/vllm_local/config.yaml"
LOGS = "runs/vllm_local/servers"
SERVER_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


def main() -> None:
    default = str(SERVER_PYTHON) if SERVER_PYTHON.exists() else sys.executable
    more = "Settings of `sdp-lightning fit` are passed on: --trainer.limit_val_batches=2"
    parser = argparse.ArgumentParser(description=__doc__, epilog=more)
    parser.add_argument("--python", default=default, help="the interpreter that has vLLM")
    parser.add_argument("--steps", type=int, default=24)
    arguments, flags = parser.parse_known_args()
    from lightning.pytorch.callbacks import LambdaCallback  # slow to import

    quiet_logs()
    os.chdir(ROOT)  # the config names files from here
    server = f"python={arguments.python}&devices=cpu&max_model_len=64&log_folder={LOGS}"
    trainer, model, data = sdp.from_config(
        CONFIG,
        [
            f"--trainer.max_steps={arguments.steps}",
            "--trainer.num_sanity_val_steps=-1",
            f"--data.engine=vllm://launch?{server}",
            "--data.val_prompts=recipes/arithmetic_cpu/task.py:some_rows",
            *flags,
        ],
    )
    print(f"A vLLM server starts (a minute on an idle CPU); its log is in {LOGS}.", flush=True)
    before: list[float] = []  # measured by the sanity check: a `validate` would start a server

    def keep(trainer: Any, _: Any) -> None:
        if trainer.sanity_checking:
            before.append(float(trainer.callback_metrics["val/reward"]))

    trainer.callbacks.append(LambdaCallback(on_validation_end=keep))
    trainer.fit(model, data)  # begins and ends with a validation
    after = float(trainer.callback_metrics["val/reward"])
    print(
        f"Accuracy on 27 sums, 8 samples each: {before[0]:.3f} before, {after:.3f} after "
        f"{trainer.global_step} steps."
    )


if __name__ == "__main__":
    sys.exit(in_one_line(main))
