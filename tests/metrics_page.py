"""Prints docs/metrics.md: ``python tests/metrics_page.py > docs/metrics.md``."""

from __future__ import annotations

from sdp_lightning.metrics import FAMILIES
from sdp_lightning.metrics.names import LAG_NAMES

HEAD = """\
# Metrics of lag

What `LagMetrics` logs for every training step, over all ranks. Log-probs in nats: b of the policy
that sampled, as its engine gave them; q of the segment's proximal policy; x at the start of the
step. A name with k is also logged for the tokens of each lag, with `_0`, `_1`, `_2`, `_3` or
`_4plus` behind it. Everything is 0 where there is no token. Percentiles are of histograms with 32
bins a decade from 1e-6 to 100 nats: within 4 %. Before anything is squared or exponentiated its log
is clamped to 20 nats either way; `drift/clamped_share` and `ess/clamped_sequences` count where.
`sdp_lightning.metrics.verdicts` has the bounds from which a value is warned of. This page is made
by `python tests/metrics_page.py > docs/metrics.md`.

| name | k | meaning |
|---|---|---|
"""


def render() -> str:
    lines: list[str] = []
    for family in FAMILIES:
        lags = () if family.first_lag is None else LAG_NAMES[family.first_lag :]
        by_lag = ", ".join(lags) + ("" if family.of_all or not lags else " only")
        lines.append(f"| `{family.name}` | {by_lag} | {family.meaning} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    print(render(), end="")
