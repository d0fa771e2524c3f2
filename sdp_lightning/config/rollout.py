"""Settings of rollouts: counts, staleness, deadlines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sdp_lightning.config.validation import at_least, check_types
from sdp_lightning.errors import ConfigError

MissingProximal = Literal["behavior", "loglinear", "decoupled", "drop"]
OnOverdue = Literal["drop", "wait", "mask"]
LastBatch = Literal["short", "fill", "drop"]
PromptsOnResume = Literal["continue", "restart"]
PromptsCheck = Literal["error", "drop"]
LONGEST_S = 1e9  # longest deadline: threads cannot wait for a larger number


@dataclass(frozen=True)
class RolloutConfig:
    """Settings of the rollouts generated while the trainer trains. Counts: groups, of all ranks.

    Args:
        enable_segment_wise_ppo: the switch. True: staleness is bounded, stale groups are purged and
            their capacity given back, segments are scored under the version after their own. False:
            standard decoupled PPO: ``max_head_lag`` bounds submission only, and nothing is dropped,
            so ``on_overdue``, ``requeue_dropped`` and ``missing_proximal`` have no effect.
        batch_size: groups a training step consumes.
        max_head_lag: the most versions that a trained token may be old; 0 is exactly on-policy.
        max_concurrent: the most groups at once; None: ``(max_head_lag + 1) * batch_size``, more
            than which cannot run; ``"auto"``: what trains the most tokens a second, found in the
            first steps by trying (:class:`~sdp_lightning.rollout.concurrency.ConcurrencyTuner`).
        missing_proximal: substitute for a segment proximal whose window has passed:
            ``"behavior"`` (q := b), ``"loglinear"``, ``"decoupled"`` (q := x), or ``"drop"`` it.
        on_overdue: treatment of a group that still runs when it goes stale: ``"drop"`` it,
            ``"wait"`` for it before a batch is handed out, or ``"mask"`` its stale tokens.
        timeout_s: longest wait for a batch.
        drain_s: longest wait, in a publish, for outstanding requests to come back.
        overlap_publish: begin the next step once the weights are staged, and let servers load them
            beside it, if they are of one process and ``max_head_lag`` is 1 or more.
        max_failures: rollouts that may fail before the error reaches the trainer.
        max_rejected_in_a_row: rejected groups, with none accepted between, that count as endless.
        min_group_size: samples that a group needs once infrastructure errors
            (:class:`~sdp_lightning.InfrastructureError`) left others out. With fewer, the lost ones
            are tried again; then the group is rejected, and further rows refill the batch. A group
            of fewer samples needs all of them.
        lost_retries: times that the lost samples of such a group are tried again, with the tokens
            that they had.
        num_epochs: passes over the prompts; None repeats them for ever.
        last_batch: what becomes of the last groups of ``num_epochs`` if they are fewer than
            ``batch_size``: a ``"short"`` batch, with fewer minibatches if there are fewer groups
            than those; ``"fill"`` it from one more epoch; or ``"drop"`` them, which is counted in a
            warning. Of several ranks, one that has no group left trains on none until the others
            have none, or fills its batches too; with ``"drop"`` all end with the first.
        shuffle: reshuffle the prompts in every epoch, by (seed, epoch).
        seed: seed of the order of prompts and of every sampled token.
        requeue_dropped: submit the row of a dropped group again.
        prompts_on_resume: ``"continue"`` with the prompts where the checkpoint was, and refuse
            other ones; or ``"restart"``: begin the prompts, which may be others, from their start.
            The rollouts of the checkpoint are then discarded; weights, optimizer and version stay.
        prompts_check: rows that cannot be trained on are an ``"error"`` before the run, or
            ``"drop"`` leaves them out, counted: prompts that are missing, empty, or too long for
            the engine with ``max_new_tokens``, answers that cannot be read, ids twice or null.
        log_completions: completions of every batch that the Trainer's loggers get as a table, of
            rank 0.

    Raises:
        ConfigError: naming the value.
    """

    enable_segment_wise_ppo: bool = True
    batch_size: int = 8
    max_head_lag: int = 2
    max_concurrent: int | Literal["auto"] | None = None
    missing_proximal: MissingProximal = "behavior"
    on_overdue: OnOverdue = "drop"
    timeout_s: float = 600.0
    drain_s: float = 30.0
    overlap_publish: bool = False
    max_failures: int = 0
    max_rejected_in_a_row: int = 100
    min_group_size: int = 2
    lost_retries: int = 1
    num_epochs: int | None = None
    last_batch: LastBatch = "short"
    shuffle: bool = True
    seed: int = 0
    requeue_dropped: bool = False
    prompts_on_resume: PromptsOnResume = "continue"
    prompts_check: PromptsCheck = "error"
    log_completions: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        at_least("batch_size", self.batch_size, 1)
        at_least("max_head_lag", self.max_head_lag, 0)
        at_least("max_failures", self.max_failures, 0)
        at_least("seed", self.seed, 0)
        at_least("max_rejected_in_a_row", self.max_rejected_in_a_row, 1)
        at_least("min_group_size", self.min_group_size, 1)
        at_least("lost_retries", self.lost_retries, 0)
        at_least("log_completions", self.log_completions, 0)
        if self.overlap_publish and self.max_head_lag == 0:
            raise ConfigError(
                "overlap_publish=True trains a step while servers load the version before it, so "
                "its batch has a lag of 1: set max_head_lag to 1 or more, or leave it out."
            )
        if isinstance(self.max_concurrent, int):
            at_least("max_concurrent", self.max_concurrent, 1)
        if self.num_epochs is not None:
            at_least("num_epochs", self.num_epochs, 1)
        for name, value in (("timeout_s", self.timeout_s), ("drain_s", self.drain_s)):
            if not 0 < value <= LONGEST_S:
                raise ConfigError(
                    f"{name} must be above 0 and at most {LONGEST_S:.0e} s, got {value}."
                )

    def share(self, num_ranks: int) -> RolloutConfig:
        """One rank's part: counts are divided, all else stays.

        Raises:
            ConfigError: if a count cannot be divided evenly.
        """
        if num_ranks == 1:
            return self
        for name, count in (("batch_size", self.batch_size), ("max_concurrent", self.concurrency)):
            if count % num_ranks:
                below, above = count // num_ranks * num_ranks, -(-count // num_ranks) * num_ranks
                near = f"{below} or {above}" if below else str(above)
                raise ConfigError(
                    f"{name}={count} groups cannot be divided evenly over {num_ranks} processes: "
                    f"use {near}."
                )
        return replace(
            self,
            batch_size=self.batch_size // num_ranks,
            max_concurrent="auto"
            if self.max_concurrent == "auto"
            else self.concurrency // num_ranks,
        )

    @property
    def concurrency(self) -> int:
        """The most groups generated at once."""
        if isinstance(self.max_concurrent, int):
            return self.max_concurrent
        return (self.max_head_lag + 1) * self.batch_size

    @property
    def max_token_lag(self) -> int | None:
        """The largest lag of a token with weight in the loss; None: no token is masked for it."""
        return self.max_head_lag if self.on_overdue == "mask" else None
