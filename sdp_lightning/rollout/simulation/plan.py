"""How many of N GPUs should sample, and how many groups at once: a sweep of simulated runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sdp_lightning.config import RolloutConfig
from sdp_lightning.config.validation import at_least
from sdp_lightning.errors import ConfigError
from sdp_lightning.rollout.simulation.models import EngineModel, Lengths, TrainerModel
from sdp_lightning.rollout.simulation.simulate import simulate
from sdp_lightning.rollout.simulation.summary import (
    SimulationSummary,
    most_tokens_per_s,
    summarize,
)

NEAR = 0.05  # a plan so much slower than the fastest one is as good
_HOPELESS = 0.1  # one whose bound is so much below the fastest one's speed is not simulated


@dataclass(frozen=True)
class Pool:
    """GPUs, each of which samples or trains.

    Args:
        num_gpus: all of them.
        replica_gpus: GPUs of one replica of the engine.
        least_train_gpus: fewest GPUs that hold model, gradients and optimizer.
        replica: one replica.
        trainer: the trainer on ``trainer_gpus`` GPUs. On n of them ``token_s`` is taken to be
            ``trainer_gpus / n`` of its value, and all other times to stay.
        trainer_gpus: see ``trainer``.
    """

    num_gpus: int
    replica: EngineModel
    trainer: TrainerModel
    replica_gpus: int = 1
    trainer_gpus: int = 1
    least_train_gpus: int = 1

    def __post_init__(self) -> None:
        for name in ("num_gpus", "replica_gpus", "trainer_gpus", "least_train_gpus"):
            at_least(name, getattr(self, name), 1)
        if self.most_replicas < 1:
            raise ConfigError(
                f"{self.num_gpus} GPUs hold no replica of {self.replica_gpus} beside "
                f"{self.least_train_gpus} that train: use more GPUs."
            )

    @property
    def most_replicas(self) -> int:
        """Most replicas beside the fewest GPUs that train."""
        return (self.num_gpus - self.least_train_gpus) // self.replica_gpus

    def split(self, num_replicas: int) -> tuple[EngineModel, TrainerModel]:
        """So many replicas, and the trainer on all other GPUs."""
        others = self.num_gpus - num_replicas * self.replica_gpus
        token_s = self.trainer.token_s * self.trainer_gpus / others
        return (
            replace(self.replica, num_replicas=num_replicas),
            replace(self.trainer, token_s=token_s),
        )


@dataclass(frozen=True)
class Plan:
    """One split of the GPUs, one concurrency, and what a simulated run of it came to."""

    sample_gpus: int
    train_gpus: int
    max_concurrent: int
    summary: SimulationSummary


@dataclass(frozen=True)
class Plans:
    """Plans by falling speed.

    Attributes:
        plans: the simulated ones.
        best: the one with the least mean lag of those within 5 % of the fastest.
        num_skipped: plans that were not simulated, as their bound is below the fastest one's speed.
    """

    plans: tuple[Plan, ...]
    best: Plan
    num_skipped: int


def make_plans(
    pool: Pool,
    rollout: RolloutConfig,
    lengths: Lengths,
    *,
    num_steps: int,
    warmup: int,
    reward_s: float = 0.0,
    on_plan: Callable[[int, int], None] = lambda done, of: None,
) -> Plans:
    """Simulate splits of ``pool`` with several concurrencies, the most promising ones first.

    Args:
        pool: GPUs and speeds.
        rollout: settings; ``max_concurrent`` is the only one to try, unless it is None.
        lengths: sampled tokens of the groups.
        num_steps: steps of each simulated run.
        warmup: first ones of them that are not measured.
        reward_s: seconds of a group's reward.
        on_plan: called with the number of plans done, and of all.

    Raises:
        ConfigError: if a setting is refused.
    """
    candidates: list[tuple[float, int, RolloutConfig]] = []
    for num_replicas in spread(pool.most_replicas):
        for config in _concurrencies(rollout):
            bound = most_tokens_per_s(config, *pool.split(num_replicas), lengths)
            candidates.append((bound, num_replicas, config))
    candidates.sort(key=lambda each: -each[0])  # stable: fewer replicas and groups first
    plans: list[Plan] = []
    fastest = 0.0
    for done, (bound, num_replicas, config) in enumerate(candidates):
        on_plan(done, len(candidates))
        if bound < (1 - _HOPELESS) * fastest:
            break  # nor has any after it a higher bound
        engines, trainer = pool.split(num_replicas)
        steps = simulate(config, engines, trainer, lengths, num_steps=num_steps, reward_s=reward_s)
        summary = summarize(steps, config, engines, warmup=warmup)
        gpus = num_replicas * pool.replica_gpus
        plans.append(Plan(gpus, pool.num_gpus - gpus, summary.concurrency, summary))
        fastest = max(fastest, summary.tokens_per_s)
    plans.sort(key=lambda plan: -plan.summary.tokens_per_s)
    near = [p for p in plans if p.summary.tokens_per_s >= (1 - NEAR) * fastest]
    best = min(near, key=lambda plan: plan.summary.mean_lag)
    return Plans(tuple(plans), best, len(candidates) - len(plans))


def spread(most: int, count: int = 16) -> Sequence[int]:
    """All of 1 to ``most`` if they are few, else ``count`` of them, evenly spread.

    >>> spread(3), spread(100, 4)
    ([1, 2, 3], [1, 34, 67, 100])
    """
    if most <= count:
        return list(range(1, most + 1))
    return [1 + round(n * (most - 1) / (count - 1)) for n in range(count)]


def _concurrencies(rollout: RolloutConfig) -> Iterator[RolloutConfig]:
    """``rollout`` with the numbers of groups at once to try: halves of a batch, up to the bound."""
    if rollout.max_concurrent is not None:
        yield rollout
        return
    size, bound = rollout.batch_size, rollout.concurrency
    halves = {max(1, half * size // 2) for half in (1, 2, 3, 4, 6, 8, 12, 16)}
    for groups in sorted({*(n for n in halves if n < bound), bound}):
        yield replace(rollout, max_concurrent=groups)
