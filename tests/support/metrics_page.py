"""Prints docs/metrics.md: ``python tests/support/metrics_page.py > docs/metrics.md``."""

from __future__ import annotations

from sdp_lightning.training.metrics import FAMILIES
from sdp_lightning.training.metrics.names import LAG_NAMES, OTHERS

HEAD = """\
# Metrics

Every name that a run logs, for every consumed batch. `validate` and `test` log the evaluation's
under `val/` and `test/`. A workflow adds what it counts under its own names in `rollout/`.
Infrastructure errors are counted by cause, as `rollout/error/judge_timed_out`. The
progress bar's `reward`, `lag` and `wait` (the share of the step that the trainer waited) go to no
logger. This page is made by `python tests/support/metrics_page.py > docs/metrics.md`, of the tables
in `sdp_lightning/training/metrics/names.py`.
"""

LAGS = """
## What a step did to tokens of every lag

Over all ranks. Log-probs in nats: b of the policy that sampled, as its engine gave them; q of the
segment's proximal policy; x at the start of the step. A name with k is also logged for the tokens
of each lag, with `_0`, `_1`, `_2`, `_3` or `_4plus` behind it. Everything is 0 where there is no
token. Percentiles are of histograms with 32 bins a decade from 1e-6 to 100 nats: within 4 %. Before
anything is squared or exponentiated its log is clamped to 20 nats either way; `drift/clamped_share`
and `ess/clamped_sequences` count where. `sdp_lightning.training.metrics.health` has the bounds from
which a value is warned of.

| name | k | meaning |
|---|---|---|
"""


def render() -> str:
    parts = [HEAD]
    for title, table in OTHERS.items():
        parts.append(f"\n## {title}\n\n| name | meaning | only with |\n|---|---|---|\n")
        parts += [f"| `{e.name}` | {e.meaning} | {e.when} |\n" for e in table]
    parts.append(LAGS)
    for family in FAMILIES:
        lags = () if family.first_lag is None else LAG_NAMES[family.first_lag :]
        by_lag = ", ".join(lags) + ("" if family.of_all or not lags else " only")
        parts.append(f"| `{family.name}` | {by_lag} | {family.meaning} |\n")
    return "".join(parts)


if __name__ == "__main__":
    print(render(), end="")
