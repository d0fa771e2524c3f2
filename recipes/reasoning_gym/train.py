"""SmolLM2-135M learns a task of reasoning-gym, few-shot, by asynchronous RL on the CPU."""

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger

import sdp_lightning as sdp
from sdp_lightning.cli.quiet_logs import quiet_logs
from sdp_lightning.config.import_path import load_object
from sdp_lightning.observability.summary import ProgressLine, RunSummary

MODEL = Path(__file__).resolve().parents[1] / "arithmetic_cpu" / "model.py"
TASK = "reasoning_gym:chain_sum?shots=2&max_terms=2&max_digits=1"  # "4 - 6 =", in words around it
REWARD = "sdp_lightning.rewards.reasoning_gym:line_reward"


def build() -> tuple[L.Trainer, sdp.SegmentWisePPOModule, sdp.RolloutDataModule]:
    """Everything that a run is made of."""
    quiet_logs()
    L.seed_everything(0)

    sampling = sdp.SamplingParams(max_new_tokens=6)
    workflow = sdp.RLVRWorkflow(REWARD, group_size=8, sampling=sampling, stop=("\n",))
    rollout = sdp.RolloutConfig(batch_size=8, max_head_lag=2, max_concurrent=3)
    data = sdp.RolloutDataModule(
        f"{TASK}&size=500&seed=1",
        workflow,
        rollout=rollout,
        val_prompts=f"{TASK}&size=40&seed=2",
    )
    model = sdp.SegmentWisePPOModule(
        load_object(f"{MODEL}:model_path")(),
        optimizer=sdp.OptimizerConfig(lr=5e-5),
        trainable=r"layers\.2[2-9]\.",  # the last 8 of 30
    )
    trainer = L.Trainer(
        max_steps=20,
        callbacks=[sdp.WeightSyncCallback(), ProgressLine(), RunSummary()],
        logger=CSVLogger("runs", name="reasoning_gym"),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    return trainer, model, data


def main() -> None:
    trainer, model, data = build()
    before = trainer.validate(model, data, verbose=False)[0]["val/reward"]
    trainer.fit(model, data)  # ends with a validation
    after = float(trainer.callback_metrics["val/reward"])
    print(f"Reward on 40 other problems, 8 samples each: {before:.3f} before, {after:.3f} after.")


if __name__ == "__main__":
    main()
