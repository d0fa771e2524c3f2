"""Seconds a training step on the arithmetic task, each trainer in a process of its own.

    python recipes/benchmarks/speed/arithmetic_step.py [--steps 6] [--rounds 2]

It runs, in turn and so under the same load: this library asynchronously (as the recipe), this
library strictly on-policy (``max_head_lag=0``), and, where ``trl`` is installed, its synchronous
GRPOTrainer with the same model, prompts, samples, trained layers and learning rate. Prints medians
and their ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Any

RECIPE = "recipes/arithmetic_cpu"
TRAINED = r"layers\.2[2-9]\."


def run_ours(steps: int, *, asynchronous: bool) -> list[float]:
    """Step times of this library."""
    import lightning as L

    import sdp_lightning as sdp
    from sdp_lightning.cli.quiet_logs import quiet_logs

    class Steps(L.Callback):
        """Keeps every step's seconds; stands after WeightSyncCallback."""

        times: list[float]

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.times.append(float(trainer.callback_metrics["time/step_s"]))

    quiet_logs()
    timer = Steps()
    timer.times = []
    on_policy = {"data.rollout.max_head_lag": 0, "data.rollout.max_concurrent": 8}
    trainer, model, data = sdp.from_config(
        f"{RECIPE}/config.yaml",
        {
            "trainer.max_steps": steps,
            "trainer.callbacks": None,
            "trainer.logger": False,
            "trainer.enable_progress_bar": False,
            "data.val_prompts": None,
        }
        | ({} if asynchronous else on_policy),
    )
    trainer.callbacks.append(timer)
    trainer.fit(model, data)
    return timer.times


def run_trl(steps: int) -> list[float]:
    """Step times of TRL's GRPOTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    from sdp_lightning.config.import_path import load_object

    class Steps(TrainerCallback):
        """Keeps every step's seconds."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.last = time.monotonic()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.last = self.last if self.times else time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.monotonic()
            self.times.append(now - self.last)
            self.last = now

    rows: Any = load_object(f"{RECIPE}/task.py:rows")
    reward: Any = load_object(f"{RECIPE}/task.py:reward")

    def score(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [reward(c, {"answer": a}) for c, a in zip(completions, answer, strict=True)]

    timer = Steps()
    model, tokenizer = load_for_trl()
    newline = tokenizer.encode("\n", add_special_tokens=False)
    GRPOTrainer(
        model=model,
        reward_funcs=score,
        args=trl_settings(steps, stop=[tokenizer.eos_token_id, *newline]),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[timer],
    ).train()
    return timer.times


def load_for_trl() -> tuple[Any, Any]:
    """Model, with the recipe's layers trained, and tokenizer."""
    import re

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sdp_lightning.config.import_path import load_object

    torch.manual_seed(0)
    make_path: Any = load_object(f"{RECIPE}/model.py:model_path")
    model = AutoModelForCausalLM.from_pretrained(make_path(), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(TRAINED, name) is not None)
    return model, AutoTokenizer.from_pretrained(make_path())


def trl_settings(steps: int, *, stop: list[int]) -> Any:
    """The recipe's settings in TRL's words."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir="runs/trl",
        max_steps=steps,
        learning_rate=5e-5,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=4,
        temperature=1.0,
        beta=0.0,
        generation_kwargs={"eos_token_id": stop},
        logging_steps=1000,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )


RUNS = {
    "asynchronous": lambda steps: run_ours(steps, asynchronous=True),
    "on-policy": lambda steps: run_ours(steps, asynchronous=False),
    "TRL": run_trl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=RUNS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(RUNS[options.only](options.steps)))
        return
    names = [name for name in RUNS if name != "TRL" or find_spec("trl")]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, "--only", name, "--steps", str(options.steps)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
            times[name] += json.loads(done.stdout.strip().splitlines()[-1])[2:]
    base = statistics.median(times["asynchronous"])
    for name in names:
        median = statistics.median(times[name])
        print(f"{name:14} {median:6.2f} s a step, {median / base:5.2f} x asynchronous")


if __name__ == "__main__":
    main()
