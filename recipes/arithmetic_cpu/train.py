"""SmolLM2-135M learns one-digit sums by asynchronous RL, on the CPU, in minutes."""

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from model import model_path
from task import reward, rows

import sdp_lightning as sdp
from sdp_lightning.cli.quiet_logs import quiet_logs
from sdp_lightning.observability.summary import RunSummary


def build() -> tuple[L.Trainer, sdp.SegmentWisePPOModule, sdp.RolloutDataModule]:
    """Everything that a run is made of."""
    quiet_logs()
    L.seed_everything(0)

    sampling = sdp.SamplingParams(max_new_tokens=4)
    workflow = sdp.RLVRWorkflow(reward, group_size=8, sampling=sampling, stop=("\n",))
    rollout = sdp.RolloutConfig(batch_size=8, max_head_lag=2, max_concurrent=2)
    data = sdp.RolloutDataModule(rows, workflow, rollout=rollout, val_prompts=rows)
    model = sdp.SegmentWisePPOModule(
        model_path(),
        optimizer=sdp.OptimizerConfig(lr=5e-5),
        trainable=r"layers\.2[2-9]\.",  # the last 8 of 30
    )
    trainer = L.Trainer(
        max_steps=24,
        callbacks=[sdp.WeightSyncCallback(), sdp.ProgressLine(), sdp.RunReport(), RunSummary()],
        logger=CSVLogger("runs", name="arithmetic_cpu"),
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
    print(f"Accuracy on all 81 sums, 8 samples each: {before:.3f} before, {after:.3f} after.")


if __name__ == "__main__":
    main()
