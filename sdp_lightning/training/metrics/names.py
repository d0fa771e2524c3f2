"""Names of all logged metrics with their meanings: docs/metrics.md is made from these tables.

``FAMILIES`` has the statistics of :class:`~sdp_lightning.training.metrics.LagMetrics`, ``OTHERS``
the other metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

MetricRow: TypeAlias = Mapping[str, float]  # metrics of one batch by their logged names

LAG_BINS = 5  # 0, 1, 2, 3, and 4 or more
LAG_NAMES = (*(str(lag) for lag in range(LAG_BINS - 1)), f"{LAG_BINS - 1}plus")


NAMED_REWARD = "train/reward/"  # before the name of one of several rewards
NAMED_EVALUATION = "val/reward/"


def reward_names(rows: Iterable[MetricRow], prefix: str = NAMED_REWARD) -> list[str]:
    """Names of the several rewards that ``rows`` have, in their order."""
    found = {name: None for row in rows for name in row if name.startswith(prefix)}
    return [name.removeprefix(prefix) for name in found]


@dataclass(frozen=True)
class Family:
    """One statistic, logged for all tokens as ``name`` and for those of lag k as ``name_k``.

    Args:
        name: logged name.
        meaning: meaning in words.
        first_lag: the first lag that it is logged for; None if for none.
        of_all: whether it is logged for all tokens together.
    """

    name: str
    meaning: str
    first_lag: int | None = None
    of_all: bool = True

    @property
    def names(self) -> dict[str, int]:
        """Every name with its index in a tensor of all tokens, then lag 0, 1, 2, 3, 4+."""
        names = {self.name: 0} if self.of_all else {}
        lags = range(LAG_BINS) if self.first_lag is None else range(self.first_lag, LAG_BINS)
        by_lag = {f"{self.name}_{LAG_NAMES[lag]}": 1 + lag for lag in lags}
        return names if self.first_lag is None else names | by_lag


FAMILIES = (
    Family("lag/mean", "mean lag, in policy versions"),
    Family("lag/max", "the largest lag"),
    Family("lag/tokens", "tokens trained on, once for every epoch", 0, of_all=False),
    Family("lag/share", "their share of all tokens", 0, of_all=False),
    Family("loss/behavior_weight", "mean weight applied, of kept tokens"),
    Family("loss/clip_fraction", "kept tokens whose ratio is clipped"),
    Family("loss/clip_fraction_high", "the same, those whose ratio is above 1", 0),
    Family("loss/clip_fraction_low", "the same, those whose ratio is below 1", 0),
    Family("loss/rejected_fraction", "tokens that mask, cap or floor leave out of the loss", 0),
    Family("loss/entropy", "mean entropy of the target policy, nats", 0),
    Family("weight/abs_log_mean", "mean abs log weight applied, of kept tokens, nats", 0),
    Family("weight/abs_log_p99", "its 99th percentile", 0),
    Family("ess/token", "effective sample size of the drift, as a share of the tokens", 0),
    Family("ess/sequence", "the same of sequences: weight exp(sum of x - b) over their tokens", 0),
    Family("ess/clamped_sequences", "sequences whose log weight is clamped"),
    Family("drift/abs_log_mean", "mean of abs(x - b), nats", 0),
    Family("drift/abs_log_p99", "its 99th percentile", 0),
    Family("drift/k1", "mean of b - x: estimates KL(behavior ‖ proximal), may be negative", 0),
    Family(
        "drift/k3", "mean of exp(x - b) - 1 - (x - b): estimates the same KL, never negative", 0
    ),
    Family("drift/chi2", "mean of exp(2 (x - b)), less 1: the chi-square divergence", 0),
    Family("drift/clamped_share", "tokens whose x - b is clamped"),
    Family("mismatch/abs_log_mean", "drift/abs_log_mean_0: engine against trainer, no staleness"),
    Family("mismatch/abs_log_p99", "drift/abs_log_p99_0"),
    Family("mismatch/k1", "drift/k1_0"),
    Family("bridge/abs_log_mean", "mean of abs(x - q) where q is known, nats", 2),
    Family("bridge/abs_log_p95", "its 95th percentile", 2),
    Family("bridge/approximated_share", "tokens whose q is not known", 2),
)


def all_names() -> list[str]:
    """Logged names of ``FAMILIES``, in their order."""
    return [name for family in FAMILIES for name in family.names]


@dataclass(frozen=True)
class Logged:
    """One metric outside the families.

    Args:
        name: logged name.
        meaning: meaning in words.
        when: condition for logging it; empty if it always is.
    """

    name: str
    meaning: str
    when: str = ""


POOL = "`reward_workers` or a `RewardPool`"
AGENTS = "an `AgentWorkflow`"
SEVERAL = "several rewards"
AUTO = '`max_concurrent="auto"`'
EXTRA = "a module with `extra_loss`"
REFERENCE = "a KL term: `loss.kl_coefficient`"
OTHERS: dict[str, tuple[Logged, ...]] = {
    "Training: means over the optimizer steps of a batch, of all ranks": (
        Logged("train/reward", "mean reward of the batch's trajectories; of several, their sum's"),
        Logged("train/reward_std", "mean over groups of the standard deviation of their rewards"),
        Logged(f"{NAMED_REWARD}<name>", "mean of each of several rewards, unweighted", SEVERAL),
        Logged("train/loss", "the loss that is minimized"),
        Logged("train/extra_loss", "the loss of `extra_loss()`, which is not in it", EXTRA),
        Logged("train/kl", "mean estimate of the KL to the reference model, nats", REFERENCE),
        Logged("train/grad_norm", "norm of the gradient before it is clipped"),
        Logged("train/lr", "the learning rate, as it was applied"),
        Logged("train/lr_scale", "what the rate was scaled by", "`optimizer.scale_lr_by_ess`"),
        Logged("train/optimizer_step", "steps of the run when the batch had been trained on"),
        Logged("train/skipped", "share of steps skipped, as the gradient was not finite"),
        Logged("train/tokens", "sampled tokens in the batch that are trained on"),
        Logged("train/length", "mean sampled tokens of a trajectory, of masked ones, too"),
        Logged("train/truncated", "share of trajectories that ended at their token budget"),
        Logged("train/masked_truncated", "their number, if `update.mask_truncated` masks them"),
        Logged("train/uniform", "share of groups whose rewards are all equal: no learning signal"),
    ),
    "Evaluation, on the published version": (
        Logged("val/reward", "mean reward of the rollouts of `val_prompts`", "`val_prompts`"),
        Logged(f"{NAMED_EVALUATION}<name>", "mean of each of several rewards", SEVERAL),
        Logged("val/version", "the policy version that was evaluated", "`val_prompts`"),
        Logged(
            "val/pass_at_k",
            "share of rows of which a sample has reward 1 or more",
            "`val_prompts`, several samples a row",
        ),
    ),
    "Time of a step, rank 0's clock, seconds; what is in no phase is the rest": (
        Logged(
            "time/step_s",
            "from the end of a publish to the end of the next; of their staging with "
            "`overlap_publish`",
        ),
        Logged("time/wait_s", "waiting for the batch"),
        Logged("time/score_s", "scoring segments that need their proximal log-probs now"),
        Logged("time/train_s", "`training_step`: all forward and backward passes and updates"),
        Logged("time/publish_s", "publishing weights; the trainer waits (exposed)"),
        Logged("time/evaluate_s", "evaluations since the last publish"),
        Logged("time/paused_s", "of the publish: no token was sampled (drain, load, resume)"),
        Logged(
            "time/sampling_s", "at least one request of rank 0 was being sampled, beside the phases"
        ),
    ),
    "Time of rollouts, all ranks, seconds, means over those of the run so far": (
        Logged("rollout_time/group_s", "from the submission of a group until it was ready"),
        Logged("rollout_time/sample_s", "of a trajectory: its requests, waiting and running"),
        Logged("rollout_time/tool_s", "of a trajectory: between two requests (tools, turns)"),
        Logged("rollout_time/reward_s", "of a trajectory: after its last request (its reward)"),
    ),
    "Speed, all ranks, over rank 0's `time/step_s`": (
        Logged("speed/generated_tokens_per_s", "tokens sampled"),
        Logged("speed/train_tokens_per_s", "sampled tokens trained on"),
    ),
    "Groups, all ranks, when they took the batch; counts of the run so far": (
        Logged("rollout/version", "the policy version after the publish"),
        Logged("rollout/running", "being rolled out then"),
        Logged("rollout/concurrency", "the most at once in this step, of rank 0", AUTO),
        Logged("rollout/pending", "finished, waiting for the trainer then, less the batch"),
        Logged("rollout/dropped_stale", "dropped: too old when they had waited"),
        Logged("rollout/dropped_overdue", "dropped: too old while they ran"),
        Logged("rollout/rejected", "the workflow returned nothing to train on"),
        Logged("rollout/failed", "the workflow raised"),
        Logged("rollout/left_out", "samples left out of their group, as infrastructure failed"),
        Logged("rollout/diverged", "did not repeat what a checkpoint had of them"),
        Logged("rollout/cut_tokens", "tokens that engines returned after the end of a completion"),
        Logged("rollout/discarded", "of a checkpoint, not resumed: the prompts began anew"),
        Logged("rollout/calls_running", "calls then of plain rewards and environments, in threads"),
        Logged("rollout/calls_waiting", "such calls that waited for a thread then"),
        Logged("rollout/calls_lost", "such calls past their timeout that held a thread then"),
        Logged("rollout/trained_length", "mean sampled tokens of a trained group"),
        Logged("rollout/dropped_length", "the same of a dropped one"),
        Logged(
            "rollout/length_ratio",
            "the first over the mean of both: below 1, long rollouts starve",
        ),
        Logged("rollout/reward_raised", "rewards that raised", POOL),
        Logged("rollout/reward_timed_out", "rewards that took too long, and were killed", POOL),
        Logged("rollout/reward_out_of_memory", "rewards that ran out of memory", POOL),
        Logged("rollout/reward_crashed", "rewards that ended their process", POOL),
        Logged("rollout/verifier_raised", "answers on which a verifier raised: they are 0", POOL),
        Logged("rollout/agent_turns", "answers that agents got", AGENTS),
        Logged("rollout/agent_retried", "requests sent again, and answered as before", AGENTS),
        Logged("rollout/agent_refused", "requests that got an error", AGENTS),
        Logged("rollout/agent_overridden", "requests sampled by the run's own settings", AGENTS),
        Logged("rollout/agent_unfinished", "answers ended with their agent: not trained", AGENTS),
        Logged("rollout/agent_diverged", "branches that a resume did not repeat whole", AGENTS),
        Logged("rollout/agent_over_budget", "samples ended by turns or tokens", AGENTS),
        Logged("rollout/agent_timed_out", "samples ended by `timeout_s`", AGENTS),
        Logged("rollout/agent_raised", "samples whose agent raised: `error_reward`", AGENTS),
    ),
    "The run": (
        Logged("run/callbacks_set_aside", "callbacks that failed and are set aside, of rank 0"),
    ),
    "Weights on their way": (
        Logged("publish/bytes", "sent; with `overlap_publish` all of the publish before"),
        Logged("publish/bytes_per_s", "of the transfer: staging and loading"),
        Logged("publish/stage_s", "gathering, casting and writing weights, while servers sample"),
        Logged("publish/drain_s", "from closing the gate until no request is under way"),
        Logged("publish/load_s", "loading weights, in all servers at once"),
        Logged("publish/resume_s", "from the last server's report until requests are sent again"),
        Logged(
            "publish/echo",
            "mean difference of the log-probs of a text, engine against trainer, nats; as of the "
            "last time that it was asked",
            "an engine that scores texts, and not `WeightSyncCallback(weight_check_every=0)`",
        ),
        Logged("publish/echo_s", "seconds that this took", "`publish/echo`"),
    ),
}


def logged_names() -> dict[str, str]:
    """Every name that a fit may log, with its condition; empty if it is always logged."""
    others = {entry.name: entry.when for table in OTHERS.values() for entry in table}
    return others | dict.fromkeys(all_names(), "")
