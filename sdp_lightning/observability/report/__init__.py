"""Report page of a run: reward, time, staleness, rollouts, trajectories, and advice.

``callback`` writes the files of a run as it goes on; ``page`` makes the page from these files,
without model, tokenizer or Lightning. ``series``, ``time_breakdown``, ``advice``, ``charts``,
``markup`` and ``sections`` are pure functions of metrics.
"""

from sdp_lightning.observability.report.page import write_report

__all__ = ["write_report"]
