"""The loop of a fit in fifty lines, by Fabric and without a Trainer: ``train(model_folder)``."""

import lightning as L
import torch

import sdp_lightning as sdp
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.config.pretrained import load_tokenizer
from sdp_lightning.distributed.reductions import RankSums
from sdp_lightning.rollout.factory import create_workflow_executor
from sdp_lightning.training.batch import collate
from sdp_lightning.training.policy.forward import LogprobForward
from sdp_lightning.training.policy.loading import load_policy, prepare
from sdp_lightning.training.policy.logprob_runner import LogprobRunner
from sdp_lightning.training.policy.weight_export import named_weights
from sdp_lightning.training.update import PolicyUpdate, TrainingLoop


def train(
    model: str, prompts: list[dict], workflow: sdp.RolloutWorkflow, steps: int
) -> list[float]:
    """Mean reward of each of ``steps`` batches."""
    fabric = L.Fabric(accelerator="cpu", devices=1)
    source = ModelSource(model)
    policy, tokenizer = load_policy(source, {}), load_tokenizer(source)
    prepare(policy, recompute=False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    policy, optimizer = fabric.setup(policy, optimizer)
    settings, sums = sdp.UpdateConfig(), RankSums(fabric.device)
    update = PolicyUpdate(sdp.LossConfig(), sdp.OptimizerConfig(), settings)
    forward = LogprobForward(policy.module)
    runner = LogprobRunner(forward, settings, over_ranks=sums.table)
    loop = TrainingLoop(
        policy.module, runner, optimizer, None, sums, lambda *_: None, backward=fabric.backward
    )
    engine = sdp.connect_engine("embedded", model=model, device="cpu")
    engine.start()
    executor = create_workflow_executor(
        config=sdp.RolloutConfig(batch_size=2, max_head_lag=1),  # beyond 1, segments are scored
        engine=engine,
        workflow=workflow,
        prompts=prompts,
        tokenizer=tokenizer,
    )
    rewards = []
    try:
        executor.publish(named_weights(policy.module, changed_only=False), 0, reset=True)
        executor.resume()
        for version in range(steps):
            groups = executor.take()
            batch = collate(groups, version=version).to(fabric.device)
            update.train(update.prepare(batch, runner, sums=sums), loop)
            executor.publish(named_weights(policy.module, changed_only=True), version + 1)
            rewards.append(float(batch.rewards.mean()))
    finally:
        executor.close()
        engine.close()
    return rewards
