"""The names under which :class:`~sdp_lightning.metrics.LagMetrics` logs, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass

LAG_BINS = 5  # 0, 1, 2, 3, and 4 or more
LAG_NAMES = (*(str(lag) for lag in range(LAG_BINS - 1)), f"{LAG_BINS - 1}plus")


@dataclass(frozen=True)
class Family:
    """One statistic: of all tokens under ``name``, of those of lag k under ``name_k``.

    Args:
        name: as logged.
        meaning: in words.
        first_lag: the first lag that it is also logged for, None if for none.
        of_all: whether it is logged for all tokens together.
    """

    name: str
    meaning: str
    first_lag: int | None = None
    of_all: bool = True

    @property
    def names(self) -> dict[str, int]:
        """Every name with its place in a tensor of all tokens, then lag 0, 1, 2, 3, 4+."""
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
    Family("ess/sequence", "the same of whole sequences: weight exp(sum of x - b)"),
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
    """Every name that is logged, in the order of the table."""
    return [name for family in FAMILIES for name in family.names]
