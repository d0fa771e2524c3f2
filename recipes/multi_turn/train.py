"""A 0.4 M-parameter model learns to find a digit, told `up` or `down`, in about a minute."""

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from model import model_path
from task import MAX_GUESSES, UpOrDown, rows, val_rows

import sdp_lightning as sdp
from sdp_lightning.cli.quiet_logs import quiet_logs
from sdp_lightning.observability.summary import ProgressLine, RunSummary


def build() -> tuple[L.Trainer, sdp.SegmentWisePPOModule, sdp.RolloutDataModule]:
    """Everything that a run is made of."""
    quiet_logs()
    L.seed_everything(0)

    workflow = sdp.MultiTurnWorkflow(
        UpOrDown,
        group_size=8,
        sampling=sdp.SamplingParams(max_new_tokens=3),
        max_turns=MAX_GUESSES,
        stop=("\n",),
        turn_format="{observation}\n",
    )
    rollout = sdp.RolloutConfig(batch_size=16, max_head_lag=2, max_concurrent=8)
    data = sdp.RolloutDataModule(rows, workflow, rollout=rollout, val_prompts=val_rows)
    model = sdp.SegmentWisePPOModule(
        model_path(),
        optimizer=sdp.OptimizerConfig(lr=2e-4),
        update=sdp.UpdateConfig(num_minibatches=2),
    )
    trainer = L.Trainer(
        max_steps=120,  # optimizer steps: 60 batches of 2 minibatches
        callbacks=[sdp.WeightSyncCallback(), ProgressLine(), RunSummary()],
        logger=CSVLogger("runs", name="multi_turn"),
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
    print(f"Games won, of 50 with 8 samples each: {before:.3f} before, {after:.3f} after.")


if __name__ == "__main__":
    main()
